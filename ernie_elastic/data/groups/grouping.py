"""Token segments to a document: the sequence of groups that the model reads and predicts.

Letters: n positions, D bits, Q levels, M tokens of an item, h/w grid of a scale, F features. paper: figures 2 and 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from ernie_elastic.data.groups.augmentation import Augmentation, happens
from ernie_elastic.data.groups.layout import IGNORE, Document, Layout, scale_positions, scale_weight
from ernie_elastic.data.groups.tokens import Tokens
from ernie_elastic.errors import DataError
from ernie_elastic.schema import TASK_ID
from ernie_elastic.tokenizers.quantizers import ScaleCodes

LARGEST = 65504.0  # of float16, in which shards keep features


def build_document(
    parts: Sequence[Tokens],
    layout: Layout,
    augmentation: Augmentation | None = None,
    generator: torch.Generator | None = None,
    opener: int | None = None,
) -> Document:
    """The document of `parts`: BOS, then every segment between its markers, targets where role is "target".

    augmentation with generator is what training does to a document (flips re-quantise visual targets against flipped
    histories). opener: a marker to end a prompt with (BOI, BOV, BOA), after which the model generates. Raises DataError
    for an unknown kind, for parts that this layout cannot read, and for values that are not finite: one NaN would reach
    every document of its row.
    """
    builder = DocumentBuilder(layout, augmentation or Augmentation(flips=None, speaker_dropout=0.0), generator)
    builder.text(layout.special.bos)
    visual_target = any(part.kind in ("image", "video") and part.role == "target" for part in parts)
    unconditional = visual_target and happens(builder.augmentation.condition_dropout, generator)
    for part in parts:
        if unconditional and part.kind == "text" and part.role == "input":
            continue
        builder.add(part)
    if opener is not None:
        builder.text(opener)
    elif parts and parts[-1].role == "target":
        builder.predict_text(layout.special.eos)
    return builder.finish()


@dataclass
class DocumentBuilder:
    """Appends segments position by position; `finish` gives the document."""

    layout: Layout
    augmentation: Augmentation
    generator: torch.Generator | None = None
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
    sounds: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    speakers: list[tuple[torch.Tensor, int]] = field(default_factory=list)
    clip: list[tuple[int, int, bool]] = field(default_factory=list)
    bits: list[torch.Tensor] = field(default_factory=list)
    bit_index: list[int] = field(default_factory=list)
    bit_weight: list[float] = field(default_factory=list)
    next_group: int = 0
    next_position: int = 0
    num_clips: int = 0

    def add(self, part: Tokens) -> None:
        """Append one segment. Raises DataError for an unknown kind or role, and for values that cannot be read."""
        if part.role not in ("input", "target"):
            raise DataError(f"segment role {part.role!r} is not one of input, target")
        if part.kind == "text":
            self.add_text(part)
        elif part.kind == "audio":
            self.add_audio(part)
        elif part.kind not in ("image", "video"):
            raise DataError(f"segment kind {part.kind!r} is not one of text, image, video, audio")
        elif part.role == "input":
            self.add_understanding(part)
        else:
            self.add_visual(part.kind, self._scale_codes(part))

    def _scale_codes(self, part: Tokens) -> ScaleCodes:
        active = self.augmentation.active_bits or self.layout.active_bits
        if part.scale_codes is not None:
            codes = part.scale_codes
        else:
            latents = finite(part.latents, f"latents of a generated {part.kind}")
            quantizer, flips, rates = self.layout.quantizer, self.augmentation.flips, None
            if not len(latents) or latents.shape[1:] != (*quantizer.grid, self.layout.num_bits):
                raise DataError(
                    f"latents of a generated {part.kind} have shape {tuple(latents.shape)}; this model draws "
                    f"[frames, {quantizer.grid[0]}, {quantizer.grid[1]}, {self.layout.num_bits}]"
                )
            if flips is not None and self.generator is not None:
                rates = flips.rates(len(latents), len(quantizer.scales), self.generator)
            codes = quantizer.encode(latents, rates, self.generator)
        return codes.first_bits(active) if active else codes

    def _append(
        self,
        text_id: int,
        position: tuple[float, float, float],
        task: str,
        clip: tuple[int, int, bool] = (-1, 0, False),
    ) -> int:
        self.text_ids.append(text_id)
        self.clip.append(clip)
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
        """Append one text position; its index."""
        index = self._append(token, self._running(), task)
        self.next_group += 1
        return index

    def predict_text(self, token: int) -> None:
        """Make `token` the text target of the last position."""
        self.text_targets[len(self.text_ids) - 1] = token

    def add_text(self, part: Tokens) -> None:
        """Text: one token a group."""
        assert part.ids is not None
        _check_range(part.ids, self.layout.vocab_size, "text ids")
        for token in part.ids.tolist():
            if part.role == "target":
                self.predict_text(token)
            self.text(token)

    def add_audio(self, part: Tokens) -> None:
        """A sound: one 80 ms step a group, a speaker before it when the layout has one."""
        if part.codes is None:
            raise DataError("an audio segment needs the codes of the audio tokenizer")
        if part.codes.ndim != 2 or part.codes.shape[1] != self.layout.num_levels:
            raise DataError(
                f"audio codes have shape {part.codes.shape}; this model has [steps, {self.layout.num_levels}]"
            )
        _check_range(part.codes, self.layout.codebook_size, "audio codes")
        target = part.role == "target"
        task = "audio_generation" if target else "audio_understanding"
        if target:
            self._speaker(part, task)
            self.predict_text(self.layout.special.boa)
        last = self.text(self.layout.special.boa, task if target else "text")
        continuous = self.layout.continuous_audio and not target
        indices = []
        for step in part.codes.astype(np.int64):
            if target:
                self.next_codes[last] = step
            last = self._append(-1, self._running(), task)
            indices.append(last)
            if not continuous:
                self.codes[last] = step
            self.next_group += 1
        if continuous:
            features = finite(part.features, "features of a sound that is read")
            if features.shape != (len(indices), self.layout.feature_size):
                raise DataError(
                    f"features of a sound have shape {tuple(features.shape)}; its {len(indices)} steps need "
                    f"[{len(indices)}, {self.layout.feature_size}]; make them with the model's audio tokenizer"
                )
            self.sounds.append((features, torch.tensor(indices, dtype=torch.int64)))
        if target:
            end = np.full(self.layout.num_levels, -1, dtype=np.int64)
            end[0] = self.layout.codebook_size
            self.next_codes[last] = end
        self.text(self.layout.special.eoa)

    def _speaker(self, part: Tokens, task: str) -> None:
        """The voice to speak with, one position before BOA. paper: section 2.6; left out at times (ours)."""
        size = self.layout.speaker_size
        if part.speaker is None or not size or happens(self.augmentation.speaker_dropout, self.generator):
            return
        vector = finite(part.speaker, "a speaker embedding")
        if vector.shape != (size,):
            raise DataError(f"a speaker embedding has shape {tuple(vector.shape)}; this model reads [{size}]")
        index = self._append(-1, self._running(), task)
        self.speakers.append((vector, index))
        self.next_group += 1

    def add_understanding(self, part: Tokens) -> None:
        """A picture or clip that is read: one bidirectional group, no loss."""
        if part.pixels is None or part.latents is None:
            raise DataError(f"an understanding {part.kind} needs pixels and the visual tokenizer's latents")
        if not len(part.pixels):
            raise DataError(f"an understanding {part.kind} has no frames")
        video = part.kind == "video"
        self.text(self.layout.special.bov if video else self.layout.special.boi)
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
        features = finite(part.latents, f"features of a {part.kind} that is read")
        self.media.append((pixels, features, torch.tensor(indices)))
        self.text(self.layout.special.eov if video else self.layout.special.eoi)

    def add_visual(self, kind: str, codes: ScaleCodes) -> None:
        """A drawn picture or clip: one scale of one frame a group, S_S after each frame."""
        video, layout = kind == "video", self.layout
        task = f"{kind}_generation"
        special = layout.special
        opener, closer = (special.bov, special.eov) if video else (special.boi, special.eoi)
        self.predict_text(opener)
        last = self.text(opener, task)
        frames, offset = len(codes.total), self.next_position
        clip = self.num_clips if video else -1
        self.num_clips += video
        # Frame 0 has S_S of frame 0 as its successor's first scale, so S_S counts to the frame that it opens.
        hidden = [video and happens(self.augmentation.frame_drop, self.generator) for _ in range(frames)] + [False]
        for frame in range(frames):
            place, opens = (clip, frame, hidden[frame]), (clip, frame + 1, hidden[frame + 1])
            self._bits([last], codes.targets[0][frame], 0)
            for scale in range(1, len(layout.quantizer.scales)):
                inputs = codes.inputs[scale]
                assert inputs is not None
                indices = self._scale(inputs[frame], scale, scale, offset, frame, task, place)
                self._bits(indices, codes.targets[scale][frame], scale)
            closing = len(layout.quantizer.scales)
            if layout.full_scale:
                self._scale(codes.total[frame], closing - 1, closing + 1, offset, frame, task, place)
            pooled = layout.quantizer.down(codes.total[frame : frame + 1], 0)[0]
            last = self._scale(pooled, 0, closing, offset, frame, task, opens)[-1]
            closed = frame + 1 == frames
            self.predict_text(closer if closed else special.next_frame)
        self.next_position = offset + max(frames, *layout.quantizer.grid)
        self.text(closer)

    def _scale(
        self,
        feature_hwD: torch.Tensor,
        grid: int,
        index: int,
        offset: int,
        frame: int,
        task: str,
        place: tuple[int, int, bool],
    ) -> list[int]:
        """Positions on the grid of a scale; index: row of the scale embedding."""
        indices = []
        for h, w in scale_positions(self.layout.quantizer, grid):
            indices.append(self._append(-1, (float(offset + frame), offset + h, offset + w), task, place))
            self.visual_scale.append(index)
        self.visual_index.extend(indices)
        self.visual.append(feature_hwD.reshape(-1, feature_hwD.shape[-1]))
        self.next_group += 1
        return indices

    def _bits(self, indices: list[int], target_hwD: torch.Tensor, scale: int) -> None:
        self.bits.append(target_hwD.reshape(-1, target_hwD.shape[-1]))
        self.bit_index.extend(indices)
        self.bit_weight.extend([scale_weight(self.layout.quantizer, scale)] * len(indices))

    def finish(self) -> Document:
        """The document of what was appended."""
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
            sounds=self.sounds,
            speakers=self.speakers,
            group=torch.tensor(self.group, dtype=torch.int32),
            clip=torch.tensor([clip for clip, _, _ in self.clip], dtype=torch.int32),
            frame=torch.tensor([frame for _, frame, _ in self.clip], dtype=torch.int32),
            dropped=torch.tensor([dropped for _, _, dropped in self.clip], dtype=torch.bool),
            position=torch.tensor(self.position, dtype=torch.float32),
            task=torch.tensor(self.task, dtype=torch.int8),
            text_targets=text_targets,
            next_codes=next_codes,
            bit_targets=torch.cat(self.bits) if self.bits else empty,
            bit_index=torch.tensor(self.bit_index, dtype=torch.int64),
            bit_weight=torch.tensor(self.bit_weight, dtype=torch.float32),
            next_position=self.next_position,
            active_bits=self.augmentation.active_bits or self.layout.active_bits,
            feature_size=self.layout.feature_size,
            speaker_size=self.layout.speaker_size,
        )


def _check_range(values: np.ndarray, limit: int, what: str) -> None:
    if values.size and (values.min() < 0 or (limit and values.max() >= limit)):
        wrong = int(values.min() if values.min() < 0 else values.max())
        raise DataError(f"{what} hold {wrong}; they must lie in 0..{limit - 1}: made by another tokenizer?")


def finite(array: np.ndarray | None, what: str) -> torch.Tensor:
    """float32 tensor of an array of any shape; DataError when it is missing, or holds NaN, infinity or values beyond
    those of float16: these overflow in the model, and a NaN reaches every document of its row."""
    if array is None:
        raise DataError(f"{what} are missing")
    tensor = torch.from_numpy(np.asarray(array, dtype=np.float32))
    usable = tensor.isfinite() & (tensor.abs() <= LARGEST)
    if not bool(usable.all()):
        bad, limit = int((~usable).sum()), f"{LARGEST:,.0f}"
        raise DataError(
            f"{what} hold {bad} values that are NaN or infinite or beyond {limit}, of {tensor.numel()}; drop the record"
        )
    return tensor
