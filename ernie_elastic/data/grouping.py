"""Token segments to a document: the sequence of groups that the model reads and predicts.

A group is what is predicted in one step: one text token, one scale of one frame, one 80 ms audio step, or a whole
understanding input. Letters: n positions, D bits, Q levels, M tokens of an item. paper: figures 2 and 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from ernie_elastic.data.tokens import Tokens
from ernie_elastic.errors import DataError
from ernie_elastic.schema import TASK_ID
from ernie_elastic.tokenizers.quantizers import MultiScaleBits, ScaleCodes

IGNORE = -100


@dataclass(frozen=True)
class Layout:
    """Everything that fixes a document's shape; made from the model's config."""

    bos: int
    eos: int
    boi: int
    eoi: int
    bov: int
    eov: int
    boa: int
    eoa: int
    next_frame: int
    quantizer: MultiScaleBits
    num_bits: int
    num_levels: int
    codebook_size: int
    understanding_grid: int
    frames_per_token: int = 4

    def frame_length(self) -> int:
        """Positions that one generated frame adds after its opener: scales 2..K and S_S."""
        return sum(h * w for h, w in self.quantizer.scales[1:]) + 1

    def understanding_length(self, num_frames: int) -> int:
        """Tokens of an understanding input."""
        return self.understanding_grid**2 * max(1, num_frames // self.frames_per_token)


@dataclass(frozen=True)
class Flips:
    """History bit flips while training: each scale draws a rate in [0, max_rate], each bit flips with it.

    paper: section 2.4 (self-correction); peer value 0.3 for photographs, ours smaller for tiny pictures.
    """

    max_rate: float = 0.1

    def rates(self, num_frames: int, num_scales: int, generator: torch.Generator) -> torch.Tensor:
        """float32 [F, num_scales]."""
        return torch.rand((num_frames, num_scales), generator=generator) * self.max_rate


@dataclass
class Document:
    """One document as flat tensors; the fields are those of `schema.PackedBatch`, without rows."""

    text_ids: torch.Tensor
    audio_codes: torch.Tensor
    visual_inputs: torch.Tensor
    visual_index: torch.Tensor
    visual_scale: torch.Tensor
    media: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    group: torch.Tensor
    position: torch.Tensor
    task: torch.Tensor
    text_targets: torch.Tensor
    next_codes: torch.Tensor
    bit_targets: torch.Tensor
    bit_index: torch.Tensor
    bit_weight: torch.Tensor
    next_position: int = 0

    def __len__(self) -> int:
        return len(self.text_ids)


def document_length(parts: Sequence[Tokens], layout: Layout) -> int:
    """Positions of the document that `build_document` makes of `parts`, without making it."""
    total = 1
    for part in parts:
        size = len(part)
        if part.kind == "text":
            total += size
        elif part.kind == "audio":
            total += size + 2
        elif part.role == "input":
            total += layout.understanding_length(size) + 2
        else:
            total += size * layout.frame_length() + 2
    return total


def build_document(
    parts: Sequence[Tokens],
    layout: Layout,
    flips: Flips | None = None,
    generator: torch.Generator | None = None,
    opener: int | None = None,
) -> Document:
    """The document of `parts`: BOS, then every segment between its markers, targets where role is "target".

    flips with generator re-quantise visual targets against flipped histories. opener: a marker to end a prompt with
    (BOI, BOV, BOA), after which the model generates. Raises DataError for an unknown kind.
    """
    builder = _Builder(layout)
    builder.text(layout.bos)
    for part in parts:
        if part.kind == "text":
            builder.add_text(part)
        elif part.kind == "audio":
            builder.add_audio(part)
        elif part.kind in ("image", "video"):
            if part.role == "input":
                builder.add_understanding(part)
            elif part.scale_codes is not None:
                builder.add_visual(part.kind, part.scale_codes)
            else:
                assert part.latents is not None
                latents = torch.from_numpy(part.latents.astype(np.float32))
                rates = None
                if flips is not None and generator is not None:
                    rates = flips.rates(len(latents), len(layout.quantizer.scales), generator)
                builder.add_visual(part.kind, layout.quantizer.encode(latents, rates, generator))
        else:
            raise DataError(f"segment kind {part.kind!r} is not one of text, image, video, audio")
    if opener is not None:
        builder.text(opener)
    elif parts and parts[-1].role == "target":
        builder.predict_text(layout.eos)
    return builder.finish()


@dataclass
class _Builder:
    layout: Layout
    text_ids: list[int] = field(default_factory=list)
    codes: list[np.ndarray | None] = field(default_factory=list)
    group: list[int] = field(default_factory=list)
    position: list[tuple[float, float, float]] = field(default_factory=list)
    task: list[int] = field(default_factory=list)
    text_targets: dict[int, int] = field(default_factory=dict)
    next_codes: dict[int, np.ndarray] = field(default_factory=dict)
    visual: list[torch.Tensor] = field(default_factory=list)
    visual_index: list[int] = field(default_factory=list)
    visual_scale: list[int] = field(default_factory=list)
    media: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = field(default_factory=list)
    bits: list[torch.Tensor] = field(default_factory=list)
    bit_index: list[int] = field(default_factory=list)
    bit_weight: list[float] = field(default_factory=list)
    next_group: int = 0
    next_position: int = 0

    def _append(self, text_id: int, position: tuple[float, float, float], task: str) -> int:
        self.text_ids.append(text_id)
        self.codes.append(None)
        self.group.append(self.next_group)
        self.position.append(position)
        self.task.append(TASK_ID[task])
        return len(self.text_ids) - 1

    def _running(self) -> tuple[float, float, float]:
        # paper: section 1.3, text and audio use the running index on all three axes.
        self.next_position += 1
        return (float(self.next_position - 1),) * 3

    def text(self, token: int, task: str = "text") -> int:
        index = self._append(token, self._running(), task)
        self.next_group += 1
        return index

    def predict_text(self, token: int) -> None:
        self.text_targets[len(self.text_ids) - 1] = token

    def add_text(self, part: Tokens) -> None:
        assert part.ids is not None
        for token in part.ids.tolist():
            if part.role == "target":
                self.predict_text(token)
            self.text(token)

    def add_audio(self, part: Tokens) -> None:
        assert part.codes is not None
        target = part.role == "target"
        task = "audio_generation" if target else "audio_understanding"
        if target:
            self.predict_text(self.layout.boa)
        last = self.text(self.layout.boa, task if target else "text")
        for step in part.codes.astype(np.int64):
            if target:
                self.next_codes[last] = step
            last = self._append(-1, self._running(), task)
            self.codes[last] = step
            self.next_group += 1
        if target:
            end = np.full(self.layout.num_levels, -1, dtype=np.int64)
            end[0] = self.layout.codebook_size
            self.next_codes[last] = end
        self.text(self.layout.eoa)

    def add_understanding(self, part: Tokens) -> None:
        if part.pixels is None or part.latents is None:
            raise DataError(f"an understanding {part.kind} needs pixels and the visual tokenizer's latents")
        video = part.kind == "video"
        self.text(self.layout.bov if video else self.layout.boi)
        frames, grid = len(part.pixels), self.layout.understanding_grid
        offset, indices = self.next_position, []
        for chunk in range(max(1, frames // self.layout.frames_per_token)):
            time = chunk * self.layout.frames_per_token + (self.layout.frames_per_token - 1) / 2 if video else 0.0
            for row in range(grid):
                for column in range(grid):
                    place = (offset + time, float(offset + row), float(offset + column))
                    indices.append(self._append(-1, place, "video_understanding" if video else "image_understanding"))
        # ours: the report does not separate the two paths; the whole input is one bidirectional group.
        self.next_group += 1
        self.next_position = offset + max(frames, grid)
        pixels = torch.from_numpy(np.ascontiguousarray(part.pixels))
        features = torch.from_numpy(part.latents.astype(np.float32))
        self.media.append((pixels, features, torch.tensor(indices)))
        self.text(self.layout.eov if video else self.layout.eoi)

    def add_visual(self, kind: str, codes: ScaleCodes) -> None:
        video, layout = kind == "video", self.layout
        task = f"{kind}_generation"
        self.predict_text(layout.bov if video else layout.boi)
        last = self.text(layout.bov if video else layout.boi, task)
        frames, offset = len(codes.total), self.next_position
        for frame in range(frames):
            self._bits([last], codes.targets[0][frame], 0)
            for scale in range(1, len(layout.quantizer.scales)):
                inputs = codes.inputs[scale]
                assert inputs is not None
                self._bits(self._scale(inputs[frame], scale, offset, frame, task), codes.targets[scale][frame], scale)
            pooled = layout.quantizer.down(codes.total[frame : frame + 1], 0)[0]
            last = self._scale(pooled, 0, offset, frame, task, closing=True)[-1]
            closed = frame + 1 == frames
            self.predict_text(layout.next_frame if not closed else layout.eov if video else layout.eoi)
        self.next_position = offset + max(frames, *layout.quantizer.grid)
        self.text(layout.eov if video else layout.eoi)

    def _scale(
        self, feature_hwD: torch.Tensor, scale: int, offset: int, frame: int, task: str, closing: bool = False
    ) -> list[int]:
        indices = []
        for h, w in scale_positions(self.layout.quantizer, scale):
            index = self._append(-1, (float(offset + frame), offset + h, offset + w), task)
            self.visual_scale.append(len(self.layout.quantizer.scales) if closing else scale)
            indices.append(index)
        self.visual_index.extend(indices)
        self.visual.append(feature_hwD.reshape(-1, feature_hwD.shape[-1]))
        self.next_group += 1
        return indices

    def _bits(self, indices: list[int], target_hwD: torch.Tensor, scale: int) -> None:
        self.bits.append(target_hwD.reshape(-1, target_hwD.shape[-1]))
        self.bit_index.extend(indices)
        self.bit_weight.extend([scale_weight(self.layout.quantizer, scale)] * len(indices))

    def finish(self) -> Document:
        size, levels = len(self.text_ids), self.layout.num_levels
        codes = torch.full((size, levels), -1, dtype=torch.int64)
        next_codes = torch.full((size, levels), -1, dtype=torch.int64)
        text_targets = torch.full((size,), IGNORE, dtype=torch.int64)
        for index, step in enumerate(self.codes):
            if step is not None:
                codes[index] = torch.from_numpy(step)
        for index, step in self.next_codes.items():
            next_codes[index] = torch.from_numpy(step)
        for index, token in self.text_targets.items():
            text_targets[index] = token
        empty = torch.zeros((0, self.layout.num_bits))
        return Document(
            text_ids=torch.tensor(self.text_ids),
            audio_codes=codes,
            visual_inputs=torch.cat(self.visual) if self.visual else empty,
            visual_index=torch.tensor(self.visual_index, dtype=torch.int64),
            visual_scale=torch.tensor(self.visual_scale, dtype=torch.int64),
            media=self.media,
            group=torch.tensor(self.group, dtype=torch.int32),
            position=torch.tensor(self.position, dtype=torch.float32),
            task=torch.tensor(self.task, dtype=torch.int8),
            text_targets=text_targets,
            next_codes=next_codes,
            bit_targets=torch.cat(self.bits) if self.bits else empty,
            bit_index=torch.tensor(self.bit_index, dtype=torch.int64),
            bit_weight=torch.tensor(self.bit_weight, dtype=torch.float32),
            next_position=self.next_position,
        )


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
