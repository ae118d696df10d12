"""What fixes the shape of a document, and the document itself: the sequence of groups as flat tensors.

A group is what is predicted in one step: one text token, one scale of one frame, one 80 ms audio step, or a whole
understanding input. Letters: n positions, D bits, Q levels, M tokens of an item. paper: figures 2 and 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ernie_elastic.data.groups.tokens import Tokens
from ernie_elastic.tokenizers.quantizers import MultiScaleBits
from ernie_elastic.tokenizers.text.special import SpecialTokens

IGNORE = -100


@dataclass(frozen=True)
class Layout:
    """Everything that fixes a document's shape; made from the model's config.

    full_scale: a finished frame is read once more at full resolution. active_bits: 0 = all. continuous_audio: sounds
    are read as feature_size features a step instead of codes. speaker_size: length of a speaker embedding, 0 = none.
    vocab_size: text ids lie below it, 0 = not known.
    """

    special: SpecialTokens
    quantizer: MultiScaleBits
    num_bits: int
    num_levels: int
    codebook_size: int
    understanding_grid: int
    frames_per_token: int = 4
    full_scale: bool = False
    active_bits: int = 0
    continuous_audio: bool = False
    speaker_size: int = 0
    feature_size: int = 0
    vocab_size: int = 0

    def sizes(self) -> dict[str, Any]:
        """What decides how long documents are; rows that were packed for other sizes may not fit."""
        return {
            "frame_length": self.frame_length(),
            "understanding_grid": self.understanding_grid,
            "frames_per_token": self.frames_per_token,
            "has_speakers": self.speaker_size > 0,
        }

    def frame_length(self) -> int:
        """Positions that one generated frame adds after its opener: scales 2..K, the full group if any, and S_S."""
        (first_h, first_w), (height, width) = self.quantizer.scales[0], self.quantizer.grid
        full = height * width if self.full_scale else 0
        return sum(h * w for h, w in self.quantizer.scales[1:]) + full + first_h * first_w

    def understanding_length(self, num_frames: int) -> int:
        """Tokens of an understanding input."""
        return self.understanding_grid**2 * max(1, num_frames // self.frames_per_token)


@dataclass
class Document:
    """One document as flat tensors; the fields are those of `schema.PackedBatch`, without rows."""

    text_ids: torch.Tensor
    audio_codes: torch.Tensor
    visual_inputs: torch.Tensor
    visual_index: torch.Tensor
    visual_scale: torch.Tensor
    media: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    sounds: list[tuple[torch.Tensor, torch.Tensor]]
    speakers: list[tuple[torch.Tensor, int]]
    group: torch.Tensor
    clip: torch.Tensor
    frame: torch.Tensor
    dropped: torch.Tensor
    position: torch.Tensor
    task: torch.Tensor
    text_targets: torch.Tensor
    next_codes: torch.Tensor
    bit_targets: torch.Tensor
    bit_index: torch.Tensor
    bit_weight: torch.Tensor
    next_position: int = 0
    active_bits: int = 0
    feature_size: int = 0
    speaker_size: int = 0

    def __len__(self) -> int:
        return len(self.text_ids)


def document_length(parts: Sequence[Tokens], layout: Layout) -> int:
    """Positions of the document that `build_document` makes of `parts`, without making it."""
    return 1 + sum(part_length(part, layout) for part in parts)


def part_length(part: Tokens, layout: Layout) -> int:
    """Positions that a segment adds to its document, its markers counted."""
    size = len(part)
    if part.kind == "text":
        return size
    if part.kind == "audio":
        return size + 2 + _has_speaker(part, layout)
    if part.role == "input":
        return layout.understanding_length(size) + 2
    return size * layout.frame_length() + 2


def _has_speaker(part: Tokens, layout: Layout) -> bool:
    return part.speaker is not None and part.role == "target" and layout.speaker_size > 0


def scale_positions(quantizer: MultiScaleBits, scale: int) -> list[tuple[float, float]]:
    """(h, w) of every cell of a scale, aligned on the cell's centre in units of the finest grid.

    ours: h = (i + 0.5) * H / H_k - 0.5; the report says centre-aligned and gives no formula.
    """
    rows, columns = quantizer.scales[scale]
    height, width = quantizer.grid
    return [
        ((i + 0.5) * height / rows - 0.5, (j + 0.5) * width / columns - 0.5)
        for i in range(rows)
        for j in range(columns)
    ]


def scale_weight(quantizer: MultiScaleBits, scale: int) -> float:
    """Loss weight of each position of a scale: 1/sqrt(area), normalised to sum 1 over a frame.

    paper: section 2.4 asks for coarse emphasis without a formula; ours: the one of Infinity.
    """
    areas = [h * w for h, w in quantizer.scales]
    total = sum(area / area**0.5 for area in areas)
    return float(1.0 / areas[scale] ** 0.5 / total)
