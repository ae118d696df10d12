"""The audio tokenizer's shapes, batches, files and errors; its quality is in tests/training/test_tokenizer_audio.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ernie_elastic.errors import CheckpointError, ConfigError, DataError
from ernie_elastic.tokenizers.audio.base import AudioTokenizer
from ernie_elastic.tokenizers.audio.spectral import SpectralAudioTokenizer, SpectralAudioTokenizerConfig

CONFIG = SpectralAudioTokenizerConfig(num_components=8, num_levels=2, codebook_size=16)


def make(config: SpectralAudioTokenizerConfig = CONFIG) -> AudioTokenizer:
    tokenizer = SpectralAudioTokenizer(config)
    tokenizer.basis_FC.copy_(torch.linalg.qr(torch.randn(tokenizer.basis_FC.shape)).Q)
    tokenizer.codebooks_QVC.copy_(torch.randn(tokenizer.codebooks_QVC.shape) * 3)
    tokenizer.codebooks_QVC[:, 0] = 0.0
    return tokenizer.eval()


def noise(length: int) -> np.ndarray:
    return (torch.randn(length) * 0.1).numpy()


def test_waves_are_padded_to_whole_steps() -> None:
    tokenizer = make()
    for samples, steps in ((1, 1), (1280, 1), (1281, 2), (4 * 1280, 4)):
        codes = tokenizer.encode(noise(samples))
        assert codes.shape == (steps, 2) and codes.dtype == torch.int64
        assert set(codes.flatten().tolist()) <= set(range(16))
        wave = tokenizer.decode(codes)
        assert wave.shape == (steps * 1280,) and wave.dtype == torch.float32 and float(wave.abs().max()) <= 1


def test_a_batch_of_mixed_lengths_equals_one_by_one() -> None:
    tokenizer = make()
    waves = [noise(length) for length in (3000, 1280, 2561, 3000, 7 * 1280)]
    codes = tokenizer.encode_batch(waves)
    assert all(torch.equal(one, tokenizer.encode(wave)) for one, wave in zip(codes, waves, strict=True))
    mixed = [codes[0], codes[1][:, :1], codes[2], codes[3][:, :1], codes[4]]  # level counts mixed too
    for one, steps in zip(tokenizer.decode_batch(mixed), mixed, strict=True):
        torch.testing.assert_close(one, tokenizer.decode(steps), atol=1e-3, rtol=1e-2)
    assert tokenizer.encode_batch([]) == [] and tokenizer.decode_batch([]) == []


def test_both_ways_are_deterministic_and_take_arrays() -> None:
    tokenizer, wave = make(), noise(5000)
    codes = tokenizer.encode(wave)
    assert torch.equal(codes, tokenizer.encode(torch.from_numpy(wave)))
    assert torch.equal(tokenizer.decode(codes), tokenizer.decode(codes.numpy().astype(np.int16)))


def test_silence_is_code_zero_and_decodes_to_silence() -> None:
    tokenizer = make()
    codes = tokenizer.encode(np.zeros(2000, np.float32))
    assert not codes.any() and not tokenizer.decode(codes).any()


def test_saved_and_loaded_is_bit_equal(tmp_path: Path) -> None:
    tokenizer, wave = make(), noise(5000)
    tokenizer.save(tmp_path)
    loaded = AudioTokenizer.load(tmp_path)
    codes = loaded.encode(wave)
    assert loaded.config == tokenizer.config and torch.equal(codes, tokenizer.encode(wave))
    assert torch.equal(loaded.decode(codes), tokenizer.decode(codes))
    loaded.save(tmp_path / "again")
    for name in ("config.json", "tokenizer.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"hop": 96}, "hop 96"), ({"num_levels": 0}, "num_levels is 0"), ({"compression": 2.0}, "compression 2.0")],
)
def test_configs_that_cannot_work_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SpectralAudioTokenizerConfig(**change)


def test_bad_waves_and_codes_are_refused() -> None:
    tokenizer = make()
    for wave in (np.zeros(0, np.float32), np.zeros((2, 1280), np.float32)):
        with pytest.raises(DataError, match="expected mono"):
            tokenizer.encode(wave)
    with pytest.raises(DataError, match="not finite"):
        tokenizer.encode(np.full(1280, np.nan, np.float32))
    for codes in (torch.zeros(3, 3), torch.zeros(0, 2), torch.zeros(3)):
        with pytest.raises(DataError, match=r"expected \[steps >= 1, 1..2\]"):
            tokenizer.decode(codes.long())
    with pytest.raises(DataError, match=r"outside 0..15"):
        tokenizer.decode(torch.tensor([[0, 16]]))


def test_missing_or_damaged_files_are_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        AudioTokenizer.load(tmp_path)
    make().save(tmp_path)
    (tmp_path / "config.json").write_text('{"sample_rate": 16000}')
    with pytest.raises(CheckpointError, match="no whole audio tokenizer"):
        AudioTokenizer.load(tmp_path)
