"""`save_pretrained` of a packed model writes the stored form again, byte for byte, or says why it cannot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from ernie_elastic.compression import decompress_directory
from ernie_elastic.errors import CheckpointError, ConfigError
from tests.compression.conftest import CONFIGS, Pair, hashes

Pairs = Callable[[str], Pair]


def weights_and_small(folder: Path) -> dict[str, str]:
    """Hashes of what a save writes: everything but tokenizers and the stage's manifest."""
    return {k: v for k, v in hashes(folder).items() if not k.startswith("tokenizers/") and k != "manifest.json"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_saving_gives_identical_files(pairs: Pairs, name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    pair = pairs(name)
    pair.packed(dtype).save_pretrained(tmp_path / "saved")
    assert weights_and_small(tmp_path / "saved") == weights_and_small(pair.compressed)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    index = torch.arange(3, 14)[None]
    with torch.no_grad():
        assert torch.equal(again(index).logits, pair.dense()(index).logits)
    decompress_directory(tmp_path / "saved", tmp_path / "back")
    source = hashes(pair.source)
    assert all(source[name] == value for name, value in hashes(tmp_path / "back").items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_numbers_that_are_none_are_saved_too(pairs: Pairs, dtype: torch.dtype, tmp_path: Path) -> None:
    model = pairs("llama").packed(dtype)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    model.save_pretrained(tmp_path / "saved")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "saved").model.norm.weight[0].isnan()


def test_a_changed_weight_is_saved_or_refused_but_never_lost(pairs: Pairs, tmp_path: Path) -> None:
    model = pairs("llama").packed()
    norm = model.model.norm.weight
    norm.data[3] = 7.0  # a BF16 number
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert again.model.norm.weight[3] == 7.0
    norm.data[3] = 1.0 + 2**-20
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        model.save_pretrained(tmp_path / "other")
    assert not (tmp_path / "other").exists() and not list(tmp_path.glob(".other*"))


def test_another_class_and_a_narrow_dtype_are_refused(pairs: Pairs, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        AutoModel.from_pretrained(pairs("llama").compressed).save_pretrained(tmp_path / "a")
    with pytest.raises(CheckpointError, match="float16"):
        pairs("llama").packed(torch.float16).save_pretrained(tmp_path / "b")
    model = pairs("llama").packed()
    with pytest.raises(ConfigError, match="state_dict"):
        model.save_pretrained(tmp_path / "c", state_dict={"x": torch.zeros(1)})
    with pytest.raises(ValueError, match="not serializable"):
        PreTrainedModel.save_pretrained(model, tmp_path / "d")  # the class's own writer would leave a trap behind
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists() and not (tmp_path / "c").exists()
