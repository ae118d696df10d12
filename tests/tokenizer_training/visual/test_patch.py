"""The visual trainer's parts, and the quality that a small budget reaches."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from ernie_elastic.data.world.checkers import checker_agreement
from ernie_elastic.data.world.scenes import world_sample
from ernie_elastic.errors import ConfigError, DataError
from ernie_elastic.presets import demo
from ernie_elastic.tokenizer_training.train_on_world import TokenizerTrainingConfig, world_pictures
from ernie_elastic.tokenizer_training.visual.patch import (  # fmt: skip
    VisualTrainingConfig,
    _quantised,
    measured_amplitudes,
    partial_sums,
    train_visual_tokenizer,
    visual_health,
)
from ernie_elastic.tokenizers.quantizers import MultiScaleBits
from ernie_elastic.tokenizers.visual.base import VisualTokenizer
from ernie_elastic.tokenizers.visual.patch import PatchVisualTokenizerConfig

Trained = tuple[VisualTokenizer, dict[str, Any]]


@pytest.fixture(scope="module")
def trained() -> Trained:
    torch.manual_seed(5)  # must not matter
    data = TokenizerTrainingConfig(dense_scenes=700, scenes=300, clips=80)
    config = PatchVisualTokenizerConfig(num_bits=24, width=96)
    return train_visual_tokenizer(world_pictures(data), config, VisualTrainingConfig(steps=300, batch_size=48))


def scenes(count: int) -> tuple[list[dict[str, Any]], np.ndarray]:
    samples = [world_sample("text_to_image", 0, index, "test") for index in range(count)]
    return [sample.truth for sample in samples], np.stack([sample.segments[-1].array for sample in samples])


def test_a_small_budget_reaches_a_bound(trained: Trained) -> None:
    tokenizer, health = trained
    truths, pixels = scenes(80)
    measured = visual_health(tokenizer, pixels)
    decoded = list(tokenizer.reconstruct(pixels).numpy())
    assert measured["psnr_db"] > 22 and health["train_error"] < 0.06
    assert checker_agreement("text_to_image", truths, decoded) > 0.1
    psnr = measured["psnr_db_by_scales"]
    assert psnr[2] > psnr[1] + 1 and psnr[3] > psnr[2] + 1
    assert measured["bits_used"] > 0.9 and measured["bits_per_picture"] == 24 * 37


def test_amplitudes_are_those_of_the_latents(trained: Trained) -> None:
    tokenizer, health = trained
    assert tokenizer.quantizer.amplitudes == tokenizer.config.amplitudes != PatchVisualTokenizerConfig().amplitudes
    assert health["amplitudes"] == [round(amplitude, 4) for amplitude in tokenizer.config.amplitudes]
    latent = tokenizer.encode(scenes(64)[1])
    assert 0.5 < float(latent.square().mean()) < 2.0  # normalised, so that amplitudes have a scale


def test_measured_amplitudes_are_the_best_constants() -> None:
    latent = torch.randn(50, 4, 4, 6)
    quantizer = MultiScaleBits(((2, 2), (4, 4), (4, 4)), (1.0, 1.0, 1.0))
    amplitudes = measured_amplitudes(latent, quantizer)
    error = lambda values: float(
        (dataclasses.replace(quantizer, amplitudes=values).encode(latent).total - latent).square().mean()
    )
    best = error(amplitudes)
    for change in (0.8, 1.25):
        assert best < error((*amplitudes[:2], amplitudes[2] * change))
    sums = partial_sums(dataclasses.replace(quantizer, amplitudes=amplitudes), quantizer.encode(latent).targets)
    assert sums.shape == (3, 50, 4, 4, 6)


def test_the_same_seed_gives_the_same_bits_and_another_seed_other_ones() -> None:
    pictures = list(world_pictures(TokenizerTrainingConfig(dense_scenes=60, scenes=1, clips=1)))
    config, budget = PatchVisualTokenizerConfig(num_bits=4, width=16), VisualTrainingConfig(steps=12, batch_size=16)
    first, second, other = (train_visual_tokenizer(pictures, config, budget, seed)[0] for seed in (0, 0, 1))
    assert first.config == second.config
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    assert not torch.equal(first.decoder.last.weight, other.decoder.last.weight)


def test_bad_data_and_budgets_are_refused() -> None:
    config = PatchVisualTokenizerConfig(num_bits=4, width=16)
    with pytest.raises(DataError, match="no pictures"):
        train_visual_tokenizer([], config)
    with pytest.raises(DataError, match="3 pictures are fewer than one batch of 64"):
        train_visual_tokenizer([np.zeros((3, 32, 32, 3), np.uint8)], config)
    with pytest.raises(DataError, match=r"\(16, 16, 3\)"):
        train_visual_tokenizer([np.zeros((16, 16, 3), np.uint8)], config)
    with pytest.raises(ConfigError, match="steps 1"):
        VisualTrainingConfig(steps=1)
    with pytest.raises(ConfigError, match="warmup_share 1"):
        VisualTrainingConfig(warmup_share=1.0)
    with pytest.raises(ConfigError, match="flip_rate"):
        VisualTrainingConfig(flip_rate=0.5)


def test_wrong_bits_reach_the_decoder_while_it_learns() -> None:
    quantizer = MultiScaleBits(((1, 1), (2, 2)), (0.5, 0.5))
    latent = torch.randn(64, 2, 2, 6, generator=torch.Generator().manual_seed(0))
    features = [
        _quantised(latent, quantizer, VisualTrainingConfig(flip_rate=rate, coarse_share=0.0), generator)[0]
        for rate in (0.0, 0.2)
        for generator in [torch.Generator().manual_seed(1)]
    ]
    torch.testing.assert_close(features[0], quantizer.encode(latent).total)
    changed = (features[0] - features[1]).abs() > 0.5
    assert 0.2 < changed.float().mean() < 0.4, "a cell's bit is wrong where one of two scales was flipped, and not both"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_real_budget_reaches_97_percent() -> None:
    data = demo().tokenizers
    tokenizer, _ = train_visual_tokenizer(world_pictures(data), data.visual, data.visual_training)
    for count in (1, 2):
        world = dataclasses.replace(data.world, min_objects=count, max_objects=count)
        samples = [world_sample("text_to_image", 0, index, "test", world) for index in range(400)]
        decoded = list(tokenizer.reconstruct(np.stack([sample.segments[-1].array for sample in samples])).numpy())
        assert checker_agreement("text_to_image", [sample.truth for sample in samples], decoded) >= 0.97
    clips = [world_sample("text_to_video", 0, index, "test", data.world) for index in range(200)]
    films = [tokenizer.reconstruct(sample.segments[-1].array).numpy() for sample in clips]
    assert checker_agreement("text_to_video", [sample.truth for sample in clips], films) >= 0.97
