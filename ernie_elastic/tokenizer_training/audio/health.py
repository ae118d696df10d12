"""Is an audio codec healthy: how its codes are used, how its sounds come back, and whether it has collapsed.

Contract: `codec_health` works for every `AudioTokenizer`, is deterministic, and names each sign of collapse in a plain
sentence; a healthy codec gives none. paper: section 2.5 names no numbers; peer: users report unused codebooks (Moshi)
and collapsed training (EnCodec); ours: the limits, far below what trained codecs reach.

Shape letters: L samples, S steps, Q levels, V codes of a level.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ernie_elastic.errors import ConfigError, DataError
from ernie_elastic.tokenizer_training.losses.audio import MultiScaleMel, si_sdr
from ernie_elastic.tokenizers.audio.base import AudioTokenizer

QUIET = 1e-3  # root mean square below which a given sound counts as silence, which may well come back as silence
FEW_STEPS = 4  # a sound of fewer steps may rightly have equal codes in all


@dataclass(frozen=True)
class CollapseLimits:
    """When a codec counts as collapsed. used, perplexity: of a level, as shares of the codes that it could have used,
    min(V, steps). loudness: of a decoded sound against the given one. sounds: share of the sounds that may decode to
    silence or have equal codes in all steps. Raises ConfigError outside 0..1.
    """

    used: float = 0.1
    perplexity: float = 0.05
    loudness: float = 0.05
    sounds: float = 0.1

    def __post_init__(self) -> None:
        for name in ("used", "perplexity", "loudness", "sounds"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"collapse limits: {name} is {getattr(self, name)}; it is a share in 0..1")


@torch.no_grad()
def codec_health(
    tokenizer: AudioTokenizer, waves: Iterable[np.ndarray | torch.Tensor], limits: CollapseLimits | None = None
) -> dict[str, Any]:
    """Numbers on `waves` (float32 [L] each, at the codec's sample rate).

    "levels": for each level "perplexity" and "used_share" of its codes, and "mel_distance" and "si_sdr_db" (means over
    sounds) of what levels up to it decode to; "bits_per_second", "steps_per_second", "steps", "sounds"; "collapse": a
    list of sentences, empty for a healthy codec. Raises DataError without waves.
    """
    limits = limits or CollapseLimits()
    given = [tokenizer.check_wave(wave) for wave in waves]
    if not given:
        raise DataError("codec health: no waves were given; give at least one sound of the test split")
    codes = tokenizer.encode_batch(given)
    codes_SQ = torch.cat(codes)
    mel = MultiScaleMel(tokenizer.config.sample_rate).to(tokenizer.device)
    levels, decoded = [], []
    for level in range(tokenizer.num_levels):
        found = tokenizer.decode_batch([item[:, : level + 1] for item in codes])
        decoded = [wave_L[: len(known_L)] for wave_L, known_L in zip(found, given, strict=True)]
        levels.append({**_usage(codes_SQ[:, level], tokenizer.codebook_size), **_fidelity(given, decoded, mel)})
    step_rate = tokenizer.config.sample_rate / tokenizer.config.step_samples
    bits = tokenizer.num_levels * math.log2(tokenizer.codebook_size) * step_rate
    reachable = min(tokenizer.codebook_size, len(codes_SQ))
    collapse = _dead_levels(levels, tokenizer.codebook_size, reachable, limits)
    collapse += _dead_sounds(given, decoded, codes, limits)
    return {
        "levels": levels, "bits_per_second": round(bits, 1), "steps_per_second": round(step_rate, 3),
        "steps": len(codes_SQ), "sounds": len(given), "collapse": collapse,
    }  # fmt: skip


def _usage(codes_S: torch.Tensor, codebook_size: int) -> dict[str, float]:
    share_V = torch.bincount(codes_S, minlength=codebook_size).double() / len(codes_S)
    entropy = float(-(share_V * share_V.clamp(min=1e-12).log()).sum())
    used = float((share_V > 0).double().mean())
    return {"perplexity": round(math.exp(entropy), 2), "used_share": round(used, 4)}


def _fidelity(given: Sequence[torch.Tensor], decoded: Sequence[torch.Tensor], mel: MultiScaleMel) -> dict[str, float]:
    pairs = [(a_L[None], b_L[None]) for a_L, b_L in zip(given, decoded, strict=True)]
    distance = sum(float(mel(a_1L, b_1L)) for a_1L, b_1L in pairs) / len(pairs)
    ratio = sum(float(si_sdr(a_1L, b_1L).mean()) for a_1L, b_1L in pairs) / len(pairs)
    return {"mel_distance": round(distance, 4), "si_sdr_db": round(ratio, 2)}


def _dead_levels(
    levels: Sequence[dict[str, float]], codebook_size: int, reachable: int, limits: CollapseLimits
) -> list[str]:
    found = []
    for number, level in enumerate(levels):
        used = round(level["used_share"] * codebook_size)
        if used < limits.used * reachable or (used == 1 and reachable > 1):
            found.append(f"level {number} uses {used} of {codebook_size} codes, {reachable} could be used: it is dead")
        elif level["perplexity"] < limits.perplexity * reachable:
            found.append(
                f"level {number} has perplexity {level['perplexity']:.1f}, {reachable} could be reached: nearly all "
                "steps share a few codes"
            )
    return found


def _dead_sounds(
    given: Sequence[torch.Tensor],
    decoded: Sequence[torch.Tensor],
    codes: Sequence[torch.Tensor],
    limits: CollapseLimits,
) -> list[str]:
    loud = [index for index, wave_L in enumerate(given) if _swing(wave_L) > QUIET]
    silent = [index for index in loud if _swing(decoded[index]) < limits.loudness * _swing(given[index])]
    constant = [index for index in silent if float(decoded[index].mean().abs()) > QUIET]
    long = [index for index in loud if len(codes[index]) >= FEW_STEPS]
    alike = [index for index in long if bool((codes[index] == codes[index][0]).all())]
    first = {tuple(codes[index].flatten().tolist()) for index in loud}
    found = []
    if len(silent) - len(constant) > limits.sounds * len(loud):
        found.append(f"{len(silent) - len(constant)} of {len(loud)} sounds decode to silence")
    if len(constant) > limits.sounds * len(loud):
        found.append(f"{len(constant)} of {len(loud)} sounds decode to a constant")
    if len(alike) > limits.sounds * len(long):
        found.append(f"{len(alike)} of {len(long)} sounds have the same codes in all their steps")
    if len(loud) > 1 and len(first) == 1:
        found.append(f"all {len(loud)} sounds have the same codes")
    return found


def _swing(wave_L: torch.Tensor) -> float:
    """Root mean square of a wave [L] around its mean."""
    return float((wave_L - wave_L.mean()).square().mean().sqrt())
