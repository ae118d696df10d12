"""Pictures and clips, one scale of one frame a step, with guidance and the frame decisions of the text head.

Letters: B rows (with guidance 2B run: conditional ones, then unconditional ones), F frames, H/W finest grid, h/w grid
of a scale, D bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ernie_elastic.data.groups.layout import scale_positions
from ernie_elastic.errors import ConfigError
from ernie_elastic.generation.decoder import GroupDecoder
from ernie_elastic.modeling.outputs import StackOutput


@torch.inference_mode()
def decode_visual(decoder: GroupDecoder, video: bool, close: bool = False) -> list[torch.Tensor]:
    """Accumulated features of each row's frames: float32 [F, H, W, D]; an image has one frame.

    close: also read the last S_S and leave the decoder ready for the marker that ends the picture (rows must then end
    together: one row). Raises ConfigError for a model without bits.
    """
    if decoder.model.model.visual is None:
        raise ConfigError("this model draws nothing: visual_bits is 0")
    drawing = _Drawing(decoder, video)
    embedded, position = decoder.first_group()
    clip = decoder.next_clip if video else -1
    decoder.next_clip += 1
    out = decoder.step(embedded, position, drawing.task, active_B=drawing.running(), clip=(-1, 0))
    limit = decoder.sampling.max_frames if video else 1
    frames, counts_B = [], torch.zeros_like(drawing.active_B, dtype=torch.int64)
    for frame in range(limit):
        frames.append(drawing.frame(out, frame, clip))
        counts_B += drawing.active_B
        if frame + 1 == limit and not close:
            break
        # S_S is read once: its text logits decide, its bit logits start the next frame.
        out = drawing.close_frame(frames[-1], frame, clip)
        if video:
            logits_BV = decoder.model.lm_head(out.hidden[: drawing.rows, -1])
            layout = decoder.layout
            goes_on = logits_BV[:, layout.special.next_frame] >= logits_BV[:, layout.special.eov]
            drawing.active_B = drawing.active_B & goes_on
        if frame + 1 == limit or not bool(drawing.active_B.any()):
            break
    if close:
        decoder.next_position = decoder.next_position + max(len(frames), *decoder.layout.quantizer.grid)
    stacked = torch.stack(frames, dim=1)
    return [stacked[row, : int(counts_B[row])] for row in range(drawing.rows)]


@dataclass
class _Drawing:
    """What stays the same over the frames of a drawing."""

    decoder: GroupDecoder
    video: bool

    def __post_init__(self) -> None:
        run = len(self.decoder.next_position)
        self.guidance = self.decoder.sampling.guidance
        if self.guidance is not None and run % 2:
            raise ConfigError(f"guidance needs an unconditional row for each prompt; {run} rows cannot be halved")
        self.copies = 1 if self.guidance is None else 2
        self.rows = run // self.copies
        self.active_B = torch.ones(self.rows, dtype=torch.bool, device=self.decoder.device)
        self.offset_B = self.decoder.next_position.float()
        self.task = "video_generation" if self.video else "image_generation"
        # Positions depend on the scale alone; made once for all frames.
        quantizer = self.decoder.layout.quantizer
        self.places = [
            torch.tensor(scale_positions(quantizer, scale), device=self.decoder.device)
            for scale in range(len(quantizer.scales))
        ]

    def running(self) -> torch.Tensor:
        """Which of the rows that run are active, bool [copies * B]."""
        return self.active_B.repeat(self.copies)

    def frame(self, out: StackOutput, frame: int, clip: int) -> torch.Tensor:
        """All scales of one frame, the first one from `out`: the accumulated feature float32 [B, H, W, D]."""
        decoder, layout = self.decoder, self.decoder.layout
        quantizer, visual = layout.quantizer, decoder.model.model.visual
        assert visual is not None
        total = torch.zeros((self.rows, *quantizer.grid, layout.num_bits), device=decoder.device)
        for scale, grid in enumerate(quantizer.scales):
            if scale:
                group = self._embed(quantizer.down(total, scale), scale, scale, frame)
                out = decoder.step(*group, self.task, active_B=self.running(), clip=(clip, frame))
            logits = self._guide(visual.bit_head(out.hidden), scale, frame)
            total = total + quantizer.contribution(decoder.choose_bits(logits).unflatten(1, grid), scale)
            if layout.active_bits:
                total[..., layout.active_bits :] = 0.0
        return total

    def close_frame(self, total: torch.Tensor, frame: int, clip: int) -> StackOutput:
        """Read the finished frame: at full resolution where the layout has that group, then S_S, whose output it is."""
        decoder, quantizer = self.decoder, self.decoder.layout.quantizer
        closing = len(quantizer.scales)
        if decoder.layout.full_scale:
            group = self._embed(total, closing - 1, closing + 1, frame)
            decoder.step(*group, self.task, active_B=self.running(), clip=(clip, frame))
        group = self._embed(quantizer.down(total, 0), 0, closing, frame)
        return decoder.step(*group, self.task, active_B=self.running(), clip=(clip, frame + 1))

    def _guide(self, logits: torch.Tensor, scale: int, frame: int) -> torch.Tensor:
        if self.guidance is None:
            return logits
        conditional, unconditional = logits.chunk(2)
        frames = self.decoder.sampling.max_frames if self.video else 1
        value = self.guidance.value(scale, len(self.decoder.layout.quantizer.scales), frame, frames)
        return unconditional + value * (conditional - unconditional)

    def _embed(
        self, feature_BhwD: torch.Tensor, grid: int, index: int, frame: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embedding [copies * B, h * w, H] and position [copies * B, h * w, 3] on the grid of a scale."""
        visual, places = self.decoder.model.model.visual, self.places[grid]
        assert visual is not None
        flat = feature_BhwD.reshape(self.rows * len(places), -1)
        scale_N = torch.full((len(flat),), index, device=flat.device)
        # A gap between the rows, as between the pictures of a packed batch.
        order = torch.arange(len(flat) + self.rows, device=flat.device)
        index_N = order.view(self.rows, -1)[:, :-1].reshape(-1)
        embedded = visual(flat, scale_N, index_N).unflatten(0, (self.rows, -1)).repeat(self.copies, 1, 1)
        position = torch.nn.functional.pad(places, (1, 0), value=float(frame))
        return embedded, position[None] + self.offset_B[:, None, None]
