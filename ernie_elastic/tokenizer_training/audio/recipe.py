"""`train-tokenizer audio --data`: what the neural audio codec needs of the stage.

Shape letters: N sounds, L samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ernie_elastic.errors import ConfigError
from ernie_elastic.schema import SegmentKind
from ernie_elastic.tokenizer_training.audio.health import codec_health
from ernie_elastic.tokenizer_training.audio.seanet import SeanetTrainee, SeanetTrainingConfig
from ernie_elastic.tokenizer_training.media_batches import Crop, Records, wave_crop
from ernie_elastic.tokenizer_training.report import SampleSheet
from ernie_elastic.tokenizer_training.train_on_data import DataRun, held_out_pieces
from ernie_elastic.tokenizers.audio.seanet import SeanetAudioTokenizerConfig

MEASURED_SECONDS = 4.0  # of a held-out sound
SHOWN = 4


@dataclass(frozen=True)
class AudioRun(DataRun):
    """Train the neural audio codec. gain: smallest and largest factor that a training crop is multiplied with."""

    model: SeanetAudioTokenizerConfig = field(default_factory=SeanetAudioTokenizerConfig)
    training: SeanetTrainingConfig = field(default_factory=SeanetTrainingConfig)
    gain: tuple[float, float] = (0.5, 1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.gain
        if not 0 < low <= high < math.inf:
            raise ConfigError(f"train-tokenizer: gain {low} {high} must be the smaller factor, above 0, and the larger")


class AudioRecipe:
    """The `Recipe` of an `AudioRun`."""

    kind = "audio"
    media: tuple[SegmentKind, ...] = ("audio",)
    size: int | None = None

    def __init__(self, run: AudioRun) -> None:
        self.run = run
        self.sample_rate: int | None = run.model.sample_rate
        self.steps, self.batch_size = run.training.steps, run.training.batch_size

    def crop(self) -> Crop:
        """Crops float32 [L] of whole steps of codes."""
        steps = max(1, round(self.run.training.crop_seconds * self.run.model.sample_rate / self.run.model.step_samples))
        return wave_crop(steps * self.run.model.step_samples, self.run.gain)

    def trainee(self) -> SeanetTrainee:
        """The trainee; batches are float32 [N, L]. Raises CheckpointError when its teacher cannot be read."""
        return SeanetTrainee(self.run.model, self.run.training, self.run.seed)

    def finish(self, trainee: SeanetTrainee, held_out: Records, directory: Path) -> tuple[dict[str, Any], SampleSheet]:
        """Save the codec, measure it on held-out sounds, write pairs of WAV files and `samples.png`."""
        tokenizer, rate = trainee.tokenizer, self.run.model.sample_rate
        tokenizer.save(directory)
        limit = round(MEASURED_SECONDS * rate)
        pieces = held_out_pieces(
            held_out, self.media, lambda wave, *_: wave[:limit], self.run.health_items, self.run.seed
        )
        health = codec_health(tokenizer, pieces)
        sounds, pairs = [], []
        for number, wave in enumerate(pieces[: min(SHOWN, len(held_out))]):
            decoded = np.asarray(tokenizer.decode(tokenizer.encode(wave)))[: len(wave)]
            for which, samples in (("original", wave), ("decoded", decoded)):
                name = f"sample-{number}-{which}.wav"
                soundfile.write(directory / name, samples, rate, subtype="PCM_16")
                sounds.append((f"{number + 1}, {which}", name))
            pairs.append((wave, decoded))
        draw_spectra(pairs, rate, directory / "samples.png")
        return health, SampleSheet(
            "Held-out sounds: spectra of the original above the decoded one, and both to listen to.",
            picture="samples.png", sounds=tuple(sounds),
        )  # fmt: skip


def draw_spectra(pairs: list[tuple[np.ndarray, np.ndarray]], sample_rate: int, path: Path) -> None:
    """Save spectra of (original, decoded) sounds float32 [L] as one PNG: frequency in kHz over seconds, 80 dB range."""
    figure = Figure(figsize=(3.4 * len(pairs), 4.2), layout="constrained", facecolor="white")
    top = max(float(np.abs(_spectrum(wave, sample_rate)).max()) for wave, _ in pairs)
    for column, pair in enumerate(pairs):
        for row, wave in enumerate(pair):
            axes = figure.add_subplot(2, len(pairs), row * len(pairs) + column + 1)
            decibels = 20 * np.log10(np.maximum(np.abs(_spectrum(wave, sample_rate)), 1e-4 * top) / top)
            seconds = len(wave) / sample_rate
            axes.imshow(decibels, origin="lower", aspect="auto", extent=(0, seconds, 0, sample_rate / 2000), vmin=-80)
            axes.tick_params(labelsize=7)
            axes.set_title(f"{column + 1}, {('original', 'decoded')[row]}", fontsize=9, loc="left")
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=100)


def _spectrum(wave_L: np.ndarray, sample_rate: int) -> np.ndarray:
    window = torch.hann_window(round(0.025 * sample_rate))
    padded = torch.nn.functional.pad(torch.as_tensor(wave_L), (0, max(0, len(window) - len(wave_L))))
    hop = round(0.01 * sample_rate)
    return np.asarray(torch.stft(padded, len(window), hop, window=window, center=False, return_complex=True))
