"""k-means, principal directions, and the quality of an audio tokenizer trained on a small budget."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ernie_elastic.data.world.checkers import checker_agreement
from ernie_elastic.data.world.scenes import world_sample
from ernie_elastic.errors import ConfigError, DataError
from ernie_elastic.tokenizer_training.audio import spectral as tokenizer_audio_spectral
from ernie_elastic.tokenizer_training.audio.spectral import (  # fmt: skip
    AudioTrainingConfig,
    audio_health,
    kmeans,
    principal_directions,
    train_audio_tokenizer,
)
from ernie_elastic.tokenizers.audio.base import AudioTokenizer
from ernie_elastic.tokenizers.audio.spectral import SpectralAudioTokenizerConfig

TASKS = ("text_to_audio", "text_to_speech")


def waves(task: str, count: int, split: str = "train") -> list[np.ndarray]:
    return [world_sample(task, 0, index, split).segments[-1].array for index in range(count)]


@pytest.fixture(scope="module")
def trained() -> AudioTokenizer:
    torch.manual_seed(5)  # must not matter
    sounds = waves(TASKS[0], 250) + waves(TASKS[1], 200)
    return train_audio_tokenizer(sounds, SpectralAudioTokenizerConfig(), AudioTrainingConfig(rounds=20))[0]


def test_kmeans_finds_separate_groups_and_keeps_the_zero_centre() -> None:
    middles = torch.randn(7, 5) * 20
    points = torch.cat([middles, torch.zeros(1, 5)]).repeat_interleave(30, dim=0) + torch.randn(240, 5) * 0.1
    centres, codes = kmeans(points, 8, 15, torch.Generator().manual_seed(0))
    assert not centres[0].any()
    assert float(torch.cdist(middles, centres).min(dim=1).values.max()) < 0.2
    assert len(codes.unique()) == 8 and all(len(group.unique()) == 1 for group in codes.split(30))


def test_kmeans_revives_dead_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    far_away = lambda points, count, generator: torch.full((count, points.shape[1]), 1e3)
    monkeypatch.setattr(
        tokenizer_audio_spectral, "_spread_start", far_away
    )  # a start from which no code but two is ever chosen
    _, codes = kmeans(torch.randn(600, 3), 16, 20, torch.Generator().manual_seed(0))
    assert len(codes.unique()) == 16


def test_kmeans_bears_equal_points() -> None:
    centres, codes = kmeans(torch.ones(50, 2), 4, 5, torch.Generator().manual_seed(0))
    assert bool(torch.isfinite(centres).all()) and torch.equal(centres[codes], torch.ones(50, 2))


def test_principal_directions_agree_with_a_full_decomposition() -> None:
    points = torch.randn(400, 40) * torch.logspace(1, -1, 40)
    found = principal_directions(points, 5, 4, torch.Generator().manual_seed(0))
    exact = torch.linalg.svd(points, full_matrices=False).Vh[:5].T
    torch.testing.assert_close(found.T @ found, torch.eye(5), atol=1e-4, rtol=0)
    torch.testing.assert_close((found * exact).sum(dim=0).abs(), torch.ones(5), atol=1e-3, rtol=0)


@pytest.mark.parametrize(("task", "least"), [("text_to_audio", 0.97), ("text_to_speech", 0.95)])
def test_the_checker_reads_reconstructions(trained: AudioTokenizer, task: str, least: float) -> None:
    samples = [world_sample(task, 0, index, "test") for index in range(60)]
    decoded = trained.decode_batch(trained.encode_batch([sample.segments[-1].array for sample in samples]))
    assert checker_agreement(task, [sample.truth for sample in samples], [wave.numpy() for wave in decoded]) >= least


def test_levels_refine_and_codes_are_used(trained: AudioTokenizer) -> None:
    health = audio_health(trained, waves(TASKS[0], 60, "test") + waves(TASKS[1], 60, "test"))
    ratios = [level["snr_db"] for level in health["levels"]]
    assert ratios[0] > 9 and ratios[1] > ratios[0] + 0.5 and ratios[2] > ratios[1] + 0.3
    assert health["levels"][0]["perplexity"] > 30 and min(level["used_share"] for level in health["levels"]) > 0.6
    assert health["bits_per_second"] == 3 * 6 * 12.5


def test_loudness_and_length_survive(trained: AudioTokenizer) -> None:
    wave = waves(TASKS[0], 1, "test")[0]
    decoded = trained.decode(trained.encode(wave)).numpy()
    assert decoded.shape == wave.shape
    assert float(np.sqrt(np.mean(decoded**2))) == pytest.approx(float(np.sqrt(np.mean(wave**2))), rel=0.2)


def test_the_same_seed_gives_the_same_bits_and_another_seed_other_ones() -> None:
    config, budget = SpectralAudioTokenizerConfig(num_components=16, codebook_size=16), AudioTrainingConfig(rounds=4)
    sounds = waves(TASKS[0], 20)
    first, second, other = (train_audio_tokenizer(sounds, config, budget, seed)[0] for seed in (0, 0, 1))
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    assert not torch.equal(first.codebooks_QVC, other.codebooks_QVC)


def test_too_little_sound_and_empty_budgets_are_refused() -> None:
    with pytest.raises(DataError, match="8 steps are too few for 64 codes and 128 components"):
        train_audio_tokenizer([np.ones(8 * 1280, np.float32)], SpectralAudioTokenizerConfig())
    with pytest.raises(ConfigError, match="rounds 0"):
        AudioTrainingConfig(rounds=0)
