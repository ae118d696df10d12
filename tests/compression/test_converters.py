"""Streams and Transformers' own renaming of checkpoint keys: none is caught, and every loaded weight has its bits."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from transformers import conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, WeightTransform, rename_source_key

from ernie_elastic.compression import PackedTensor
from ernie_elastic.compression.container import STREAM_PREFIX
from tests.compression.conftest import Pair

Pairs = Callable[[str], Pair]
KEYS = [f"{STREAM_PREFIX}{number}" for number in (0, 7, 12, 3456)]
# What the quantizer tells the loader to pass over.
IGNORED = re.compile(rf"(^|\.){STREAM_PREFIX}\d+$")


def renamed(key: str, transforms: list[WeightTransform]) -> tuple[str, str | None]:
    """The key as the loader would look it up, and the source pattern of the converter that takes it, if any."""
    renamings = [item for item in transforms if isinstance(item, WeightRenaming)]
    converters = [item for item in transforms if isinstance(item, WeightConverter)]
    assert len(renamings) + len(converters) == len(transforms)
    return rename_source_key(key, renamings, converters)


def test_no_converter_of_transformers_takes_a_stream() -> None:
    conversion_mapping.get_checkpoint_conversion_mapping("llama")  # builds the table
    table = conversion_mapping._checkpoint_conversion_mapping_cache
    assert table is not None and {"mixtral", "qwen2_moe", "qwen3_moe", "olmoe"} <= set(table)
    for model_type in table:
        for key in KEYS:
            transforms = conversion_mapping.get_checkpoint_conversion_mapping(model_type)
            assert transforms is not None
            found, pattern = renamed(key, transforms)
            assert pattern is None, f"{model_type}: {key} is taken by {pattern}"
            assert IGNORED.search(found), f"{model_type}: {key} becomes {found}, which is not passed over"


def test_a_key_with_the_real_name_would_be_taken() -> None:
    """Why streams are numbered: the check above notices what it looks for."""
    transforms = conversion_mapping.get_checkpoint_conversion_mapping("qwen3_moe")
    assert transforms is not None
    _, pattern = renamed(f"model.layers.0.mlp.experts.3.gate_proj.weight.{STREAM_PREFIX}0", transforms)
    assert pattern is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "llama_tied", "qwen3_moe", "olmoe", "mixtral", "tiny_moe"])
def test_every_weight_has_the_bits_of_the_dense_model(pairs: Pairs, name: str, dtype: torch.dtype) -> None:
    packed, dense = pairs(name).packed(dtype), pairs(name).dense(dtype)
    expected = dense.state_dict()
    assert len(expected) > 10
    kept = 0
    for key, weight in expected.items():
        path, _, attribute = key.rpartition(".")
        found = getattr(packed.get_submodule(path), attribute)
        if isinstance(found, PackedTensor):
            found, kept = found.decode(), kept + 1
        assert found.dtype == weight.dtype and found.shape == weight.shape, key
        assert torch.equal(found.view(torch.uint8), weight.view(torch.uint8)), key
    assert kept == (0 if name.startswith("llama") else 4)
