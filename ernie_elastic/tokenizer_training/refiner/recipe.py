"""`train-tokenizer refiner --data`: what the diffusion refiner needs of the stage.

Shape letters: N pictures, F frames, H/W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ernie_elastic.errors import ConfigError
from ernie_elastic.modeling.refiner import RefinerConfig
from ernie_elastic.schema import SegmentKind
from ernie_elastic.tokenizer_training.losses.perceptual import VisionTeacher
from ernie_elastic.tokenizer_training.media_batches import Crop, Records, picture_crop
from ernie_elastic.tokenizer_training.refiner.health import refiner_health, write_comparison
from ernie_elastic.tokenizer_training.refiner.train import RefinerTrainee, RefinerTrainingConfig
from ernie_elastic.tokenizer_training.report import SampleSheet
from ernie_elastic.tokenizer_training.train_on_data import DataRun, held_out_pieces
from ernie_elastic.tokenizers.visual.base import VisualTokenizer

SHOWN = 4


@dataclass(frozen=True)
class RefinerRun(DataRun):
    """Train the diffusion refiner on pictures and frames of clips.

    health_size: high-resolution pixels of a side of the held-out pieces that are measured, a multiple of the factor.
    teacher: directory of a Transformers vision model, for one more distance in the health report. smallest_crop, flip:
    as for the visual tokenizer.
    """

    model: RefinerConfig = field(default_factory=RefinerConfig)
    training: RefinerTrainingConfig = field(default_factory=RefinerTrainingConfig)
    health_size: int = 256
    teacher: Path | None = None
    smallest_crop: float = 0.1
    flip: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.smallest_crop <= 1:
            raise ConfigError(f"train-tokenizer: smallest_crop {self.smallest_crop} must lie in (0, 1]")
        if self.health_size < 1 or self.health_size % self.model.factor:
            raise ConfigError(
                f"train-tokenizer: health_size {self.health_size} is no multiple of the factor {self.model.factor}"
            )


class RefinerRecipe:
    """The `Recipe` of a `RefinerRun`."""

    kind = "refiner"
    media: tuple[SegmentKind, ...] = ("image", "video")
    sample_rate: int | None = None

    def __init__(self, run: RefinerRun) -> None:
        self.run = run
        self.steps, self.batch_size = run.training.steps, run.training.batch_size
        self.size: int | None = run.health_size

    def crop(self) -> Crop:
        """Square crops uint8 [1, H, W, 3] at the high resolution."""
        return self._square(self.run.training.crop, self.run.smallest_crop, self.run.flip)

    def _square(self, side: int, smallest: float, flip: bool) -> Crop:
        return picture_crop(lambda step: (side, side), lambda step: 1, smallest, flip)

    def trainee(self) -> RefinerTrainee:
        """The trainee; batches are uint8 [N, F, H, W, 3]. Raises CheckpointError when its tokenizer cannot be read."""
        return RefinerTrainee(self.run.model, self.run.training, self.run.seed)

    def finish(self, trainee: RefinerTrainee, held_out: Records, directory: Path) -> tuple[dict[str, Any], SampleSheet]:
        """Save the refiner, measure it beside bicubic and the plain decoder on held-out pieces, draw `samples.png`."""
        run, refiner = self.run, trainee.refiner
        refiner.save(directory)
        tokenizer = None if run.training.tokenizer is None else VisualTokenizer.load(run.training.tokenizer)
        teacher = None if run.teacher is None else VisionTeacher.load(run.teacher)
        crop = self._square(run.health_size, 1.0, False)
        pieces = [piece[0] for piece in held_out_pieces(held_out, self.media, crop, run.health_items, run.seed)]
        health = refiner_health(refiner, pieces, run.training.degradation, tokenizer, teacher, seed=run.seed)
        shown = pieces[: min(SHOWN, len(held_out))]
        write_comparison(directory / "samples.png", refiner, shown, run.training.degradation, tokenizer, seed=run.seed)
        return health, SampleSheet(
            "Held-out pictures: low resolution, bicubic, refined, original.", picture="samples.png"
        )
