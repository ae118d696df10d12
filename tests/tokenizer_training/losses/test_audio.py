"""Mel distances, Whisper as a teacher, distillation and SI-SDR: against Transformers, by hand, and by gradient."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ernie_elastic.data.media.resampling import resample
from ernie_elastic.errors import CheckpointError, ConfigError, DataError
from ernie_elastic.tokenizer_training.losses.audio import (
    MultiScaleMel,
    WhisperTeacher,
    distillation_loss,
    mel_filters,
    pooling,
    si_sdr,
)

RATE = 16_000
POSITIONS = 50  # of the toy Whisper: one second


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def tone(hertz: float, amplitude: float = 0.5, length: int = 4000) -> torch.Tensor:
    return (amplitude * (2 * math.pi * hertz * torch.arange(length) / RATE).sin())[None]


@pytest.mark.parametrize(("rate", "window", "bands"), [(16_000, 400, 80), (24_000, 2048, 64), (8_000, 256, 16)])
@pytest.mark.parametrize("area_norm", [False, True])
def test_mel_filters_are_those_of_transformers(rate: int, window: int, bands: int, area_norm: bool) -> None:
    from transformers.audio_utils import mel_filter_bank

    theirs = mel_filter_bank(
        window // 2 + 1, bands, 0.0, rate / 2, rate, norm="slaney" if area_norm else None, mel_scale="slaney"
    )
    np.testing.assert_allclose(mel_filters(rate, window, bands, area_norm).numpy(), theirs, atol=1e-9)


def test_mel_filters_refuse_bands_without_a_bin() -> None:
    with pytest.raises(ConfigError, match="200 bands hold no bin of a window of 256"):
        mel_filters(RATE, 256, 200)


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 24_000, 44_100, 48_000])
def test_the_default_bands_suit_all_usual_rates(rate: int) -> None:
    MultiScaleMel(rate)


@pytest.mark.parametrize("length", [1, 7, 500, 6001])
def test_mel_distance_of_any_length_and_item_by_item(length: int) -> None:
    mel = MultiScaleMel(RATE)
    a, b = noise(3, length, seed=1), noise(3, length, seed=2)
    distance = mel.distance(a, b)
    assert distance.shape == (3,) and bool((distance > 0).all())
    torch.testing.assert_close(mel.distance(b, a), distance)
    torch.testing.assert_close(mel.distance(a[1:2], b[1:2]), distance[1:2])
    torch.testing.assert_close(mel(a, b), distance.mean())
    assert mel.distance(a, a).tolist() == [0.0] * 3


def test_mel_distance_hears_pitch_and_level_but_hardly_phase() -> None:
    mel = MultiScaleMel(RATE)
    reference = tone(440.0)
    shifted = (0.5 * (2 * math.pi * 440.0 * torch.arange(4000) / RATE + 1.0).sin())[None]
    phase, level, pitch = (float(mel(reference, other)) for other in (shifted, 0.5 * reference, tone(880.0)))
    assert phase < level < pitch
    # Twice the amplitude is log 2 in every band that is far above the floor.
    loud, quiet = noise(1, 8000), 0.5 * noise(1, 8000)
    assert float(MultiScaleMel(RATE, linear_weight=0.0)(loud, quiet)) == pytest.approx(math.log(2.0), rel=1e-2)


def test_the_linear_term_counts_amplitudes() -> None:
    windows = {"windows": (512,), "num_mels": (32,)}
    whole, logarithm = MultiScaleMel(RATE, **windows), MultiScaleMel(RATE, **windows, linear_weight=0.0)
    silence = torch.zeros(1, 4000)
    part = [float(whole(tone(1000.0, a), silence) - logarithm(tone(1000.0, a), silence)) for a in (1.0, 0.5)]
    assert part[0] == pytest.approx(2.0 * part[1], rel=1e-2)
    # The sine is in one or two of 32 bands, with an amplitude of 1 to 2 there: root mean square over bands.
    assert math.sqrt(1 / 32) * 0.9 < part[0] < 2.0 * math.sqrt(2 / 32)


def test_mel_gradients() -> None:
    mel = MultiScaleMel(RATE, windows=(64, 32), num_mels=(4, 3))
    reference = noise(2, 150, dtype=torch.float64)
    estimate = noise(2, 150, seed=5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda wave: mel.distance(reference, wave), estimate)
    silent = torch.zeros(1, 300, requires_grad=True)
    MultiScaleMel(RATE)(torch.zeros(1, 300), silent).backward()
    assert silent.grad is not None and bool(torch.isfinite(silent.grad).all())


def test_a_wave_found_by_descending_the_mel_distance() -> None:
    mel = MultiScaleMel(RATE, windows=(512, 128), num_mels=(32, 12))
    reference = tone(600.0, length=1500) + 0.01 * noise(1, 1500, seed=3)
    estimate = (0.05 * noise(1, 1500)).requires_grad_()
    optimizer = torch.optim.Adam([estimate], 0.02)
    first = float(mel(reference, estimate).detach())
    for _ in range(60):
        optimizer.zero_grad()
        loss = mel(reference, estimate)
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.4 * first


def test_mel_names_what_is_wrong() -> None:
    with pytest.raises(ConfigError, match="must have one length"):
        MultiScaleMel(RATE, windows=(256,), num_mels=(8, 8))
    for a, b in ((torch.zeros(2, 5), torch.zeros(2, 6)), (torch.zeros(2, 0), torch.zeros(2, 0))):
        with pytest.raises(DataError, match="expected one shape"):
            MultiScaleMel(RATE).distance(a, b)
        with pytest.raises(DataError, match="expected one shape"):
            si_sdr(a, b)


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Whisper with random weights and its feature extractor, which reads one second."""
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel

    directory = tmp_path_factory.mktemp("whisper")
    config = WhisperConfig(
        d_model=16, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, num_mel_bins=20, max_source_positions=POSITIONS, vocab_size=60,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        WhisperModel(config).save_pretrained(directory)
    WhisperFeatureExtractor(feature_size=20, chunk_length=1).save_pretrained(directory)
    return directory


def theirs(directory: Path, wave_L: torch.Tensor) -> torch.Tensor:
    """[T, C] of one second at most, by Transformers alone."""
    from transformers import WhisperFeatureExtractor, WhisperModel

    inputs = WhisperFeatureExtractor.from_pretrained(directory)(wave_L.numpy(), sampling_rate=RATE, return_tensors="pt")
    with torch.no_grad():
        return WhisperModel.from_pretrained(directory).eval().encoder(inputs.input_features).last_hidden_state[0]


def test_whisper_features_are_those_of_transformers_pooled(whisper: Path) -> None:
    teacher = WhisperTeacher.load(whisper)
    assert teacher.width == 16 and not any(p.requires_grad for p in teacher.train().parameters())
    assert not teacher.encoder.training
    wave = torch.cat([tone(300.0, length=RATE // 2), 0.1 * noise(1, RATE // 2)], dim=1)
    expected = theirs(whisper, wave[0])
    assert float(expected.std(dim=0).mean()) > 0.01, "frames differ, so that pooling is seen"
    torch.testing.assert_close(teacher.features(wave, RATE, 50)[0], expected, atol=1e-4, rtol=1e-3)
    by_four = teacher.features(wave[:, : 48 * 320], RATE, 12)[0]
    cut = theirs(whisper, wave[0, : 48 * 320])[:48].reshape(12, 4, 16).mean(dim=1)
    torch.testing.assert_close(by_four, cut, atol=1e-4, rtol=1e-3)


def test_whisper_reads_long_short_and_other_rates(whisper: Path) -> None:
    teacher = WhisperTeacher.load(whisper)
    wave = 0.1 * noise(2, 2 * RATE + RATE // 5)
    long = teacher.features(wave, RATE, 110)
    assert long.shape == (2, 110, 16) and not long.requires_grad
    torch.testing.assert_close(long[1, 50:100], theirs(whisper, wave[1, RATE : 2 * RATE]), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(long[0, 100:], theirs(whisper, wave[0, 2 * RATE :])[:10], atol=1e-4, rtol=1e-3)
    assert teacher.features(wave[:, :1], RATE, 1).shape == (2, 1, 16)
    other = 0.1 * noise(1, 24_000, seed=3)  # one second
    own = torch.from_numpy(resample(other[0].numpy(), 24_000, RATE))[None]
    found = teacher.features(other, 24_000, 12)
    torch.testing.assert_close(found, teacher.features(own, RATE, 12))
    assert float((found - teacher.features(other[:, :RATE], RATE, 12)).abs().max()) > 1e-3
    with pytest.raises(DataError, match="0 steps"):
        teacher.features(wave, RATE, 0)


def test_pooling_shares_frames_by_time() -> None:
    torch.testing.assert_close(pooling(8, 2, 4.0)[0], torch.tensor([0.25] * 4 + [0.0] * 4, dtype=torch.float64))
    expected = torch.tensor([[2 / 3, 1 / 3, 0], [0, 1 / 3, 2 / 3]], dtype=torch.float64)
    torch.testing.assert_close(pooling(3, 2, 1.5), expected)
    for frames, steps, each in ((5, 7, 0.6), (3, 4, 1.0), (2, 3, 4.0), (50, 1, 0.003)):
        torch.testing.assert_close(pooling(frames, steps, each).sum(dim=1), torch.ones(steps, dtype=torch.float64))


def test_whisper_refuses_what_would_be_random_or_is_another_model(whisper: Path, tmp_path: Path) -> None:
    tensors = load_file(whisper / "model.safetensors")
    for lost, refused in (("encoder.conv2.weight", True), ("decoder.layer_norm.weight", False)):
        directory = tmp_path / lost
        directory.mkdir()
        save_file({k: v for k, v in tensors.items() if k != lost}, directory / "model.safetensors", {"format": "pt"})
        (directory / "config.json").write_text((whisper / "config.json").read_text())
        if refused:
            with pytest.raises(CheckpointError, match=r"lacks 1 weights, first 'encoder\.conv2\.weight'"):
                WhisperTeacher.load(directory)
        else:
            WhisperTeacher.load(directory)
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        WhisperTeacher.load(tmp_path / "nothing")
    (directory / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(CheckpointError, match="type 'bert', not 'whisper'"):
        WhisperTeacher.load(directory)


def test_whisper_alone_or_under_a_head_gives_the_same(whisper: Path, tmp_path: Path) -> None:
    from transformers import WhisperForConditionalGeneration, WhisperModel

    model = WhisperModel.from_pretrained(whisper)
    model.encoder.save_pretrained(tmp_path / "encoder")
    whole = WhisperForConditionalGeneration(model.config)
    whole.model.load_state_dict(model.state_dict())
    whole.save_pretrained(tmp_path / "whole")
    wave = 0.1 * noise(1, RATE)
    expected = WhisperTeacher.load(whisper).features(wave, RATE, 12)
    for name in ("encoder", "whole"):  # without a preprocessor file: Whisper's own settings
        torch.testing.assert_close(WhisperTeacher.load(tmp_path / name).features(wave, RATE, 12), expected)
    (tmp_path / "whole" / "preprocessor_config.json").write_text(json.dumps({"feature_size": 80}))
    with pytest.raises(CheckpointError, match="makes 80 mel bands, the model reads 20"):
        WhisperTeacher.load(tmp_path / "whole")


@pytest.mark.parametrize(
    ("axis", "best", "worst"), [("feature", 0.0, 2.0), ("time", math.log1p(math.exp(-1)), math.log1p(math.exp(1)))]
)
def test_distillation_signs_and_what_it_ignores(axis: str, best: float, worst: float) -> None:
    teacher, other = noise(2, 6, 5), noise(2, 6, 5, seed=1)
    assert float(distillation_loss(teacher, teacher, axis)) == pytest.approx(best, abs=1e-5)
    assert float(distillation_loss(-teacher, teacher, axis)) == pytest.approx(worst, abs=1e-5)
    between = float(distillation_loss(other, teacher, axis))
    assert best + 0.1 < between < worst - 0.1
    per_step, per_channel = noise(2, 6, 1, seed=2).exp(), noise(2, 1, 5, seed=3).exp()
    free, bound = (per_step, per_channel) if axis == "feature" else (per_channel, per_step)
    assert float(distillation_loss(other * free, teacher, axis)) == pytest.approx(between, abs=1e-5)
    assert abs(float(distillation_loss(other * bound, teacher, axis)) - between) > 1e-3
    doubles = other.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: distillation_loss(x, teacher.double(), axis), doubles)


def test_distillation_gives_the_teacher_no_gradient_and_checks_shapes() -> None:
    student, teacher = noise(1, 3, 4).requires_grad_(), noise(1, 3, 4, seed=1).requires_grad_()
    distillation_loss(student, teacher).backward()
    assert teacher.grad is None and student.grad is not None
    with pytest.raises(ConfigError, match="project to the teacher's width"):
        distillation_loss(student, noise(1, 3, 5))
    with pytest.raises(ConfigError, match="axis 'depth'"):
        distillation_loss(student, teacher, "depth")  # type: ignore[arg-type]


def test_si_sdr_by_hand() -> None:
    time = torch.arange(1600) / 1600
    sine, cosine = (2 * math.pi * 5 * time).sin(), (2 * math.pi * 5 * time).cos()
    reference = torch.stack([sine, sine, sine, torch.zeros(1600), torch.zeros(1600)])
    estimate = torch.stack([sine + 0.1 * cosine, 3.0 * sine + 0.3 * cosine + 7.0, cosine, sine, torch.zeros(1600)])
    found = si_sdr(reference, estimate)
    assert found[:2].tolist() == pytest.approx([20.0, 20.0], abs=1e-3), "scale and offset do not count"
    assert float(found[2]) < -60 and float(found[3]) == pytest.approx(-120.0) and float(found[4]) == 0.0
    assert float(si_sdr(sine[None], -2.0 * sine[None])) == pytest.approx(120.0, abs=0.1)
    half = 0.5 * noise(2, 40, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: si_sdr(noise(2, 40, seed=8, dtype=torch.float64), x), half)
