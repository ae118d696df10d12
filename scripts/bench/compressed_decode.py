"""Whole models: text tokens/s at batch 1 on the CPU, compressed weights and the fused kernel against plain BF16.

Each model (random weights of 300 M parameters and more, BF16 on disk) is saved, compressed, and loaded by
`from_pretrained`; ours computes in float32 with weights that stay packed. Peers are the same model: `bf16` computes in
BF16, `fp32` in float32 (twice the bytes), both dense, with the faster of the experts' back ends that run here. All
decode greedily by Transformers' `generate` with its cache, in turn; a row counts the tokens after the prompt.
`resident` is what the weights take in memory.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from bench.common import Row, interleave
from ernie_elastic.compression import compress_directory, resident_weight_bytes, set_kernel
from ernie_elastic.modeling import ErnieElasticConfig, ErnieElasticForCausalLM

PEERS = ("bf16", "fp32")
PROMPT, NEW_TOKENS = 8, 24
BACK_ENDS = ("eager", "grouped_mm", "batched_mm")
QUICK = {"hidden_size": 256, "num_hidden_layers": 2, "vocab_size": 1024}


def models(quick: bool) -> dict[str, Callable[[], nn.Module]]:
    """A maker for each model by name."""
    small: dict[str, Any] = QUICK if quick else {}
    dense: dict[str, Any] = {
        "hidden_size": 1536, "intermediate_size": 4608, "num_hidden_layers": 14, "num_attention_heads": 12,
        "num_key_value_heads": 12, "vocab_size": 32000, **small,
    }  # fmt: skip
    if quick:
        dense |= {"intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4}
    sparse: dict[str, Any] = {
        "hidden_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 8, "num_key_value_heads": 4,
        "head_dim": 128, "vocab_size": 32000, "moe_intermediate_size": 512, "num_experts": 16,
        "num_experts_per_tok": 4, **small,
    }  # fmt: skip
    if quick:
        sparse |= {"moe_intermediate_size": 128, "num_attention_heads": 4, "head_dim": 64}
    return {
        "ernie_elastic": lambda: ErnieElasticForCausalLM(ErnieElasticConfig(**sparse)),
        "Qwen3-MoE": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**sparse, intermediate_size=512, mlp_only_layers=[])),
        "Llama": lambda: LlamaForCausalLM(LlamaConfig(**dense)),
    }


def run(quick: bool) -> list[Row]:
    """Two rows per model: tokens/s and resident bytes."""
    rows = []
    for name, make in models(quick).items():
        with tempfile.TemporaryDirectory(prefix="compressed_decode_") as folder:
            torch.manual_seed(0)
            model = make().to(torch.bfloat16)
            count = sum(parameter.numel() for parameter in model.parameters())
            model.save_pretrained(Path(folder) / "plain")  # type: ignore[operator]
            del model
            compress_directory(Path(folder) / "plain", Path(folder) / "packed")
            rows += measure(f"{name} {count / 1e6:.0f} M", Path(folder), 3 if quick else 7)
    return rows


def measure(case: str, folder: Path, repeats: int) -> list[Row]:
    """The rows of the model saved in `folder`/plain and compressed in `folder`/packed."""
    ours = AutoModelForCausalLM.from_pretrained(folder / "packed", dtype=torch.float32)
    set_kernel(ours, "fused")
    loaded = {
        "ours": ours,
        "bf16": fastest(AutoModelForCausalLM.from_pretrained(folder / "plain", dtype=torch.bfloat16)),
        "fp32": fastest(AutoModelForCausalLM.from_pretrained(folder / "plain", dtype=torch.float32)),
    }
    variants = {name: generator(model) for name, model in loaded.items()}
    speed = {name: NEW_TOKENS / value for name, value in interleave(variants, repeats).items()}
    size = {name: resident_weight_bytes(model) / 1e6 for name, model in loaded.items()}
    return [
        Row(f"{case}, decode", speed.pop("ours"), speed, "tokens/s", higher_is_better=True),
        Row(f"{case}, resident", size.pop("ours"), size, "MB", higher_is_better=False),
    ]


def generator(model: Any) -> Callable[[int], Any]:
    """Greedy decoding of NEW_TOKENS tokens after a prompt, whose own step counts as the first one's."""
    torch.manual_seed(1)
    prompt = torch.randint(3, model.config.vocab_size, (1, PROMPT))
    config = copy.deepcopy(model.generation_config)
    config.update(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0)
    return lambda _: model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config)


def fastest(model: Any) -> Any:
    """The model with the experts' back end that decodes fastest here; a dense one as it is."""
    if not hasattr(model.config, "num_experts"):
        return model
    seconds = {}
    for name in BACK_ENDS:
        try:
            model.set_experts_implementation(name)
            step = generator(model)
            step(0)
            begin = time.perf_counter()
            step(1)
            seconds[name] = time.perf_counter() - begin
        except (ValueError, RuntimeError, KeyError, NotImplementedError):
            continue  # a back end that this model or machine does not have
    model.set_experts_implementation(min(seconds, key=lambda name: seconds[name]))
    return model
