"""Transformers' codecs behind our interface, on tiny models with random weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from ernie_elastic.errors import CheckpointError, ConfigError, DataError
from ernie_elastic.tokenizers.audio.adapters import (  # fmt: skip
    ADAPTERS,
    CodecAdapter,
    DacTokenizer,
    EncodecTokenizer,
    MimiTokenizer,
    adapter_from_directory,
)
from ernie_elastic.tokenizers.audio.base import AudioTokenizer

STEPS = {"mimi": 48, "encodec": 24, "dac": 30}
LEVELS = {"mimi": 4, "encodec": 3, "dac": 3}


def tiny_model(kind: str, **changes: object) -> transformers.PreTrainedModel:
    """A codec of that type with random weights and code books that are not all zero."""
    torch.manual_seed(3)
    if kind == "mimi":
        fields: dict = {
            "sampling_rate": 2400, "hidden_size": 16, "num_filters": 4, "upsampling_ratios": [6, 4],
            "codebook_size": 16, "codebook_dim": 8, "num_quantizers": 4, "vector_quantization_hidden_dimension": 8,
            "num_hidden_layers": 1, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2,
            "sliding_window": 8, "upsample_groups": 16,
        }  # fmt: skip
        model = transformers.MimiModel(transformers.MimiConfig(**{**fields, **changes}))
    elif kind == "encodec":
        fields: dict = {
            "sampling_rate": 2400, "hidden_size": 16, "num_filters": 4, "upsampling_ratios": [6, 4],
            "codebook_size": 16, "target_bandwidths": [0.4, 1.2], "num_lstm_layers": 1,
        }  # fmt: skip
        model = transformers.EncodecModel(transformers.EncodecConfig(**{**fields, **changes}))
    else:
        fields: dict = {
            "sampling_rate": 3000, "encoder_hidden_size": 4, "downsampling_ratios": [2, 3, 5],
            "decoder_hidden_size": 32, "n_codebooks": 3,
            "codebook_size": 16, "codebook_dim": 4, "quantizer_dropout": 1.0,
        }  # fmt: skip
        model = transformers.DacModel(transformers.DacConfig(**{**fields, **changes}))
    for name, value in model.named_buffers():
        if name.endswith(("embed", "embed_sum")):
            value.normal_(std=0.03 if kind == "encodec" else 1.0)  # about the spread of the features
    return model.eval()


@pytest.fixture(params=["mimi", "encodec", "dac"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def directory(kind: str, tmp_path: Path) -> Path:
    tiny_model(kind).save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def direct_codes(kind: str, directory: Path, wave_L: torch.Tensor) -> torch.Tensor:
    """Codes [S, Q] by the Transformers model itself."""
    model = getattr(transformers, ADAPTERS[kind].model_class).from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        if kind == "encodec":
            return model.encode(wave_L[None, None], bandwidth=1.2).audio_codes[0, 0].T
        return model.encode(wave_L[None, None]).audio_codes[0].T


def test_codes_are_those_of_the_model_itself(kind: str, directory: Path) -> None:
    wave_L = torch.randn(9 * STEPS[kind]) * 0.3
    tokenizer = adapter_from_directory(directory)
    codes_SQ = tokenizer.encode(wave_L)
    assert codes_SQ.dtype == torch.int64 and len(codes_SQ.unique()) > 3
    assert torch.equal(codes_SQ, direct_codes(kind, directory, wave_L))
    assert not tokenizer.train().model.training and not any(p.requires_grad for p in tokenizer.parameters())


def test_the_config_says_what_the_model_is(kind: str, directory: Path) -> None:
    config = adapter_from_directory(directory).config
    assert (config.step_samples, config.num_levels, config.codebook_size) == (STEPS[kind], LEVELS[kind], 16)
    assert config.num_components == (16 if kind != "dac" else 32) and config.sample_rate == (
        3000 if kind == "dac" else 2400
    )


@pytest.mark.parametrize("length", [1, 47, 48, 49, 301])
def test_shapes_of_odd_lengths(kind: str, directory: Path, length: int) -> None:
    tokenizer = adapter_from_directory(directory)
    wave_L = np.random.default_rng(0).normal(size=length).astype(np.float32) * 0.3
    (codes_SQ, components_SC), (again_SQ, _) = tokenizer.encode_with_components([wave_L, wave_L])
    steps = -(-length // STEPS[kind])
    assert codes_SQ.shape == (steps, LEVELS[kind]) and components_SC.shape == (steps, tokenizer.config.num_components)
    assert torch.equal(codes_SQ, again_SQ) and components_SC.dtype == torch.float32
    for levels in (1, LEVELS[kind]):
        decoded_L = tokenizer.decode(codes_SQ[:, :levels])
        assert decoded_L.shape == (steps * STEPS[kind],) and decoded_L.dtype == torch.float32
        assert float(decoded_L.abs().max()) <= 1 and bool(decoded_L.any())
        assert torch.equal(decoded_L, tokenizer.decode(codes_SQ[:, :levels]))


def test_components_are_what_is_quantised(kind: str, directory: Path) -> None:
    tokenizer = adapter_from_directory(directory)
    codes_SQ, components_SC = tokenizer.encode_with_components([torch.randn(400) * 0.3])[0]
    assert torch.equal(tokenizer._codes(components_SC.T[None])[0].T, codes_SQ)


def test_fewer_levels_are_the_first_ones(kind: str, directory: Path) -> None:
    wave_L = torch.randn(400) * 0.3
    whole, one = adapter_from_directory(directory), adapter_from_directory(directory, num_levels=1)
    assert one.num_levels == 1
    assert torch.equal(one.encode(wave_L), whole.encode(wave_L)[:, :1])
    with pytest.raises(ConfigError, match=f"num_levels 9 is not in 1..{LEVELS[kind]}"):
        adapter_from_directory(directory, num_levels=9)
    with pytest.raises(DataError, match="codes have shape"):
        one.decode(whole.encode(wave_L))


def test_a_saved_adapter_loads_alone(kind: str, directory: Path, tmp_path: Path) -> None:
    tokenizer = ADAPTERS[kind].from_directory(directory, num_levels=2)
    tokenizer.save(tmp_path / "saved")
    for path in sorted(directory.iterdir()):
        path.unlink()  # the saved directory needs nothing of its source
    loaded = AudioTokenizer.load(tmp_path / "saved")
    assert type(loaded) is type(tokenizer) and loaded.config == tokenizer.config
    assert (tmp_path / "saved" / "model" / "model.safetensors").is_file()
    wave_L = torch.randn(333) * 0.3
    codes_SQ = tokenizer.encode(wave_L)
    assert torch.equal(loaded.encode(wave_L), codes_SQ)
    assert torch.equal(loaded.decode(codes_SQ), tokenizer.decode(codes_SQ))


def test_another_model_is_refused_by_name(directory: Path, kind: str, tmp_path: Path) -> None:
    other: type[CodecAdapter] = DacTokenizer if kind != "dac" else MimiTokenizer
    with pytest.raises(
        CheckpointError, match=f"type '{kind}'; {other.__name__} reads '{other.model_type}'.*dac, encodec, mimi"
    ):
        other.from_directory(directory)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(CheckpointError, match="type 'bert'; audio codecs that can be read: dac, encodec, mimi"):
        adapter_from_directory(tmp_path)
    with pytest.raises(CheckpointError, match="is no config of a Transformers model"):
        adapter_from_directory(tmp_path / "absent")


def test_a_checkpoint_with_missing_weights_is_refused(directory: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = directory / "model.safetensors"
    tensors = load_file(path)
    lost = next(name for name in sorted(tensors) if "decoder" in name and name.endswith(("weight", "original0")))
    del tensors[lost]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="lacks 1 weights"):
        adapter_from_directory(directory)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("encodec", {"audio_channels": 2}, "2 channels"),
        ("encodec", {"normalize": True}, "normalize True"),
        ("encodec", {"chunk_length_s": 1.0, "overlap": 0.01}, "chunk_length_s 1.0"),
        ("mimi", {"audio_channels": 2}, "2 channels"),
        ("mimi", {"decoder_config": None}, "encoder or decoder half"),
    ],
)
def test_what_is_not_supported_is_refused(kind: str, changes: dict, message: str, tmp_path: Path) -> None:
    tiny_model(kind, **changes).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=message):
        adapter_from_directory(tmp_path)


def test_a_saved_adapter_whose_model_is_gone_is_an_error(tmp_path: Path) -> None:
    EncodecTokenizer(tiny_model("encodec")).save(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["architecture"] == "encodec"
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError):
        AudioTokenizer.load(tmp_path)
