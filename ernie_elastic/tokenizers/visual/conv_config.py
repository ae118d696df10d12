"""Sizes of the convolutional visual tokenizer, checked, and a function that fills them in.

Contract: a `ConvVisualTokenizerConfig` that exists can be built; what cannot is a ConfigError that names both values.
ours: all sizes, since the report gives none (section 2.2).

Letters: H/W pixels of a side, h/w latent grid, D bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ernie_elastic.errors import ConfigError
from ernie_elastic.tokenizers.visual.scale_schedules import ASPECT_RATIOS, Schedule, default_num_scales, scale_schedules

UNTRAINED_AMPLITUDE = 0.5  # of every scale, until training measures it


@dataclass(frozen=True)
class ConvVisualTokenizerConfig:
    """Sizes of the convolutional visual tokenizer; `conv_visual_config` fills in schedules and amplitudes.

    image_size: pixels of a side of the square picture. stride: pixels of a side of a latent cell, a power of two.
    temporal_stride: frames of a latent frame after the first one; 1 codes every frame alone (2-D convolutions).
    num_bits: D, bits of one position of one scale. bit_series: growing bit counts that decode, the last one D.
    schedules: scales (h, w) coarse to fine of every picture shape, the first one of the square picture.
    amplitudes: what a bit of each scale adds; measured in training.
    width: channels at multiplier 1. multipliers: of each level, log2(stride / stem) + 1 of them.
    blocks, decoder_blocks: residual blocks of a level. mid_blocks: more of them at the deepest level.
    stem: side of the pixel blocks that the first convolution reads. feature_norm: norms inside the residual blocks.
    unit_length: latents of length one per bit at every place. seed: of the start weights.
    Raises ConfigError for what cannot be.
    """

    image_size: int = 256
    stride: int = 16
    temporal_stride: int = 1
    num_bits: int = 32
    bit_series: tuple[int, ...] = (16, 32)
    schedules: tuple[Schedule, ...] = scale_schedules(16)
    amplitudes: tuple[float, ...] = (UNTRAINED_AMPLITUDE,) * default_num_scales(16)
    width: int = 64
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    blocks: int = 1
    decoder_blocks: int = 1
    mid_blocks: int = 1
    stem: int = 2
    feature_norm: bool = False
    unit_length: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        problem = self._layer_problem() or self._bit_problem() or self._schedule_problem()
        if problem:
            raise ConfigError(f"conv visual tokenizer: {problem}")

    def _layer_problem(self) -> str:
        if self.stem < 1 or self.stride < 2 * self.stem or bin(self.stride).count("1") + bin(self.stem).count("1") != 2:
            return f"stride {self.stride} and stem {self.stem} must be powers of two, stride at least twice the stem"
        if self.image_size < 1 or self.image_size % self.stride:
            return f"stride {self.stride} does not divide image_size {self.image_size}"
        if len(self.multipliers) != self.num_halvings + 1:
            return (
                f"multipliers {self.multipliers} name {len(self.multipliers)} levels; stride {self.stride} over stem "
                f"{self.stem} needs {self.num_halvings + 1}"
            )
        if self.temporal_stride not in (1, 2, 4) or self.temporal_stride > 2**self.num_halvings:
            return (
                f"temporal_stride {self.temporal_stride} is not one of 1, 2, 4, or more than 2 to the power of the "
                f"{self.num_halvings} halvings"
            )
        counts = (self.width, self.decoder_blocks, *self.multipliers)
        if min(counts) < 1 or min(self.blocks, self.mid_blocks) < 0:
            return (
                f"width {self.width}, multipliers {self.multipliers} and decoder_blocks {self.decoder_blocks} must be "
                f"at least 1, blocks {self.blocks} and mid_blocks {self.mid_blocks} at least 0"
            )
        if any(4 * before % after for before, after in zip(self.multipliers, self.multipliers[1:], strict=False)):
            return f"multipliers {self.multipliers}: 4 times each must be a multiple of the next one"
        return ""

    def _bit_problem(self) -> str:
        series = self.bit_series
        if self.num_bits < 1 or not series or series[-1] != self.num_bits or series[0] < 1:
            return f"bit_series {series} must start at 1 or more and end with num_bits {self.num_bits}"
        if list(series) != sorted(set(series)):
            return f"bit_series {series} must grow"
        return ""

    def _schedule_problem(self) -> str:
        if not self.schedules or not self.schedules[0] or tuple(self.schedules[0][-1]) != (self.grid, self.grid):
            return (
                f"the first schedule {self.schedules[:1]} must end with the square grid ({self.grid}, {self.grid}) = "
                "image_size / stride"
            )
        for schedule in self.schedules:
            if len(schedule) != len(self.amplitudes):
                return f"{len(self.amplitudes)} amplitudes but {len(schedule)} scales in schedule {schedule}"
            full = schedule[-1]
            if any(
                len(scale) != 2 or not all(1 <= a <= b for a, b in zip(scale, full, strict=True)) for scale in schedule
            ):
                return f"schedule {schedule} must have (h, w) pairs between 1 and its last grid {full}"
        grids = [tuple(schedule[-1]) for schedule in self.schedules]
        if len(set(grids)) != len(grids):
            return f"two schedules end with the same grid: {grids}"
        return ""

    @property
    def num_halvings(self) -> int:
        """Spatial halvings after the stem."""
        return (self.stride // self.stem).bit_length() - 1

    @property
    def time_strides(self) -> tuple[int, ...]:
        """Temporal stride of each halving; the deepest ones have it."""
        temporal = self.temporal_stride.bit_length() - 1
        return (1,) * (self.num_halvings - temporal) + (2,) * temporal

    @property
    def grid(self) -> int:
        """Cells of a side of the square picture's latent grid."""
        return self.image_size // self.stride

    @property
    def scales(self) -> Schedule:
        """The square picture's schedule."""
        return self.schedules[0]

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(H, W) in pixels of every schedule."""
        return tuple((rows * self.stride, columns * self.stride) for rows, columns in (s[-1] for s in self.schedules))

    @property
    def bits_per_picture(self) -> int:
        """Bits of all scales of the square picture."""
        return self.num_bits * sum(height * width for height, width in self.scales)


def conv_visual_config(
    image_size: int,
    stride: int = 16,
    num_bits: int = 32,
    aspect_ratios: Sequence[tuple[int, int]] = ASPECT_RATIOS,
    num_scales: int | None = None,
    **fields: Any,
) -> ConvVisualTokenizerConfig:
    """A config whose schedules, amplitudes, bit_series and multipliers fit the sizes given, unless `fields` has them.

    aspect_ratios: (height, width), beside the square. Raises ConfigError for what cannot be.
    """
    schedules = scale_schedules(max(1, image_size // max(1, stride)), aspect_ratios, num_scales)
    levels = max(1, (stride // max(1, fields.get("stem", 2))).bit_length())
    filled: dict[str, Any] = {
        "schedules": schedules,
        "amplitudes": (UNTRAINED_AMPLITUDE,) * len(schedules[0]),
        "bit_series": (num_bits // 2, num_bits) if num_bits > 1 else (num_bits,),
        "multipliers": ((1, 2, 4) + (4,) * levels)[:levels],
    }
    return ConvVisualTokenizerConfig(image_size=image_size, stride=stride, num_bits=num_bits, **(filled | fields))
