"""Text token by token, or two at a time with drafts of the MTP module.

Letters: B rows, H hidden, V vocabulary.
"""

from __future__ import annotations

import torch

from ernie_elastic.generation.decoder import GroupDecoder
from ernie_elastic.modeling.masks import cached_mask


@torch.inference_mode()
def decode_text(decoder: GroupDecoder) -> list[list[int]]:
    """Tokens of each row up to EOS (left out) or max_new_tokens."""
    if decoder.drafting:
        return _decode_with_drafts(decoder)
    embedded, position = decoder.first_group()
    active = torch.ones(len(decoder.next_position), dtype=torch.bool, device=decoder.device)
    produced: list[torch.Tensor] = []
    for _ in range(decoder.sampling.max_new_tokens):
        out = decoder.step(embedded, position, "text", active_B=active)
        token_B = decoder.choose(decoder.model.lm_head(out.hidden[:, -1]))
        active = active & (token_B != decoder.layout.special.eos)
        produced.append(torch.where(active, token_B, -1))
        if not bool(active.any()):
            break
        embedded, position = decoder.token_group(token_B)
    table = torch.stack(produced, dim=1).tolist()
    return [[token for token in row if token >= 0] for row in table]


def _decode_with_drafts(decoder: GroupDecoder) -> list[list[int]]:
    """Each step reads the last token and a draft of the next one; a draft that is what would have been chosen counts.

    paper: section 1.4 (MTP); a draft is one token, not a distribution, so "chosen equals drafted" keeps the sampled
    distribution exact, and at temperature 0 the tokens are those of plain decoding.
    """
    head, limit = decoder.model.lm_head, decoder.sampling.max_new_tokens
    rows: list[list[int]] = [[] for _ in range(len(decoder.next_position))]
    active = torch.ones(len(rows), dtype=torch.bool, device=decoder.device)
    embedded, position = decoder.first_group()
    draft_B: torch.Tensor | None = None
    while bool(active.any()):
        if draft_B is not None:
            guess = decoder.model.model.embed_tokens(draft_B)[:, None]
            embedded, position = torch.cat([embedded, guess], dim=1), torch.cat([position, position + 1], dim=1)
        out = decoder.step(embedded, position, "text", active_B=active, groups=embedded.shape[1])
        first_B = decoder.choose(head(out.hidden[:, 0]))
        last_B, accepted_B = first_B, torch.zeros_like(active)
        if draft_B is not None:
            accepted_B = first_B == draft_B
            decoder.reject(~accepted_B)
            if bool(accepted_B.any()):
                last_B = torch.where(accepted_B, decoder.choose(head(out.hidden[:, 1])), first_B)
        active = _collect(decoder, rows, active, (first_B, last_B), accepted_B, limit)
        draft_B = head(_draft(decoder, out.hidden, position, (first_B, last_B), accepted_B)).argmax(-1)
        decoder.next_position = decoder.next_position + accepted_B.long()
        embedded, position = decoder.token_group(last_B)
    return rows


def _collect(
    decoder: GroupDecoder,
    rows: list[list[int]],
    active: torch.Tensor,
    tokens: tuple[torch.Tensor, torch.Tensor],
    accepted_B: torch.Tensor,
    limit: int,
) -> torch.Tensor:
    """Append what each active row produced; which rows go on, bool [B]."""
    goes_on = []
    for row, (alive, first, last, accepted) in enumerate(
        zip(active.tolist(), tokens[0].tolist(), tokens[1].tolist(), accepted_B.tolist(), strict=True)
    ):
        for token in (first, last) if accepted else (first,):
            alive = alive and token != decoder.layout.special.eos and len(rows[row]) < limit
            if alive:
                rows[row].append(token)
        goes_on.append(alive and len(rows[row]) < limit)
    return torch.tensor(goes_on, device=decoder.device)


def _draft(
    decoder: GroupDecoder,
    hidden_BGH: torch.Tensor,
    position_BG3: torch.Tensor,
    tokens: tuple[torch.Tensor, torch.Tensor],
    accepted_B: torch.Tensor,
) -> torch.Tensor:
    """Hidden state [B, H] of the MTP module after each row's last valid position; its keys become final.

    Its cache holds the same positions as the stack's, so a rejected draft is hidden in both by one entry.
    """
    model = decoder.model.model
    assert model.mtp is not None
    size = hidden_BGH.shape[1]
    successors = torch.stack(tokens, dim=1)[:, :size]
    new = decoder.keys.map(lambda part: part[:, -size:])
    output_BGH = model.mtp(
        hidden_BGH,
        model.embed_tokens(successors),
        model.rotary_emb(position_BG3),
        cached_mask(new, decoder.keys, decoder.window),
        decoder.cache,
        decoder.mtp_slot,
        is_causal=False,
    )
    return torch.where(accepted_B[:, None], output_BGH[:, -1], output_BGH[:, 0])
