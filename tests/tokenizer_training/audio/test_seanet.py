"""Training of the neural codec: it learns, every loss is switchable, a resume gives the same bits; health."""

from __future__ import annotations

import copy
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from ernie_elastic.data.world.scenes import world_sample
from ernie_elastic.errors import CheckpointError, ConfigError, DataError
from ernie_elastic.tokenizer_training.audio import seanet as tokenizer_audio_seanet
from ernie_elastic.tokenizer_training.audio.health import CollapseLimits, codec_health
from ernie_elastic.tokenizer_training.audio.seanet import SeanetTrainee, SeanetTrainingConfig, SpectrumGuide
from ernie_elastic.tokenizers.audio.seanet import SeanetAudioTokenizer, SeanetAudioTokenizerConfig

STEP = 1280
CONFIG = SeanetAudioTokenizerConfig(
    sample_rate=16000, strides=(2, 4, 4, 5, 8), width=4, max_width=48, dilations=(1,), latent_width=24, num_levels=3,
    codebook_size=24, decay=0.9,
)  # fmt: skip
STEPS = 40


def world_waves(count: int, split: str = "train") -> list[np.ndarray]:
    tasks = ("text_to_audio", "text_to_speech")
    return [world_sample(tasks[index % 2], 0, index, split).segments[-1].array for index in range(count)]


@pytest.fixture(scope="module")
def waves() -> list[np.ndarray]:
    return world_waves(60)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a tiny Whisper model with random weights."""
    directory = tmp_path_factory.mktemp("whisper")
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        vocab_size=32, d_model=12, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, num_mel_bins=16, max_source_positions=100,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    transformers.WhisperModel(config).save_pretrained(directory)
    transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=2).save_pretrained(directory)
    return directory


def batch(waves: list[np.ndarray], step: int, count: int = 4, steps: int = 6) -> torch.Tensor:
    """Crops float32 [count, steps * STEP] of sounds, a function of the step."""
    draw = np.random.default_rng(step)
    crops = []
    for _ in range(count):
        wave = waves[draw.integers(len(waves))]
        start = draw.integers(max(1, len(wave) - steps * STEP + 1))
        crop = wave[start : start + steps * STEP]
        crops.append(np.pad(crop, (0, steps * STEP - len(crop))))
    return torch.from_numpy(np.stack(crops))


def train(
    waves: list[np.ndarray], steps: int = STEPS, **changes: object
) -> tuple[SeanetTrainee, list[dict[str, float]]]:
    trainee = SeanetTrainee(CONFIG, SeanetTrainingConfig(**{"steps": steps, "batch_size": 4, **changes}), seed=0)
    return trainee, [trainee.step(batch(waves, step), step) for step in range(steps)]


@pytest.fixture(scope="module")
def trained(waves: list[np.ndarray]) -> tuple[SeanetTrainee, list[dict[str, float]]]:
    return train(waves, learning_rate=3e-3)


def test_training_lowers_the_mel_loss(trained: tuple[SeanetTrainee, list[dict[str, float]]]) -> None:
    _, history = trained
    mels = [metrics["mel"] for metrics in history]
    assert np.mean(mels[-5:]) < 0.7 * mels[0]
    assert "perplexity_0" not in history[0] and history[-1]["perplexity_0"] > 1.5
    assert history[0]["learning_rate"] < history[19]["learning_rate"] > history[-1]["learning_rate"]


def test_only_losses_with_a_weight_are_computed(waves: list[np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **named: object) -> None:
        raise AssertionError("computed")

    for name in ("MultiScaleMel", "StftDiscriminator", "LeCam", "distillation_loss", "WhisperTeacher", "SpectrumGuide"):
        monkeypatch.setattr(tokenizer_audio_seanet, name, refuse)
    _, (metrics,) = train(waves, 1, mel_weight=0.0, guide_weight=0.0, commitment_weight=0.0, teacher=Path("none"))
    assert set(metrics) & {"mel", "guide", "commitment", "adversarial", "feature", "lecam", "distillation"} == set()
    assert metrics["wave"] > 0


def test_the_guide_hears_each_step_and_none_after_it() -> None:
    guide = SpectrumGuide(CONFIG)
    time = torch.arange(6 * STEP) / 16000
    wave = 0.5 * torch.sin(2 * np.pi * 1000 * time)[None]
    wave[:, : 3 * STEP] = 0.0
    target = guide.target(wave, 6).reshape(6, 4, 32)
    assert float(target[:3].max()) == pytest.approx((np.log(1e-3) + 5) / 2, abs=1e-4)
    assert float(target[4:].amax()) > 1.5 and len(target[4:].argmax(dim=2).unique()) == 1
    features = torch.zeros(1, 6, CONFIG.latent_width)
    assert float(guide(features, wave).detach()) == pytest.approx(float(target.abs().mean()), abs=0.2)
    with pytest.raises(ConfigError, match="guide_weight needs step_samples that 4 divides, not 30"):
        SpectrumGuide(replace(CONFIG, strides=(5, 3, 2)))


EVERYTHING = {"adversarial_weight": 0.5, "adversarial_start": 0.25, "lecam_weight": 0.1, "distillation_weight": 1.0}


@pytest.mark.parametrize("axis", ["feature", "time"])
def test_every_loss_trains_together(axis: str, waves: list[np.ndarray], teacher: Path) -> None:
    trainee = SeanetTrainee(
        CONFIG, SeanetTrainingConfig(steps=8, teacher=teacher, distillation_axis=axis, **EVERYTHING), seed=0
    )
    start = copy.deepcopy(trainee.state_dict())
    history = [trainee.step(batch(waves, step), step) for step in range(8)]
    names = {"wave", "mel", "guide", "commitment", "distillation", "adversarial", "feature", "discriminator", "lecam"}
    assert names <= set(history[-1]) and all(np.isfinite(list(metrics.values())).all() for metrics in history)
    assert "adversarial" not in history[1] and "adversarial" in history[2]
    for part in ("tokenizer", "guide", "projection", "discriminator"):
        still = [name for name, value in trainee.state_dict()[part].items() if torch.equal(value, start[part][name])]
        assert still == [], part
    assert trainee.teacher is not None and all(not p.requires_grad for p in trainee.teacher.parameters())


def test_distillation_pulls_level_0_towards_the_teacher(waves: list[np.ndarray], teacher: Path) -> None:
    _, history = train(
        waves, 30, distillation_weight=5.0, teacher=teacher, quantise_start=0.0, learning_rate=3e-3, mel_weight=0.0
    )
    distances = [metrics["distillation"] for metrics in history]
    assert np.mean(distances[-3:]) < 0.7 * distances[0]


def test_a_resume_gives_the_same_bits(waves: list[np.ndarray], teacher: Path) -> None:
    training = SeanetTrainingConfig(steps=8, teacher=teacher, quantiser_dropout=0.5, **EVERYTHING)
    whole = SeanetTrainee(CONFIG, training, seed=0)
    for step in range(4):
        whole.step(batch(waves, step), step)
    stream = io.BytesIO()
    torch.save(whole.state_dict(), stream)
    torch.manual_seed(77)  # must not matter
    resumed = SeanetTrainee(CONFIG, training, seed=0)
    stream.seek(0)
    resumed.load_state_dict(torch.load(stream, weights_only=True))
    for step in range(4, 8):
        torch.rand(step)
        assert resumed.step(batch(waves, step), step) == whole.step(batch(waves, step), step)
    for name, value in whole.tokenizer.state_dict().items():
        assert torch.equal(resumed.tokenizer.state_dict()[name], value), name
    with pytest.raises(ConfigError, match="the saved state has discriminator"):
        SeanetTrainee(CONFIG, SeanetTrainingConfig(), seed=0).load_state_dict(whole.state_dict())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"mel_weight": -1.0}, "mel_weight is -1.0"),
        ({"mel_weight": 0.0, "wave_weight": 0.0}, "both 0"),
        ({"quantiser_dropout": 1.5}, "quantiser_dropout is 1.5"),
        ({"quantise_start": 1.0}, "codebooks would never start"),
        ({"distillation_weight": 1.0}, "needs teacher"),
        ({"distillation_axis": "space"}, "'space' is not feature, time"),
    ],
)
def test_bad_configs_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SeanetTrainingConfig(**changes)


def test_bad_batches_and_teachers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="100 samples are shorter than a step of 1280"):
        SeanetTrainee(CONFIG, SeanetTrainingConfig()).step(torch.zeros(2, 100), 0)
    with pytest.raises(CheckpointError):
        SeanetTrainee(CONFIG, SeanetTrainingConfig(distillation_weight=1.0, teacher=tmp_path / "none"))


def test_a_trained_codec_is_healthy(trained: tuple[SeanetTrainee, list[dict[str, float]]]) -> None:
    tokenizer = trained[0].tokenizer.eval()
    health = codec_health(tokenizer, world_waves(12, "test"))
    assert health["collapse"] == []
    assert health["bits_per_second"] == pytest.approx(3 * np.log2(24) * 12.5, abs=0.1)
    assert [sorted(level) for level in health["levels"]] == [
        ["mel_distance", "perplexity", "si_sdr_db", "used_share"]
    ] * 3
    assert all(0 < level["used_share"] <= 1 <= level["perplexity"] <= 24 for level in health["levels"])
    with pytest.raises(DataError, match="no waves"):
        codec_health(tokenizer, [])
    with pytest.raises(ConfigError, match=r"used is 2\.0"):
        CollapseLimits(used=2.0)


def plant(tokenizer: SeanetAudioTokenizer, what: str) -> SeanetAudioTokenizer:
    """A copy of a codec that has collapsed in one way."""
    sick = copy.deepcopy(tokenizer)
    with torch.no_grad():
        if what == "level":
            sick.quantizer.codebooks_QVD[2, 1:] += 1e4
        elif what == "encoder":
            sick.encoder.layers[-1].conv.parametrizations.weight.original0.zero_()  # type: ignore[union-attr]
        elif what == "silence":
            sick.decoder.layers[-1].conv.parametrizations.weight.original0.zero_()  # type: ignore[union-attr]
            sick.decoder.layers[-1].conv.bias.zero_()  # type: ignore[union-attr]
        else:
            sick.decoder.layers[-1].conv.parametrizations.weight.original0.zero_()  # type: ignore[union-attr]
            sick.decoder.layers[-1].conv.bias.fill_(0.5)  # type: ignore[union-attr]
    return sick


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("level", "level 2 uses 1 of 24 codes"),
        ("encoder", "sounds have the same codes in all their steps"),
        ("silence", "12 of 12 sounds decode to silence"),
        ("constant", "12 of 12 sounds decode to a constant"),
    ],
)
def test_a_planted_collapse_is_found(
    what: str, sentence: str, trained: tuple[SeanetTrainee, list[dict[str, float]]]
) -> None:
    health = codec_health(plant(trained[0].tokenizer.eval(), what), world_waves(12, "test"))
    assert any(sentence in line for line in health["collapse"]), health["collapse"]
    if what == "level":
        assert len(health["collapse"]) == 1
