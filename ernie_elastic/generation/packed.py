"""The packed entry: rows of documents of every modality, teacher-forced, logits at every target.

Letters: B rows, T positions, H hidden, N positions, V vocabulary, S audio steps, Q audio levels, D bits.
"""

from __future__ import annotations

from typing import Any, cast

import torch

from ernie_elastic.generation.protocols import CausalModel
from ernie_elastic.modeling.attention import packed_mask
from ernie_elastic.modeling.blocks import shift_left
from ernie_elastic.modeling.expert_parallel import ExpertShard
from ernie_elastic.modeling.inputs import embed_batch
from ernie_elastic.modeling.masks import Places, SequenceMask
from ernie_elastic.modeling.outputs import PackedOutput, StackOutput, router_loss
from ernie_elastic.modeling.sequence_parallel import SequenceShard
from ernie_elastic.schema import PackedBatch, SubModelSpec


class PackedEntry:
    """`forward_packed` for the causal model."""

    def forward_packed(
        self,
        batch: PackedBatch,
        submodel: SubModelSpec | None = None,
        next_codes: torch.Tensor | None = None,
        shard: SequenceShard | None = None,
        expert_shard: ExpertShard | None = None,
    ) -> PackedOutput:
        """All modalities, teacher-forced: logits at every target of `batch`.

        next_codes int64 [B, T, Q] replaces the batch's own codes as feedback (default: the true codes). shard: sequence
        parallelism; every rank gets the whole batch, runs its share of the positions and returns logits of the targets
        there. expert_shard: the experts lie on several ranks, which all call this together. Raises ConfigError for an
        attention back end that cannot take the mask, and for T that ranks do not divide.
        """
        causal_lm = cast(CausalModel, self)
        model, config = causal_lm.model, causal_lm.config
        embedded = embed_batch(model, batch)
        mask = packed_mask(SequenceMask(Places.of(batch), config.video_window), config)
        valid_BT = batch.document_BT >= 0
        codes_BTQ = batch.next_codes_BTQ if next_codes is None else next_codes
        if shard is not None:
            shard.check(batch.document_BT.shape[1], config.num_attention_heads, config.num_key_value_heads)
        cut = shard.local if shard is not None else _whole
        audio_index_S = (cut(batch.next_codes_BTQ)[..., :1].reshape(-1) >= 0).nonzero()[:, 0]
        kwargs: dict[str, Any] = {"is_causal": False} if shard is None else {"is_causal": False, "exchange": shard}
        position, valid_N = cut(batch.position_BT3), cut(valid_BT).reshape(-1)
        stack = model.run_stack(
            cut(embedded),
            position,
            mask,
            submodel=submodel,
            next_codes=cut(codes_BTQ).flatten(0, 1)[audio_index_S],
            audio_index_S=audio_index_S,
            valid_N=valid_N,
            expert_shard=expert_shard,
            **kwargs,
        )
        next_embedded = cut(shift_left(embedded)) if model.mtp is not None else embedded
        return _logits(causal_lm, batch, stack, audio_index_S, next_embedded, (position, mask, kwargs), shard)


def _whole(field_BT: torch.Tensor) -> torch.Tensor:
    return field_BT


def _logits(
    causal_lm: CausalModel,
    batch: PackedBatch,
    stack: StackOutput,
    audio_index_S: torch.Tensor,
    next_embedded: torch.Tensor,
    context: tuple[torch.Tensor, Any, dict[str, Any]],
    shard: SequenceShard | None,
) -> PackedOutput:
    """Heads at the targets. Indices in the result are those of the whole batch, also where only a shard of it ran."""
    model = causal_lm.model
    flat = stack.hidden.reshape(-1, stack.hidden.shape[-1])
    text_index_N = (batch.text_targets_BT.reshape(-1) >= 0).nonzero()[:, 0]
    bit_index_N, mtp_index_N = batch.bit_index_N, _mtp_index(batch) if model.mtp is not None else text_index_N[:0]
    here = _same if shard is None else shard.of_batch(batch.text_ids_BT.shape)
    text_index_N, local_text_N = here(text_index_N)
    bit_index_N, local_bit_N = here(bit_index_N)
    mtp_index_N, local_mtp_N = here(mtp_index_N)
    mtp_logits = flat.new_zeros(0, causal_lm.config.vocab_size)
    if model.mtp is not None:
        position, mask, kwargs = context
        predicted = model.mtp(stack.hidden, next_embedded, model.rotary_emb(position), mask, **kwargs)
        mtp_logits = causal_lm.lm_head(predicted.reshape(-1, predicted.shape[-1])[local_mtp_N])
    return PackedOutput(
        text_logits_NV=causal_lm.lm_head(flat[local_text_N]),
        text_index_N=text_index_N,
        audio_logits=stack.audio_logits,
        audio_index_S=audio_index_S if shard is None else shard.to_global(audio_index_S, batch.text_ids_BT.shape),
        bit_logits_ND=(model.visual.bit_head(flat[local_bit_N]) if model.visual is not None else flat.new_zeros(0, 0)),
        bit_index_N=bit_index_N,
        mtp_logits_NV=mtp_logits,
        mtp_index_N=mtp_index_N,
        hidden_BTH=stack.hidden,
        routing=stack.routing,
        layers=stack.layers,
        router_loss=router_loss(stack.routing),
    )


def _same(index_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return index_N, index_N


def _mtp_index(batch: PackedBatch) -> torch.Tensor:
    """Flat positions i whose successor i + 1 lies in the same document and has a text target, x_{i+2}: int64 [N]."""
    document = batch.document_BT
    has_next = (document[:, 1:] == document[:, :-1]) & (batch.text_targets_BT[:, 1:] >= 0)
    return torch.nn.functional.pad(has_next, (0, 1)).reshape(-1).nonzero()[:, 0]
