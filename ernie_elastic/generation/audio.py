"""Sounds, one 80 ms step at a time, its levels inside the stack. Letters: B rows, S steps, Q levels, V codes."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ernie_elastic.errors import ConfigError
from ernie_elastic.generation.decoder import GroupDecoder


@torch.inference_mode()
def decode_audio(decoder: GroupDecoder) -> list[torch.Tensor]:
    """Codes int64 [S, Q] of each row, up to EOA (left out) or max_audio_steps. ConfigError without audio heads.

    At the limit the last step is pending, chosen and not read; `cut_short` reads it.
    """
    audio = decoder.model.model.audio
    if audio is None:
        raise ConfigError("this model has no audio heads: audio_num_levels is 0")
    embedded, position = decoder.first_group()
    end = decoder.layout.codebook_size
    active = torch.ones(len(decoder.next_position), dtype=torch.bool, device=decoder.device)
    steps: list[torch.Tensor] = []
    for _ in range(decoder.sampling.max_audio_steps):
        chosen: list[torch.Tensor] = []
        decoder.step(embedded, position, "audio_generation", _code_sampler(decoder, chosen, end), active)
        codes_BQ = torch.stack(chosen, dim=1)
        active = active & (codes_BQ[:, 0] != end)
        steps.append(codes_BQ.masked_fill(~active[:, None], -1))
        if not bool(active.any()):
            break
        embedded, position = audio.embed_steps(codes_BQ)[:, None], decoder.running_position()
        decoder.set_pending(embedded, position)
    table = torch.stack(steps, dim=1)
    return [row[row[:, 0] >= 0] for row in table]


def cut_short(decoder: GroupDecoder) -> None:
    """Read the pending step of every row with EOA as its successor, as a document with such a sound would have it."""
    end = decoder.layout.codebook_size
    decoder.step(
        *decoder.first_group(),
        "audio_generation",
        lambda level, logits_BV: logits_BV.new_full((len(logits_BV),), -1 if level else end, dtype=torch.int64),
    )


def _code_sampler(
    decoder: GroupDecoder, chosen: list[torch.Tensor], end: int
) -> Callable[[int, torch.Tensor], torch.Tensor]:
    def sample(level: int, logits_BV: torch.Tensor) -> torch.Tensor:
        if level:  # only the first level may end the sound
            logits_BV = logits_BV[:, :end]
        chosen.append(decoder.choose(logits_BV))
        return chosen[-1]

    return sample
