"""The neural codec: streaming equals offline, nothing looks ahead, save and load, gradients, bad input."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ernie_elastic.errors import CheckpointError, ConfigError, DataError
from ernie_elastic.tokenizers.audio.base import AudioTokenizer
from ernie_elastic.tokenizers.audio.seanet import SeanetAudioTokenizer, SeanetAudioTokenizerConfig

STEP = 30
SPLITS = ({"split_semantic": False}, {"split_semantic": True, "code_dim": 6})


def tiny_config(**changes: object) -> SeanetAudioTokenizerConfig:
    fields: dict = {
        "sample_rate": 375,
        "strides": (5, 3, 2),
        "width": 4,
        "max_width": 16,
        "latent_width": 12,
        "num_levels": 3,
        "codebook_size": 16,
    }
    return SeanetAudioTokenizerConfig(**{**fields, **changes})


def tiny(**changes: object) -> SeanetAudioTokenizer:
    """A codec with random weights and code books started on random sound."""
    tokenizer = SeanetAudioTokenizer(tiny_config(**changes), seed=2).eval()
    with torch.no_grad():
        latent = tokenizer.latent(torch.randn(4, 20 * STEP, generator=torch.Generator().manual_seed(1)) * 0.3)
    tokenizer.quantizer.initialise(latent, torch.Generator().manual_seed(0))
    return tokenizer


@pytest.mark.parametrize("changes", SPLITS)
@pytest.mark.parametrize("piece", [1, 7, STEP, 45, 1000])
def test_streaming_equals_offline(piece: int, changes: dict) -> None:
    tokenizer, wave = tiny(**changes), torch.randn(13 * STEP + 11) * 0.3
    codes = tokenizer.encode(wave)
    assert codes.shape == (14, 3) and len(codes.unique()) > 5
    encoder = tokenizer.stream_encoder()
    parts = [encoder.push(part) for part in wave.split(piece)]
    assert sum(map(len, parts)) == 13  # a step is coded as soon as its samples are there
    assert torch.equal(torch.cat([*parts, encoder.finish()]), codes)
    whole = tokenizer.decode(codes)
    decoder = tokenizer.stream_decoder()
    waves = [decoder.push(part) for part in codes.split(max(1, piece // STEP))]
    assert [len(wave) for wave in waves] == [len(part) * STEP for part in codes.split(max(1, piece // STEP))]
    torch.testing.assert_close(torch.cat([*waves, decoder.finish()]), whole, atol=1e-5, rtol=0)


def test_streams_end_and_check_their_input() -> None:
    tokenizer = tiny()
    encoder, decoder = tokenizer.stream_encoder(), tokenizer.stream_decoder()
    assert encoder.push(torch.randn(STEP)).shape == (1, 3) and encoder.finish().shape == (0, 3)
    decoder.finish()
    for call in (
        lambda: encoder.push(torch.randn(4)),
        encoder.finish,
        lambda: decoder.push([[0, 0, 0]]),
        decoder.finish,
    ):
        with pytest.raises(DataError, match="was finished"):
            call()
    with pytest.raises(DataError, match="not finite"):
        tokenizer.stream_encoder().push(torch.tensor([float("nan")]))
    with pytest.raises(DataError, match=r"outside 0\.\.15"):
        tokenizer.stream_decoder().push([[16, 0, 0]])


def test_nothing_looks_ahead() -> None:
    tokenizer, wave = tiny(), torch.randn(10 * STEP) * 0.3
    changed = wave.clone()
    changed[6 * STEP :] = torch.randn(4 * STEP)
    (codes, latent), (other_codes, other_latent) = tokenizer.encode_with_components([wave, changed])
    assert torch.equal(codes[:6], other_codes[:6]) and torch.equal(latent[:6], other_latent[:6])
    assert not torch.equal(codes[6:], other_codes[6:])
    mixed = torch.cat([codes[:6], other_codes[6:]])
    assert torch.equal(tokenizer.decode(codes)[: 6 * STEP], tokenizer.decode(mixed)[: 6 * STEP])


def test_shapes_and_levels() -> None:
    tokenizer = tiny()
    for length in (1, STEP - 1, STEP, STEP + 1):
        codes, latent = tokenizer.encode_with_components([torch.randn(length)])[0]
        steps = -(-length // STEP)
        assert codes.shape == (steps, 3) and codes.dtype == torch.int64 and latent.shape == (steps, 12)
        for levels in (1, 2, 3):
            decoded = tokenizer.decode(codes[:, :levels])
            assert decoded.shape == (steps * STEP,) and float(decoded.abs().max()) <= 1
    with pytest.raises(DataError, match="mono"):
        tokenizer.encode(torch.randn(2, 100))
    with pytest.raises(DataError, match="codes have shape"):
        tokenizer.decode(torch.zeros(4, 4, dtype=torch.long))


def test_results_do_not_depend_on_the_batch() -> None:
    tokenizer = tiny()
    waves = [torch.randn(length) * 0.3 for length in (300, 77, 300, 61)]
    together = tokenizer.encode_with_components(waves)
    for wave, (codes, latent) in zip(waves, together, strict=True):
        alone = tokenizer.encode_with_components([wave])[0]
        assert torch.equal(alone[0], codes) and torch.equal(alone[1], latent)
    decoded = tokenizer.decode_batch([codes for codes, _ in together])
    assert all(torch.equal(tokenizer.decode(codes), wave) for (codes, _), wave in zip(together, decoded, strict=True))


@pytest.mark.parametrize("changes", SPLITS)
def test_save_and_load_are_bit_equal(changes: dict, tmp_path: Path) -> None:
    tokenizer = tiny(**changes)
    tokenizer.save(tmp_path)
    loaded = AudioTokenizer.load(tmp_path)
    assert isinstance(loaded, SeanetAudioTokenizer) and loaded.config == tokenizer.config and not loaded.training
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in tokenizer.state_dict().items())
    wave = torch.randn(301)
    assert torch.equal(loaded.encode(wave), tokenizer.encode(wave))
    (tmp_path / "tokenizer.safetensors").unlink()
    with pytest.raises(CheckpointError, match="does not exist"):
        AudioTokenizer.load(tmp_path)


@pytest.mark.parametrize("changes", SPLITS)
def test_gradients_reach_the_encoder_through_the_quantiser(changes: dict) -> None:
    tokenizer = tiny(**changes)
    found = tokenizer.quantise(tokenizer.latent(torch.randn(2, 5 * STEP)))
    tokenizer.wave(found.features).square().sum().backward()
    missing = [name for name, p in tokenizer.named_parameters() if p.grad is None or not bool(p.grad.any())]
    assert missing == []


def test_semantic_features_are_those_of_level_0() -> None:
    tokenizer = tiny(split_semantic=True, code_dim=6)
    latent = tokenizer.latent(torch.randn(2, 5 * STEP)).detach().requires_grad_()
    semantic = tokenizer.semantic_features(latent)
    codes = tokenizer.quantise(latent).codes[:, :, 0]
    assert semantic.shape == (2, 5, tokenizer.config.semantic_width)
    torch.testing.assert_close(semantic, tokenizer.quantizer.codebooks_QVD[0][codes], atol=1e-5, rtol=0)
    semantic.sum().backward()
    assert latent.grad is not None and bool(latent.grad.any())


def test_the_seed_alone_decides_the_start() -> None:
    torch.manual_seed(11)
    first = SeanetAudioTokenizer(tiny_config(), seed=4).state_dict()
    draw = torch.rand(1)
    torch.manual_seed(11)
    assert torch.equal(draw, torch.rand(1))  # construction leaves the global generator alone
    second, other = (SeanetAudioTokenizer(tiny_config(), seed=seed).state_dict() for seed in (4, 5))
    assert all(torch.equal(second[name], value) for name, value in first.items())
    assert any(not torch.equal(other[name], value) for name, value in first.items())


def test_the_defaults_run_at_12_5_steps_a_second() -> None:
    for rate, strides in ((24000, (8, 6, 5, 4, 2)), (16000, (8, 5, 4, 4, 2))):
        config = SeanetAudioTokenizerConfig(sample_rate=rate, strides=strides)
        assert config.sample_rate / config.step_samples == 12.5
        assert config.num_components == config.latent_width


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strides": ()}, "strides \\[\\]"),
        ({"dilations": (0,)}, "dilations \\[0\\]"),
        ({"width": 1}, "width 1"),
        ({"max_width": 2}, "max_width 2"),
        ({"num_levels": 1}, "split_semantic with 1 level"),
        ({"sample_rate": 0}, "sample_rate is 0"),
    ],
)
def test_bad_configs_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_config(**changes)
