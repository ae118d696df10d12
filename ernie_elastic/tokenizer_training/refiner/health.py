"""What a refiner is worth: its pictures beside plain and bicubic enlargement, in numbers and to look at.

Contract: a function of (refiner, pictures, degradation, tokenizer, level, seed). Use pictures that it was not trained
on.

Shape letters: N pictures, H/W pixels.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ernie_elastic.data.media.degradation import DegradationConfig, degrade
from ernie_elastic.errors import ConfigError, DataError
from ernie_elastic.modeling.refiner import Refiner, bicubic
from ernie_elastic.stages import progress, write_atomic
from ernie_elastic.tokenizer_training.losses.perceptual import PyramidDistance, VisionTeacher, feature_distance
from ernie_elastic.tokenizers.visual.base import VisualTokenizer

SSIM_WINDOW = 11
SSIM_DEVIATION = 1.5  # pixels, of the Gaussian window (Wang et al. 2004)
SSIM_FLOORS = ((0.01 * 255) ** 2, (0.03 * 255) ** 2)
GAP = 4  # white pixels between the pictures of a comparison


@torch.no_grad()
def refiner_health(
    refiner: Refiner,
    pictures: Sequence[np.ndarray],
    degradation: DegradationConfig,
    tokenizer: VisualTokenizer | None = None,
    teacher: VisionTeacher | None = None,
    steps: Sequence[int] = (1, 4, 8, 20),
    level: float = 0.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Means over held-out pictures uint8 [H, W, 3] of any sizes, degraded at `level` (and coded by the tokenizer).

    Returns pictures, factor, level, temperature and rows: "plain" (each low-resolution pixel as a square), "bicubic",
    "refined, K steps" at the refiner's own temperature, and the last K at temperature 1. A row has psnr_db (of the mean
    squared error of each picture, then the mean), ssim (-1..1, of the brightness), pyramid_distance and, with a
    teacher, teacher_distance (both: less is closer). Raises DataError without pictures, or for one that cannot be
    degraded.
    """
    if not pictures:
        raise DataError("refiner health: no pictures to measure; give at least one that was held out")
    names = ["plain", "bicubic", *(f"refined, {count} step{'s' * (count > 1)}" for count in steps)]
    names.append(f"{names[-1]}, temperature 1")
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    pyramid = PyramidDistance()
    for number, picture in enumerate(progress(pictures, total=len(pictures), desc="refiner health", unit="picture")):
        true_1HW3, low = _pair(picture, refiner, degradation, tokenizer, level, seed + number)
        made = [_nearest(low, refiner.config.factor), bicubic(low, refiner.config.factor)]
        made += [refiner.refine(low, steps=count, seed=seed, level=level) for count in steps]
        made.append(refiner.refine(low, steps=steps[-1], seed=seed, level=level, temperature=1.0))
        for name, value in zip(names, made, strict=True):
            measured[name].append(_scores(value, true_1HW3, pyramid, teacher))
    rows = [
        {"case": name, **{key: round(float(np.mean([one[key] for one in found])), 4) for key in found[0]}}
        for name, found in measured.items()
    ]
    about = {"factor": refiner.config.factor, "level": level, "temperature": refiner.config.temperature}
    return {"pictures": len(pictures), **about, "rows": rows}


def write_comparison(
    path: Path,
    refiner: Refiner,
    pictures: Sequence[np.ndarray],
    degradation: DegradationConfig,
    tokenizer: VisualTokenizer | None = None,
    steps: int | None = None,
    level: float = 0.0,
    seed: int = 0,
) -> None:
    """Write a PNG with a row for each picture uint8 [H, W, 3]: low resolution | bicubic | refined | original.

    Smaller pictures have white beside them. Raises DataError as `refiner_health`, ConfigError for a name without .png.
    """
    if path.suffix != ".png":
        raise ConfigError(f"refiner comparison: {path} must end in .png")
    if not pictures:
        raise DataError("refiner comparison: no pictures to show; give at least one that was held out")
    strips = []
    for number, picture in enumerate(pictures):
        true_1HW3, low = _pair(picture, refiner, degradation, tokenizer, level, seed + number)
        refined = refiner.refine(low, steps=steps, seed=seed, level=level)
        cells = [_nearest(low, refiner.config.factor), bicubic(low, refiner.config.factor), refined, true_1HW3]
        white = np.full((true_1HW3.shape[1], GAP, 3), 255, dtype=np.uint8)
        parts = [part for cell in cells for part in (cell[0].numpy(), white)]
        strips.append(np.concatenate(parts[:-1], axis=1))
    width, height = max(strip.shape[1] for strip in strips), sum(len(strip) + GAP for strip in strips) - GAP
    sheet = np.full((height, width, 3), 255, dtype=np.uint8)
    top = 0
    for strip in strips:
        sheet[top : top + len(strip), : strip.shape[1]] = strip
        top += len(strip) + GAP
    write_atomic(path, _png(sheet))


def ssim(a_NHW3: torch.Tensor, b_NHW3: torch.Tensor) -> torch.Tensor:
    """float [N] in -1..1: structural similarity of the brightness of uint8 pictures [N, H, W, 3], 1 = the same.

    background: Wang et al. 2004, Gaussian window; a smaller one for pictures below 11 pixels. Raises DataError for
    different shapes.
    """
    if a_NHW3.shape != b_NHW3.shape or a_NHW3.ndim != 4:
        raise DataError(f"ssim: shapes {list(a_NHW3.shape)} and {list(b_NHW3.shape)}; expected one shape [N, H, W, 3]")
    weights = torch.tensor([0.299, 0.587, 0.114])
    a, b = ((pixels.cpu().float() @ weights)[:, None] for pixels in (a_NHW3, b_NHW3))
    side = min(SSIM_WINDOW, *a.shape[2:])
    places = torch.arange(side) - (side - 1) / 2
    taps = (-0.5 * (places / SSIM_DEVIATION).square()).exp()
    taps = taps / taps.sum()

    def mean(values: torch.Tensor) -> torch.Tensor:
        return F.conv2d(F.conv2d(values, taps.view(1, 1, -1, 1)), taps.view(1, 1, 1, -1))

    mean_a, mean_b = mean(a), mean(b)
    variance_a, variance_b = mean(a * a) - mean_a.square(), mean(b * b) - mean_b.square()
    covariance = mean(a * b) - mean_a * mean_b
    first, second = SSIM_FLOORS
    light = (2 * mean_a * mean_b + first) / (mean_a.square() + mean_b.square() + first)
    return (light * (2 * covariance + second) / (variance_a + variance_b + second)).mean(dim=(1, 2, 3))


def _pair(
    picture_HW3: np.ndarray,
    refiner: Refiner,
    degradation: DegradationConfig,
    tokenizer: VisualTokenizer | None,
    level: float,
    seed: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(picture cut to a multiple of the factor [1, H, W, 3], its low-resolution side), uint8."""
    factor = refiner.config.factor
    height, width = (side - side % factor for side in picture_HW3.shape[:2])
    cut = np.ascontiguousarray(picture_HW3[:height, :width])
    low = degrade(cut, factor, degradation, seed, level, tokenizer)
    return torch.from_numpy(cut)[None], torch.from_numpy(low)[None]


def _nearest(low_NHW3: torch.Tensor, factor: int) -> torch.Tensor:
    return low_NHW3.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)


def _scores(
    made_1HW3: torch.Tensor, true_1HW3: torch.Tensor, pyramid: PyramidDistance, teacher: VisionTeacher | None
) -> dict[str, float]:
    squared = float((made_1HW3.double() - true_1HW3.double()).square().mean())
    a, b = (pixels.movedim(-1, 1).float() / 127.5 - 1 for pixels in (made_1HW3, true_1HW3))
    scores = {
        "psnr_db": 10 * math.log10(255.0**2 / max(squared, 1e-12)), "ssim": float(ssim(made_1HW3, true_1HW3)),
        "pyramid_distance": float(pyramid(a, b)),
    }  # fmt: skip
    if teacher is not None:
        place = next(teacher.parameters()).device
        scores["teacher_distance"] = float(feature_distance(teacher, a.to(place), b.to(place)))
    return scores


def _png(pixels_HW3: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels_HW3).save(stream, format="PNG")
    return stream.getvalue()
