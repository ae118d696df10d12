"""Pictures made worse on purpose: the low-resolution side of the pairs that a refiner learns from.

Contract: `degrade` is a function of (picture, factor, settings, seed, level, tokenizer). paper: section 2.2 (pairs of a
low-resolution sample with controlled degradation and a high-resolution picture). ours: which degradations and how
strong; all of them grow with one level, which the refiner is told.

Shape letters: N pictures, H/W high-resolution pixels, h/w low-resolution pixels.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from ernie_elastic.errors import ConfigError, DataError
from ernie_elastic.tokenizers.visual.base import VisualTokenizer

KERNELS = {"area": Image.Resampling.BOX, "bicubic": Image.Resampling.BICUBIC}


@dataclass(frozen=True)
class DegradationConfig:
    """What happens at level 1; at level 0 a picture is made small and nothing else.

    kernels: of the down-scaling, drawn: "area" (mean of the pixels), "bicubic" (with a wider kernel, no aliasing).
    blur: deviation of a Gaussian before it, in low-resolution pixels. noise: deviation of Gaussian noise after it, in
    grey values 0..255. jpeg_quality: 1..100 of a JPEG after that. Each of the three gets its own share 0..1 of the
    level, drawn. undegraded_share: share of the pictures whose drawn level is 0.
    """

    kernels: tuple[str, ...] = ("area", "bicubic")
    blur: float = 1.0
    noise: float = 12.0
    jpeg_quality: int = 40
    undegraded_share: float = 0.5

    def __post_init__(self) -> None:
        unknown = [kernel for kernel in self.kernels if kernel not in KERNELS]
        if unknown or not self.kernels:
            raise ConfigError(f"degradation: kernels {self.kernels} must be some of {', '.join(KERNELS)}")
        if self.blur < 0 or self.noise < 0 or not 1 <= self.jpeg_quality <= 100:
            raise ConfigError(
                f"degradation: blur {self.blur} and noise {self.noise} must be 0 or more, jpeg_quality "
                f"{self.jpeg_quality} in 1..100"
            )
        if not 0 <= self.undegraded_share <= 1:
            raise ConfigError(f"degradation: undegraded_share {self.undegraded_share} is a share in 0..1")


def draw_level(config: DegradationConfig, seed: int, max_level: float = 1.0) -> float:
    """A level in 0..max_level: 0 for a share of the seeds, even otherwise."""
    rng = np.random.default_rng((seed, 1))
    drawn = max_level * float(rng.random())
    return 0.0 if rng.random() < config.undegraded_share else drawn


def degrade(
    pixels_HW3: np.ndarray,
    factor: int,
    config: DegradationConfig,
    seed: int,
    level: float,
    tokenizer: VisualTokenizer | None = None,
) -> np.ndarray:
    """uint8 [H / factor, W / factor, 3] of a picture uint8 [H, W, 3].

    seed: of the kernel, the three shares and the noise. level: 0..1. tokenizer: codes and decodes the result, so that
    a refiner learns what that tokenizer loses. Raises DataError for another dtype or shape, a side that the factor does
    not divide, or a size that the tokenizer cannot code; ConfigError for a level outside 0..1.
    """
    if pixels_HW3.dtype != np.uint8 or pixels_HW3.ndim != 3 or pixels_HW3.shape[2] != 3 or pixels_HW3.size == 0:
        raise DataError(f"degradation: a picture is {pixels_HW3.dtype} {pixels_HW3.shape}; expected uint8 [H, W, 3]")
    height, width = pixels_HW3.shape[:2]
    if height % factor or width % factor:
        raise DataError(
            f"degradation: a picture has {height}x{width} pixels; both sides must be multiples of the factor {factor}, "
            "crop it"
        )
    if not 0 <= level <= 1:
        raise ConfigError(f"degradation: level {level} must lie in 0..1")
    rng = np.random.default_rng((seed, 0))
    kernel = KERNELS[config.kernels[int(rng.integers(len(config.kernels)))]]
    blur, noise, jpeg = (level * rng.random(3)).tolist()
    picture = Image.fromarray(np.ascontiguousarray(pixels_HW3))
    if blur * config.blur > 0:
        picture = picture.filter(ImageFilter.GaussianBlur(blur * config.blur * factor))
    picture = picture.resize((width // factor, height // factor), kernel)
    if noise * config.noise > 0:
        grain_hw3 = rng.normal(0.0, noise * config.noise, (height // factor, width // factor, 3))
        noisy_hw3 = np.asarray(picture, dtype=np.float64) + grain_hw3
        picture = Image.fromarray(noisy_hw3.round().clip(0, 255).astype(np.uint8))
    quality = round(100 - jpeg * (100 - config.jpeg_quality))
    if quality < 100:
        picture = _through_jpeg(picture, quality)
    low_hw3 = np.array(picture)
    if tokenizer is not None:
        low_hw3 = tokenizer.reconstruct(low_hw3[None])[0].cpu().numpy()
    return low_hw3


def degrade_batch(
    pixels_NHW3: np.ndarray,
    factor: int,
    config: DegradationConfig,
    seeds: Sequence[int],
    levels: Sequence[float],
    tokenizer: VisualTokenizer | None = None,
) -> np.ndarray:
    """`degrade` of every picture uint8 [N, H, W, 3], a seed and a level each: uint8 [N, h, w, 3].

    The tokenizer codes all pictures at once. Raises as `degrade`, DataError also unless there are N seeds and levels.
    """
    if not len(pixels_NHW3) == len(seeds) == len(levels) > 0:
        raise DataError(
            f"degradation: {len(pixels_NHW3)} pictures, {len(seeds)} seeds and {len(levels)} levels; as many of each, "
            "at least 1, are needed"
        )
    rows = zip(pixels_NHW3, seeds, levels, strict=True)
    low_Nhw3 = np.stack([degrade(picture, factor, config, seed, level) for picture, seed, level in rows])
    return low_Nhw3 if tokenizer is None else tokenizer.reconstruct(low_Nhw3).cpu().numpy()


def _through_jpeg(picture: Image.Image, quality: int) -> Image.Image:
    stream = io.BytesIO()
    picture.save(stream, format="JPEG", quality=quality)
    stream.seek(0)
    return Image.open(stream).convert("RGB")
