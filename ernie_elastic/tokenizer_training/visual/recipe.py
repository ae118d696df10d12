"""`train-tokenizer visual --data`: what the convolutional tokenizer needs of the stage.

Shape letters: N pictures, F frames, H/W pixels, S scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ernie_elastic.errors import ConfigError
from ernie_elastic.schema import SegmentKind
from ernie_elastic.tokenizer_training.losses.perceptual import VisionTeacher
from ernie_elastic.tokenizer_training.media_batches import Crop, Records, picture_crop
from ernie_elastic.tokenizer_training.report import SampleSheet
from ernie_elastic.tokenizer_training.train_on_data import DataRun, held_out_pieces
from ernie_elastic.tokenizer_training.visual.conv import ConvVisualTrainee, ConvVisualTrainingConfig
from ernie_elastic.tokenizer_training.visual.health import conv_visual_health
from ernie_elastic.tokenizers.visual.conv import ConvVisualTokenizer, ConvVisualTokenizerConfig, conv_visual_config
from ernie_elastic.tokenizers.visual.scale_schedules import ASPECT_RATIOS

SHEET_PICTURES = 6
SHEET_SIDE = 160  # pixels of a picture on the sheet


@dataclass(frozen=True)
class VisualModel:
    """Sizes of the convolutional tokenizer; `ConvVisualTokenizerConfig` says what each is. aspect_ratios: (height,
    width) of the shapes beside the square; every shape has a scale schedule of its own. multipliers: None = 1, 2, 4, 4
    ... as many as the stride needs."""

    image_size: int = 256
    stride: int = 16
    temporal_stride: int = 1
    num_bits: int = 32
    bit_series: tuple[int, ...] = (16, 32)
    aspect_ratios: tuple[tuple[int, int], ...] = ASPECT_RATIOS
    num_scales: int | None = None
    width: int = 64
    blocks: int = 1
    decoder_blocks: int = 1
    mid_blocks: int = 1
    stem: int = 2
    multipliers: tuple[int, ...] | None = None
    feature_norm: bool = False
    unit_length: bool = False

    def config(self, seed: int) -> ConvVisualTokenizerConfig:
        """The tokenizer's config with schedules for all shapes. Raises ConfigError for sizes that do not fit."""
        levels = {} if self.multipliers is None else {"multipliers": self.multipliers}
        return conv_visual_config(
            self.image_size, self.stride, self.num_bits, self.aspect_ratios, self.num_scales,
            temporal_stride=self.temporal_stride, bit_series=self.bit_series, width=self.width, blocks=self.blocks,
            decoder_blocks=self.decoder_blocks, mid_blocks=self.mid_blocks, stem=self.stem, seed=seed,
            feature_norm=self.feature_norm, unit_length=self.unit_length, **levels,
        )  # fmt: skip


@dataclass(frozen=True)
class VisualRun(DataRun):
    """Train the convolutional visual tokenizer.

    init: a directory of a trained tokenizer to start from; a 2-D one (temporal stride 1) is inflated to this model's
    temporal stride (paper: section 2.2). clip_frames: frames of a training clip, 1 + a multiple of the temporal stride;
    1 trains on pictures (frames of clips too), otherwise every other step does. smallest_crop: smallest share of a
    picture that a crop has. flip: mirror every other crop.
    """

    model: VisualModel = field(default_factory=VisualModel)
    training: ConvVisualTrainingConfig = field(default_factory=ConvVisualTrainingConfig)
    init: Path | None = None
    clip_frames: int = 1
    smallest_crop: float = 0.1
    flip: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clip_frames < 1 or (self.clip_frames - 1) % self.model.temporal_stride:
            raise ConfigError(
                f"train-tokenizer: clip_frames {self.clip_frames} must be 1 + a multiple of the temporal stride "
                f"{self.model.temporal_stride}"
            )
        if not 0 < self.smallest_crop <= 1:
            raise ConfigError(f"train-tokenizer: smallest_crop {self.smallest_crop} must lie in (0, 1]")


class VisualRecipe:
    """The `Recipe` of a `VisualRun`."""

    kind = "visual"
    media: tuple[SegmentKind, ...] = ("image", "video")
    sample_rate: int | None = None

    def __init__(self, run: VisualRun) -> None:
        self.run = run
        self.config = run.model.config(run.seed)
        self.steps, self.batch_size = run.training.steps, run.training.batch_size
        self.size: int | None = run.model.image_size

    def crop(self) -> Crop:
        """Crops uint8 [F, H, W, 3] of every shape in turn, pictures and clips in turn."""
        sizes, clip = self.config.sizes, self.run.clip_frames
        return picture_crop(
            lambda step: sizes[step % len(sizes)],
            lambda step: clip if (step // len(sizes)) % 2 else 1,
            self.run.smallest_crop,
            self.run.flip,
        )

    def trainee(self) -> ConvVisualTrainee:
        """The trainee; batches are uint8 [N, F, H, W, 3]. Raises CheckpointError when `init` cannot be read."""
        return ConvVisualTrainee(self.config, self.run.training, self.run.seed, self.run.init)

    def finish(
        self, trainee: ConvVisualTrainee, held_out: Records, directory: Path
    ) -> tuple[dict[str, Any], SampleSheet]:
        """Save the tokenizer, measure it on the largest crops of held-out records, draw `samples.png`."""
        tokenizer, sizes = trainee.tokenizer, self.config.sizes
        tokenizer.save(directory)
        # Every record meets every size: in step with each other, a size would see one record only.
        size_of = lambda number: sizes[(number + number // len(held_out)) % len(sizes)]
        largest = picture_crop(size_of, lambda number: 1, 1.0, False)
        pieces = held_out_pieces(held_out, self.media, largest, self.run.health_items, self.run.seed)
        teacher = None if self.run.training.teacher is None else VisionTeacher.load(self.run.training.teacher)
        health = conv_visual_health(tokenizer, [piece[0] for piece in pieces], teacher)
        square = picture_crop(lambda number: sizes[0], lambda number: 1, 1.0, False)
        shown = held_out_pieces(held_out, self.media, square, min(SHEET_PICTURES, len(held_out)), self.run.seed)
        write_sheet(tokenizer, np.concatenate(shown), directory / "samples.png")
        return health, SampleSheet(
            "Held-out pictures. From the top: the original; the first scale of bits; half of the scales; all scales at "
            "the lowest bit count; everything.",
            picture="samples.png",
        )


@torch.no_grad()
def write_sheet(tokenizer: ConvVisualTokenizer, pixels_NHW3: np.ndarray, path: Path) -> None:
    """Rows of pictures uint8 [N, H, W, 3]: originals, coarse scales, all scales at the fewest bits, everything."""
    quantizer, config = tokenizer.quantizer, tokenizer.config
    codes = quantizer.encode(tokenizer.encode(pixels_NHW3))
    parts = torch.stack([quantizer.contribution(bits, scale) for scale, bits in enumerate(codes.targets)]).cumsum(0)
    rows = [pixels_NHW3]
    for feature in (parts[0], parts[len(parts) // 2 - 1], codes.first_bits(config.bit_series[0]).total, codes.total):
        rows.append(tokenizer.decode(feature).numpy())
    sheet_rows(rows, path)


def sheet_rows(rows: Sequence[np.ndarray], path: Path) -> None:
    """Save rows of pictures uint8 [N, H, W, 3] as one PNG, each about SHEET_SIDE pixels high."""
    sheet = np.concatenate([np.concatenate(list(row), axis=1) for row in rows])
    zoom = max(1, round(SHEET_SIDE / rows[0].shape[1]))
    Image.fromarray(sheet.repeat(zoom, axis=0).repeat(zoom, axis=1)).save(path)
