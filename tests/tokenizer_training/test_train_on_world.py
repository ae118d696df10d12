"""The stage `train-tokenizer` at smoke size: files, health, manifest, repeatability, errors."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from ernie_elastic.errors import CheckpointError, ConfigError
from ernie_elastic.stages import directory_hash, read_manifest
from ernie_elastic.tokenizer_training.train_on_world import (
    KINDS,
    TokenizerKind,
    TokenizerTrainingConfig,
    train_tokenizer,
)
from ernie_elastic.tokenizers.audio.base import AudioTokenizer
from ernie_elastic.tokenizers.audio.spectral import SpectralAudioTokenizerConfig
from ernie_elastic.tokenizers.text.tokenizer import TextTokenizer
from ernie_elastic.tokenizers.visual.base import VisualTokenizer
from ernie_elastic.tokenizers.visual.patch import PatchVisualTokenizerConfig

SMOKE = TokenizerTrainingConfig.smoke()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    root = tmp_path_factory.mktemp("tokenizers")
    return root, {kind: train_tokenizer(kind, root / kind, SMOKE) for kind in KINDS}  # type: ignore[arg-type]


def test_each_directory_is_whole_and_says_how_it_was_made(made: tuple[Path, dict[str, dict[str, Any]]]) -> None:
    root, health = made
    assert sorted(path.name for path in root.iterdir()) == sorted(KINDS)  # no temporary directory is left
    for kind in KINDS:
        manifest = read_manifest(root / kind, (f"train-tokenizer-{kind}",), verify=True)
        assert manifest.extra["health"] == json.loads((root / kind / "health.json").read_text()) == health[kind]
        assert manifest.config == SMOKE.resolved(kind)  # type: ignore[arg-type]


def test_each_loads_and_has_the_sizes_of_the_full_one(made: tuple[Path, dict[str, dict[str, Any]]]) -> None:
    root, health = made
    assert TextTokenizer.load(root / "text").vocab_size == health["text"]["vocabulary"]
    assert health["text"]["round_trip_share"] == 1.0
    visual, audio = VisualTokenizer.load(root / "visual"), AudioTokenizer.load(root / "audio")
    assert visual.config.num_bits == TokenizerTrainingConfig().visual.num_bits
    assert len(health["visual"]["psnr_db_by_scales"]) == len(visual.config.scales)
    assert audio.config == TokenizerTrainingConfig().audio and len(health["audio"]["levels"]) == audio.num_levels
    assert set(health["visual"]) >= {"psnr_db", "bits_used", "checker_1_object", "checker_2_object", "checker_video"}
    assert set(health["audio"]) >= {"checker_notes", "checker_syllables"}


def test_samples_show_originals_and_reconstructions(made: tuple[Path, dict[str, dict[str, Any]]]) -> None:
    root, _ = made
    visual, audio = VisualTokenizer.load(root / "visual"), AudioTokenizer.load(root / "audio")
    sheet = np.asarray(Image.open(root / "visual" / "samples.png"))[::3, ::3]
    rows = sheet.reshape(1 + len(visual.config.scales), 32, -1, 32, 3).swapaxes(1, 2)
    assert torch.equal(visual.reconstruct(torch.from_numpy(rows[0].copy())), torch.from_numpy(rows[-1].copy()))
    original, rate = soundfile.read(root / "audio" / "notes-0-original.wav", dtype="float32")
    decoded, _ = soundfile.read(root / "audio" / "notes-0-decoded.wav", dtype="float32")
    assert rate == 16000 and original.std() > 0.01
    expected = audio.decode(audio.encode(original)).numpy()
    assert np.abs(np.abs(np.fft.rfft(expected)) - np.abs(np.fft.rfft(decoded))).mean() < 1.0


@pytest.mark.parametrize("kind", ["text", "audio"])
def test_the_same_config_gives_the_same_directory(
    kind: TokenizerKind, made: tuple[Path, dict[str, dict[str, Any]]], tmp_path: Path
) -> None:
    train_tokenizer(kind, tmp_path / kind, SMOKE)
    assert directory_hash(tmp_path / kind) == directory_hash(made[0] / kind)


def test_a_manifest_depends_on_its_own_kind_only() -> None:
    changed = dataclasses.replace(SMOKE, audio=SpectralAudioTokenizerConfig(num_levels=2))
    assert changed.resolved("text") == SMOKE.resolved("text") and changed.resolved("audio") != SMOKE.resolved("audio")
    reseeded = dataclasses.replace(SMOKE, seed=1)
    assert all(reseeded.resolved(kind) != SMOKE.resolved(kind) for kind in KINDS)  # type: ignore[arg-type]


def test_the_numbers_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_tokenizer("text", tmp_path / "text", SMOKE)
    said = capsys.readouterr().out
    assert "bytes per token" in said and str(tmp_path / "text") in said


def test_an_existing_output_is_kept_unless_overwrite_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "mine").write_text("x")
    with pytest.raises(CheckpointError, match="exists already"):
        train_tokenizer("text", tmp_path / "text", SMOKE)
    assert (tmp_path / "text" / "mine").exists()
    train_tokenizer("text", tmp_path / "text", SMOKE, overwrite=True)
    assert not (tmp_path / "text" / "mine").exists()


def test_parts_that_do_not_fit_are_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'speech' is not one of text, visual, audio"):
        train_tokenizer("speech", tmp_path / "x", SMOKE)  # type: ignore[arg-type]
    big = PatchVisualTokenizerConfig(image_size=64, patch=16)
    with pytest.raises(ConfigError, match="image_size 64, world pictures 32"):
        train_tokenizer("visual", tmp_path / "x", dataclasses.replace(SMOKE, visual=big))
    other_rate = SpectralAudioTokenizerConfig(sample_rate=24000, step_samples=1920)
    with pytest.raises(ConfigError, match="24000 Hz in steps of 1920 samples, the world has 16000 Hz and 1280"):
        train_tokenizer("audio", tmp_path / "x", dataclasses.replace(SMOKE, audio=other_rate))
    with pytest.raises(ConfigError, match="clips is 0"):
        dataclasses.replace(SMOKE, clips=0)
    assert not list(tmp_path.iterdir())
