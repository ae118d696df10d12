"""The visual tokenizer: shapes, locality, files and errors; tests/training/test_tokenizer_visual.py has its quality."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ernie_elastic.errors import CheckpointError, ConfigError, DataError
from ernie_elastic.tokenizers.visual.base import VisualTokenizer
from ernie_elastic.tokenizers.visual.patch import PatchVisualTokenizer, PatchVisualTokenizerConfig

CONFIG = PatchVisualTokenizerConfig(num_bits=6, width=16)


WRONG_PIXELS = [
    torch.zeros(1, 16, 16, 3, dtype=torch.uint8), torch.zeros(1, 32, 32, 3),
    torch.zeros(1, 32, 32, 2, dtype=torch.uint8), np.zeros((32, 32, 3), np.uint8),
]  # fmt: skip


def make(config: PatchVisualTokenizerConfig = CONFIG) -> VisualTokenizer:
    tokenizer = PatchVisualTokenizer(config)
    tokenizer.encoder.normalise.running_mean += torch.randn(config.num_bits)  # so that loading has to restore it
    return tokenizer.eval()


def pixels(count: int, size: int = 32) -> torch.Tensor:
    return torch.randint(256, (count, size, size, 3), dtype=torch.uint8)


def test_shapes_dtypes_and_determinism() -> None:
    tokenizer, given = make(), pixels(3)
    latent = tokenizer.encode(given)
    assert latent.shape == (3, 4, 4, 6) and latent.dtype == torch.float32 and not latent.requires_grad
    assert torch.equal(latent, tokenizer.encode(given.numpy()))
    feature = tokenizer.quantizer.encode(latent).total
    picture = tokenizer.decode(feature)
    assert picture.shape == (3, 32, 32, 3) and picture.dtype == torch.uint8
    assert torch.equal(picture, tokenizer.decode(feature)) and torch.equal(picture, tokenizer.reconstruct(given))


def test_patches_and_pixels_are_inverses_and_rows_stay_rows() -> None:
    tokenizer, given = make(), pixels(2)
    patches = tokenizer.patches(given)
    assert torch.equal(tokenizer.pixels(patches), given)
    corner = given[0, 8:16, 24:32].float() / 127.5 - 1  # second row, last column
    torch.testing.assert_close(patches[0, 1, 3], corner.flatten())


def test_many_pictures_equal_few() -> None:
    tokenizer, given = make(), pixels(600)  # more than one internal batch
    latent = tokenizer.encode(given)
    torch.testing.assert_close(latent[515:520], tokenizer.encode(given[515:520]))
    assert len(tokenizer.decode(latent)) == 600


def test_a_patch_decides_the_latent_of_its_own_position_only() -> None:
    tokenizer, given = make(), pixels(1)
    changed = given.clone()
    changed[0, 8:16, 16:24] = 255 - changed[0, 8:16, 16:24]
    difference = (tokenizer.encode(given) - tokenizer.encode(changed)).abs().amax(dim=3)[0]
    assert difference[1, 2] > 1e-3
    difference[1, 2] = 0
    assert float(difference.max()) < 1e-5


def test_saved_and_loaded_is_bit_equal(tmp_path: Path) -> None:
    tokenizer, given = make(), pixels(2)
    tokenizer.save(tmp_path)
    loaded = VisualTokenizer.load(tmp_path)
    assert loaded.config == tokenizer.config and not loaded.training
    assert torch.equal(loaded.encode(given), tokenizer.encode(given))
    assert torch.equal(loaded.reconstruct(given), tokenizer.reconstruct(given))
    loaded.save(tmp_path / "again")
    for name in ("config.json", "tokenizer.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_other_sizes_work() -> None:
    config = PatchVisualTokenizerConfig(image_size=64, patch=8, num_bits=4, width=8, scales=((1, 1), (3, 3), (8, 8)),
                                   amplitudes=(0.3, 0.4, 0.8))  # fmt: skip
    tokenizer = make(config)
    assert config.bits_per_picture == 4 * (1 + 9 + 64)
    assert tokenizer.reconstruct(pixels(2, 64)).shape == (2, 64, 64, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch": 5}, "patch 5 does not divide"),
        ({"scales": ((1, 1), (2, 2))}, "must end with the grid"),
        ({"scales": ((1, 1), (2, 2), (9, 9), (4, 4))}, "in 1..4"),
        ({"amplitudes": (1.0,)}, "4 scales but 1 amplitudes"),
        ({"num_bits": 0}, "num_bits 0"),
    ],
)
def test_configs_that_cannot_work_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PatchVisualTokenizerConfig(**change)


@pytest.mark.parametrize("wrong", WRONG_PIXELS)
def test_wrong_pixels_are_refused(wrong: torch.Tensor) -> None:
    with pytest.raises(DataError, match=r"expected uint8 \[N, 32, 32, 3\]"):
        make().encode(wrong)


def test_wrong_feature_is_refused() -> None:
    with pytest.raises(DataError, match=r"expected \[N, 4, 4, 6\]"):
        make().decode(torch.zeros(1, 4, 4, 5))


def test_missing_or_damaged_files_are_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        VisualTokenizer.load(tmp_path)
    make().save(tmp_path)
    weights = tmp_path / "tokenizer.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="no whole visual tokenizer"):
        VisualTokenizer.load(tmp_path)
