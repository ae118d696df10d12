"""Is a visual tokenizer healthy: how its bits are used, how pictures come back, and whether it has collapsed.

Contract: deterministic; `collapse_findings` serves every `VisualTokenizer`, names each sign of collapse in a plain
sentence and gives none for a healthy one. paper: section 2.2 names no numbers; peer: users of Infinity report collapsed
codes at coarse scales; ours: the limits, far below what trained tokenizers reach.

Shape letters: N pictures, H/W pixels, h/w latent grid, D bits, S scales.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ernie_elastic.errors import ConfigError, DataError
from ernie_elastic.tokenizer_training.losses.perceptual import (
    PyramidDistance,
    VisionTeacher,
    feature_distance,
    frechet_distance,
)
from ernie_elastic.tokenizers.visual.conv import ConvVisualTokenizer

DEAD_ENTROPY = 0.01  # of a bit over pictures and positions, in bits
FEW_SAMPLES = 8  # values of a bit below which its entropy says nothing


@dataclass(frozen=True)
class VisualCollapseLimits:
    """When a tokenizer counts as collapsed. dead: share of the D bits of a scale that may be dead. alike: share of all
    bits that at least differ from the commonest picture's. gain_db: what decoding gains over flat pictures of the right
    mean colour. Raises ConfigError outside 0..1, or for a gain below 0."""

    dead: float = 0.25
    alike: float = 0.01
    gain_db: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.dead <= 1 or not 0 <= self.alike <= 1 or self.gain_db < 0:
            raise ConfigError(
                f"collapse limits: dead {self.dead} and alike {self.alike} are shares in 0..1, gain_db {self.gain_db} "
                "is 0 or more"
            )


def collapse_findings(
    targets: Sequence[torch.Tensor], psnr_db: float, flat_psnr_db: float, limits: VisualCollapseLimits | None = None
) -> list[str]:
    """Sentences that name signs of collapse; empty for a healthy tokenizer.

    targets: bits 0/1 of N pictures of one size, per scale [N, h, w, D], as any tokenizer's quantiser gives them.
    psnr_db: of its reconstructions; flat_psnr_db: of pictures of one colour, each its picture's mean. A scale with
    fewer than FEW_SAMPLES values of a bit is not judged by entropy.
    """
    limits = limits or VisualCollapseLimits()
    found = []
    for scale, bits in enumerate(targets):
        samples = bits.double().flatten(0, -2)
        dead = int((bit_entropy(samples.mean(dim=0)) < DEAD_ENTROPY).sum())
        if len(samples) >= FEW_SAMPLES and dead > limits.dead * bits.shape[-1]:
            found.append(f"scale {scale}: {dead} of its {bits.shape[-1]} bits are the same in all pictures and places")
    every = torch.cat([bits.double().flatten(1) for bits in targets], dim=1)
    share = every.mean(dim=0)
    different = float(torch.minimum(share, 1 - share).mean())
    if len(every) > 1 and different < limits.alike:
        found.append(
            f"all {len(every)} pictures are coded alike: {different:.2%} of their bits differ from the commonest"
        )
    if psnr_db < flat_psnr_db + limits.gain_db:
        found.append(
            f"reconstructions have {psnr_db:.2f} dB, pictures of one flat colour {flat_psnr_db:.2f} dB: nothing but "
            "the mean comes back"
        )
    return found


def bit_entropy(share: torch.Tensor) -> torch.Tensor:
    """Entropy in bits, same shape, of bits that are one with probability `share`."""
    share = share.clamp(1e-9, 1 - 1e-9)
    return -(share * share.log2() + (1 - share) * (1 - share).log2())


@dataclass
class _Group:
    """What coding the pictures of one size gives."""

    pixels: torch.Tensor
    targets: list[torch.Tensor]
    decoded: torch.Tensor
    squared_by_scale: list[torch.Tensor]
    squared_by_bits: list[torch.Tensor]


@torch.no_grad()
def conv_visual_health(
    tokenizer: ConvVisualTokenizer,
    pictures: Sequence[np.ndarray],
    teacher: VisionTeacher | None = None,
    limits: VisualCollapseLimits | None = None,
) -> dict[str, Any]:
    """Numbers on pictures uint8 [H, W, 3], each of a schedule's size.

    psnr_db: of the mean squared error after all scales, psnr_db_by_scales after 1, 2, ... of them, psnr_db_by_bits for
    each count of the bit series; flat_psnr_db: of each picture's mean colour. bits_used: share of (scale, position,
    bit) that are not constant over pictures of a size; bit_entropy_by_scale: mean entropy of a bit over pictures and
    positions (1 = even). perceptual_distance, of features of the teacher or of a fixed pyramid (perceptual_measure).
    reconstruction_fid: with a teacher and two pictures or more, in the teacher's features. collapse: sentences.
    Raises DataError without pictures or for a size without a schedule.
    """
    if not pictures:
        raise DataError("visual health: no pictures were given; give at least one of the test split")
    sizes = list(dict.fromkeys(picture.shape for picture in pictures))
    stacks = [np.stack([picture for picture in pictures if picture.shape == size]) for size in sizes]
    groups = [_code(tokenizer, torch.as_tensor(stack)) for stack in stacks]
    scales, counts = range(len(tokenizer.quantizer.scales)), tokenizer.config.bit_series
    by_scale = [_psnr([group.squared_by_scale[scale] for group in groups]) for scale in scales]
    flat = _psnr([_flat_error(group.pixels) for group in groups])
    constant = [torch.cat([_varies(bits) for bits in group.targets]) for group in groups]
    entropies = []
    for scale in scales:
        samples = torch.cat([group.targets[scale].double().flatten(0, -2) for group in groups])
        entropies.append(round(float(bit_entropy(samples.mean(dim=0)).mean()), 4))
    collapse = []
    for group in groups:
        where = f"pictures of {group.pixels.shape[1]}x{group.pixels.shape[2]}: " if len(groups) > 1 else ""
        psnr, flat_psnr = _psnr([group.squared_by_scale[-1]]), _psnr([_flat_error(group.pixels)])
        collapse += [where + text for text in collapse_findings(group.targets, psnr, flat_psnr, limits)]
    return {
        "pictures": len(pictures),
        "psnr_db": by_scale[-1],
        "psnr_db_by_scales": by_scale,
        "psnr_db_by_bits": {
            str(count): _psnr([group.squared_by_bits[place] for group in groups]) for place, count in enumerate(counts)
        },
        "flat_psnr_db": flat,
        "bits_per_picture": tokenizer.config.bits_per_picture,
        "bits_used": round(float(torch.cat(constant).double().mean()), 4),
        "bit_entropy_by_scale": entropies,
        **_distances(groups, teacher),
        "collapse": collapse,
    }


def _code(tokenizer: ConvVisualTokenizer, pixels_NHW3: torch.Tensor) -> _Group:
    latent = tokenizer.encode(pixels_NHW3)
    quantizer = tokenizer.quantizer_for(*latent.shape[1:3])
    codes = quantizer.encode(latent)
    partial = torch.stack([quantizer.contribution(bits, scale) for scale, bits in enumerate(codes.targets)]).cumsum(0)
    decoded = [tokenizer.decode(feature).cpu() for feature in partial]
    few = [tokenizer.decode(codes.first_bits(count).total).cpu() for count in tokenizer.config.bit_series]
    true = pixels_NHW3.cpu()
    return _Group(
        true,
        [bits.cpu() for bits in codes.targets],
        decoded[-1],
        [_squared(picture, true) for picture in decoded],
        [_squared(picture, true) for picture in few],
    )


def _squared(made_NHW3: torch.Tensor, true_NHW3: torch.Tensor) -> torch.Tensor:
    return (made_NHW3.double() - true_NHW3.double()).square().mean(dim=(1, 2, 3))


def _flat_error(pixels_NHW3: torch.Tensor) -> torch.Tensor:
    values = pixels_NHW3.double()
    return (values - values.mean(dim=(1, 2), keepdim=True)).square().mean(dim=(1, 2, 3))


def _psnr(squared: Sequence[torch.Tensor]) -> float:
    """dB of the mean over all pictures of squared errors [N]."""
    return round(10 * math.log10(255.0**2 / max(float(torch.cat(list(squared)).mean()), 1e-12)), 2)


def _varies(bits_NhwD: torch.Tensor) -> torch.Tensor:
    return (bit_entropy(bits_NhwD.double().mean(dim=0)) >= DEAD_ENTROPY).flatten()


def _distances(groups: Sequence[_Group], teacher: VisionTeacher | None) -> dict[str, Any]:
    """Distances of pictures from their reconstructions, by the teacher or the pyramid."""
    pyramid = PyramidDistance()
    distances, real_features, made_features = [], [], []
    for group in groups:
        real, made = _unit_range(group.pixels), _unit_range(group.decoded)
        if teacher is None:
            distances.append(pyramid(made, real))
            continue
        # To and from the teacher's device, a few pictures at a time: its features are large.
        for a, b in zip(real.split(8), made.split(8), strict=True):
            a, b = (part.to(next(teacher.buffers()).device) for part in (a, b))
            distances.append(feature_distance(teacher, b, a).cpu())
            real_features.append(teacher.pooled(a).cpu())
            made_features.append(teacher.pooled(b).cpu())
    found: dict[str, Any] = {
        "perceptual_distance": round(float(torch.cat(distances).mean()), 6),
        "perceptual_measure": "pyramid" if teacher is None else "teacher features",
    }
    if real_features and sum(len(part) for part in real_features) > 1:
        fid = frechet_distance(torch.cat(real_features), torch.cat(made_features))
        found["reconstruction_fid"] = round(fid, 6)
    return found


def _unit_range(pixels_NHW3: torch.Tensor) -> torch.Tensor:
    return (pixels_NHW3.float() / 127.5 - 1.0).permute(0, 3, 1, 2)
