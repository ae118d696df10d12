"""Degraded pictures: a function of the seed, plain down-scaling at level 0, worse with the level, bad input named."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from ernie_elastic.data.media.degradation import DegradationConfig, degrade, degrade_batch, draw_level
from ernie_elastic.errors import ConfigError, DataError
from ernie_elastic.tokenizers.visual.base import VisualTokenizer


def picture(seed: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Smooth colours with sharp rectangles, uint8 [H, W, 3]."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    pixels = np.array(small.resize((width, height), Image.Resampling.BICUBIC))
    for _ in range(6):
        top, left = rng.integers(height - 8), rng.integers(width - 8)
        pixels[top : top + 8, left : left + 8] = rng.integers(0, 256, 3)
    return pixels


class Darker(VisualTokenizer):
    """Stands for a tokenizer that changes what it codes; counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def reconstruct(self, pixels_NHW3: torch.Tensor | np.ndarray) -> torch.Tensor:
        self.calls += 1
        return torch.as_tensor(pixels_NHW3) // 2


@pytest.mark.parametrize("factor", [2, 4])
def test_level_0_is_plain_down_scaling(factor: int) -> None:
    pixels = picture(0)
    low = degrade(pixels, factor, DegradationConfig(kernels=("area",)), seed=5, level=0.0)
    means = pixels.reshape(48 // factor, factor, 64 // factor, factor, 3).astype(float).mean(axis=(1, 3))
    assert low.dtype == np.uint8
    assert np.abs(low - means).max() <= 1  # Pillow rounds after each of the two axes


def test_it_is_a_function_of_the_seed_and_leaves_its_input() -> None:
    pixels, config = picture(1), DegradationConfig()
    before = pixels.copy()
    first, again = (degrade(pixels, 2, config, seed=3, level=0.8) for _ in range(2))
    assert np.array_equal(first, again)
    assert np.array_equal(pixels, before)
    assert not np.array_equal(first, degrade(pixels, 2, config, seed=4, level=0.8))


@pytest.mark.parametrize(
    "config",
    [
        DegradationConfig(kernels=("area",)),
        DegradationConfig(kernels=("area",), noise=0, jpeg_quality=100),
        DegradationConfig(kernels=("area",), blur=0, jpeg_quality=100),
        DegradationConfig(kernels=("area",), blur=0, noise=0, jpeg_quality=10),
    ],
    ids=["all", "blur", "noise", "jpeg"],
)
def test_damage_grows_with_the_level(config: DegradationConfig) -> None:
    damages = []
    for level in (0.0, 0.3, 0.6, 1.0):
        squared = []
        for seed in range(12):
            pixels = picture(seed)
            clean = degrade(pixels, 2, config, seed, 0.0).astype(float)
            squared.append(np.square(degrade(pixels, 2, config, seed, level) - clean).mean())
        damages.append(float(np.mean(squared)))
    assert damages[0] == 0
    assert all(more > 1.2 * less for less, more in pairwise(damages)), damages


def test_both_kernels_are_drawn() -> None:
    config = DegradationConfig()
    kinds = {degrade(picture(0), 2, config, seed, 0.0).tobytes() for seed in range(20)}
    single = {
        degrade(picture(0), 2, DegradationConfig(kernels=(kernel,)), 0, 0.0).tobytes() for kernel in ("area", "bicubic")
    }
    assert kinds == single


def test_levels_are_drawn_in_their_range_with_a_share_of_zeros() -> None:
    levels = np.array([draw_level(DegradationConfig(undegraded_share=0.3), seed, 0.6) for seed in range(600)])
    assert 0.2 < (levels == 0).mean() < 0.4
    assert levels.max() <= 0.6 and levels.max() > 0.5
    assert 0.25 < levels[levels > 0].mean() < 0.35


def test_a_batch_is_every_picture_by_itself_and_the_tokenizer_codes_it_once() -> None:
    pixels_NHW3 = np.stack([picture(seed) for seed in range(3)])
    config, seeds, levels = DegradationConfig(), [4, 5, 6], [0.0, 0.5, 1.0]
    batch = degrade_batch(pixels_NHW3, 2, config, seeds, levels)
    alone = [degrade(*row[:1], 2, config, *row[1:]) for row in zip(pixels_NHW3, seeds, levels, strict=True)]
    assert np.array_equal(batch, np.stack(alone))
    tokenizer = Darker()
    coded = degrade_batch(pixels_NHW3, 2, config, seeds, levels, tokenizer)
    assert tokenizer.calls == 1
    assert np.array_equal(coded, batch // 2)
    assert np.array_equal(degrade(pixels_NHW3[1], 2, config, 5, 0.5, tokenizer), batch[1] // 2)


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros((1, 1, 3), np.uint8),
        np.zeros((0, 8, 3), np.uint8),
        np.zeros((8, 8, 3), np.float32),
        np.zeros((8, 8), np.uint8),
        np.zeros((8, 9, 3), np.uint8),
    ],
    ids=["1x1", "empty", "float", "grey", "odd"],
)
def test_bad_pictures_are_named(bad: np.ndarray) -> None:
    with pytest.raises(DataError):
        degrade(bad, 2, DegradationConfig(), 0, 0.5)


def test_bad_settings_are_named() -> None:
    with pytest.raises(ConfigError, match="kernels"):
        DegradationConfig(kernels=("lanczos",))
    with pytest.raises(ConfigError, match="jpeg_quality"):
        DegradationConfig(jpeg_quality=0)
    with pytest.raises(ConfigError, match=r"level 1\.5"):
        degrade(picture(0), 2, DegradationConfig(), 0, 1.5)
    with pytest.raises(DataError, match="2 seeds"):
        degrade_batch(picture(0)[None], 2, DegradationConfig(), [1, 2], [0.0])
