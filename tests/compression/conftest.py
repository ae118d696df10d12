"""Tiny random BF16 checkpoints of several kinds, saved once a session, and their compressed directories."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from ernie_elastic.compression import compress_directory

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 100,
    "intermediate_size": 90,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS: dict[str, Any] = {"num_experts": 7, "num_experts_per_tok": 2}


def tiny_moe() -> ModuleType:
    """The out-of-tree model of tiny_moe.py, registered with the Auto classes."""
    if "tiny_moe" not in sys.modules:
        spec = importlib.util.spec_from_file_location("tiny_moe", Path(__file__).with_name("tiny_moe.py"))
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["tiny_moe"] = module
        spec.loader.exec_module(module)
        AutoConfig.register("tiny_moe_for_tests", module.TinyMoeConfig)
        AutoModelForCausalLM.register(module.TinyMoeConfig, module.TinyMoe)
    return sys.modules["tiny_moe"]


CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SIZES, attention_bias=True),
    "llama_tied": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen3_moe": lambda: Qwen3MoeConfig(**SIZES, **EXPERTS, moe_intermediate_size=72, mlp_only_layers=[]),
    "olmoe": lambda: OlmoeConfig(**{**SIZES, "intermediate_size": 68, "hidden_size": 96}, **EXPERTS),
    "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=5, num_experts_per_tok=2),
    "gpt_oss": lambda: GptOssConfig(**SIZES, num_local_experts=5, num_experts_per_tok=2),
    "tiny_moe": lambda: tiny_moe().TinyMoeConfig(),
}


def randomise(model: PreTrainedModel) -> None:
    """Distinct values everywhere, norms and biases included, so that a mix-up cannot go unnoticed."""
    generator = torch.Generator().manual_seed(11)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = (noise * 0.05 if parameter.ndim > 1 else 1 + noise * 0.1).to(torch.bfloat16)


@dataclass(frozen=True)
class Pair:
    """A source directory and its compressed twin."""

    name: str
    source: Path
    compressed: Path
    report: dict[str, Any]

    def dense(self, dtype: torch.dtype = torch.float32, **kwargs: Any) -> PreTrainedModel:
        """The source model, experts as the loop."""
        if self.name not in ("llama", "llama_tied"):
            kwargs["experts_implementation"] = "eager"
        return AutoModelForCausalLM.from_pretrained(self.source, dtype=dtype, **kwargs)

    def packed(self, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Any:
        """The compressed model."""
        return AutoModelForCausalLM.from_pretrained(self.compressed, dtype=dtype, **kwargs)


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """A function name -> Pair; each is made once."""
    made: dict[str, Pair] = {}

    def get(name: str) -> Pair:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            torch.manual_seed(3)
            config = CONFIGS[name]()
            model = AutoModelForCausalLM.from_config(config)
            randomise(model)
            model.config.dtype = torch.bfloat16
            model.save_pretrained(folder / "source", max_shard_size="300KB" if name == "qwen3_moe" else "50GB")
            if name == "tiny_moe":
                shutil.copyfile(Path(__file__).with_name("tiny_moe.py"), folder / "source" / "tiny_moe.py")
            nested = folder / "source" / "tokenizers" / "visual"
            nested.mkdir(parents=True)
            (nested / "manifest.json").write_text("{}")
            (nested / "model.safetensors").write_bytes(b"not touched")
            report = compress_directory(folder / "source", folder / "compressed")
            made[name] = Pair(name, folder / "source", folder / "compressed", report)
        return made[name]

    return get


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a directory."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
