"""The model against Transformers' Ernie4_5_Moe: a training step, many experts, memory, drawing from the cache.

Both models have equal dimensions, fp32, random weights, the same tokens; a step is forward and backward, the optimizer
is timed apart. `transformers_grouped` and `transformers_loop` are its two back ends; `recompute` runs all scales so far
at every scale; `positions` is what the cache would save if only positions counted; `experts_16` is our model with 16
experts.

Letters: B rows, T positions.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM

from bench.common import Row, interleave
from ernie_elastic.data.groups.grouping import build_document
from ernie_elastic.data.groups.tokens import Tokens
from ernie_elastic.data.packed.packing import collate
from ernie_elastic.generation.decoder import GroupDecoder, Sampling
from ernie_elastic.generation.visual import decode_visual
from ernie_elastic.modeling import ErnieElasticConfig, ErnieElasticForCausalLM
from ernie_elastic.modeling.back_ends import choose_experts_back_end
from ernie_elastic.modeling.document_layout import layout_of
from ernie_elastic.modeling.inputs import embed_batch
from ernie_elastic.modeling.masks import Places, SequenceMask

PEERS = ("transformers_grouped", "transformers_loop", "experts_16", "recompute", "positions")
SIZES: dict[str, Any] = {
    "vocab_size": 1024, "hidden_size": 256, "num_hidden_layers": 8, "num_attention_heads": 8,
    "num_key_value_heads": 4, "moe_intermediate_size": 128, "max_position_embeddings": 16384,
}  # fmt: skip
SCALES = [[1, 1], [2, 2], [4, 4], [6, 6], [8, 8], [12, 12], [16, 16]]


def our_model(experts: int, top_k: int) -> ErnieElasticForCausalLM:
    """Ours, with the experts' back end that training takes on this machine."""
    torch.manual_seed(0)
    config = ErnieElasticConfig(
        **SIZES, head_dim=32, num_experts=experts, num_experts_per_tok=top_k, qk_norm=False
    )  # fmt: skip
    model = ErnieElasticForCausalLM(config).train()
    choose_experts_back_end(model)
    return model


def their_model(back_end: str, experts: int, top_k: int) -> torch.nn.Module:
    """Transformers' model of the same dimensions."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {**SIZES, "head_dim": 32, "experts_implementation": back_end}
    config = Ernie4_5_MoeConfig(
        **sizes, moe_num_experts=experts, moe_k=top_k, moe_num_shared_experts=0, moe_layer_start_index=0
    )
    return Ernie4_5_MoeForCausalLM(config).train()


def train_step(model: torch.nn.Module, ids_BT: torch.Tensor) -> None:
    """Forward and backward on text; gradients are added to what is there."""
    model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss.backward()


def training_row(quick: bool) -> Row:
    """Tokens a second of one forward and backward on text."""
    experts, top_k = (16, 2) if quick else (64, 4)
    models: dict[str, torch.nn.Module] = {"ours": our_model(experts, top_k)}
    models["transformers_grouped"] = their_model("grouped_mm", experts, top_k)
    models["transformers_loop"] = their_model("eager", experts, top_k)
    ids_BT = torch.randint(10, SIZES["vocab_size"], (2, 256) if quick else (8, 256))

    def step(model: torch.nn.Module) -> Callable[[int], Any]:
        def run_step(_: int) -> None:
            for parameter in model.parameters():
                parameter.grad = None
            train_step(model, ids_BT)

        return run_step

    seconds = interleave({name: step(model) for name, model in models.items()}, 3 if quick else 9, warmup=2)
    tokens = ids_BT.numel()
    rates = {name: tokens / value for name, value in seconds.items()}
    case = f"text step, {experts} experts, top-{top_k}, {tokens} tokens"
    return Row(case, rates.pop("ours"), rates, "tokens/s", True)


def many_experts_rows(quick: bool) -> list[Row]:
    """Forward and backward with 256 experts against 16, gradients accumulated in place; the optimizer's step beside."""
    ids_BT = torch.randint(10, SIZES["vocab_size"], (2, 256) if quick else (16, 512))
    counts, top_k = (16, 64 if quick else 256), 4
    models = {count: our_model(count, top_k) for count in counts}
    optimizers = {}
    for count, model in models.items():
        for layer in model.model.layers:
            layer.mlp.experts.accumulate_into_grad = True
        optimizers[count] = torch.optim.AdamW(model.parameters(), foreach=True)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)

    def step(count: int) -> Callable[[int], Any]:
        return lambda _: train_step(models[count], ids_BT)

    def update(count: int) -> Callable[[int], Any]:
        return lambda _: optimizers[count].step()

    few, many = counts
    seconds = interleave({str(count): step(count) for count in counts}, 2 if quick else 5)
    updates = interleave({str(count): update(count) for count in counts}, 2 if quick else 5)
    case = f"{few} -> {many} experts, top-{top_k}, {ids_BT.numel()} tokens"
    return [
        Row(f"{case}, forward + backward", seconds[str(many)], {"experts_16": seconds[str(few)]}, "s", False),
        Row(f"{case}, AdamW step", updates[str(many)], {"experts_16": updates[str(few)]}, "s", False),
    ]


def memory_row(quick: bool) -> Row:
    """Growth of a process's peak memory from a small step to a large one, bytes a token; one process a step."""
    small, large = (512, 1024) if quick else (2048, 8192)
    names = {"ours": "ours", "transformers_grouped": "grouped_mm", "transformers_loop": "eager"}
    values = {
        name: (_peak_bytes(what, large) - _peak_bytes(what, small)) / (large - small) for name, what in names.items()
    }
    return Row(
        f"peak memory of a step, 64 experts, top-4, {large} tokens", values.pop("ours"), values, "bytes/token", False
    )


def _peak_bytes(what: str, tokens: int) -> float:
    code = f"from bench.model import print_peak; print_peak({what!r}, {tokens})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True
    )
    return float(done.stdout.split()[-1])


def print_peak(what: str, tokens: int) -> None:
    """Print the peak of this process's resident memory in bytes after one step."""
    model = our_model(64, 4) if what == "ours" else their_model(what, 64, 4)
    train_step(model, torch.randint(10, SIZES["vocab_size"], (tokens // 256, 256)))
    status = Path("/proc/self/status").read_text()
    print(1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))))


def decoding_rows(quick: bool) -> list[Row]:
    """Milliseconds to draw one picture of seven scales after a prompt, cached against recomputing every scale."""
    return [_drawing_row(prompt, 2 if quick else 7) for prompt in ((64,) if quick else (512, 0))]


def _drawing_row(prompt_length: int, repeats: int) -> Row:
    torch.manual_seed(0)
    config = ErnieElasticConfig(
        **SIZES, head_dim=32, num_experts=16, num_experts_per_tok=2, visual_bits=16, visual_scales=SCALES,
        visual_amplitudes=[0.5] * len(SCALES), understanding_patch=4,
    )  # fmt: skip
    model, layout = ErnieElasticForCausalLM(config).eval(), layout_of(config)
    choose_experts_back_end(model)
    text = Tokens("text", "input", ids=torch.randint(10, 1024, (prompt_length,)).numpy().astype("int32"))
    prompt = build_document([text], layout, opener=layout.special.boi)
    start = prompt_length + 2
    ends = [start + sum(h * w for h, w in SCALES[1 : scale + 1]) for scale in range(len(SCALES))]

    def cached(_: int) -> None:
        decoder = GroupDecoder(model, layout, sampling=Sampling())
        decoder.prefill([prompt])
        decode_visual(decoder, video=False)

    @torch.inference_mode()
    def recompute(_: int) -> None:
        generator = torch.Generator().manual_seed(0)
        bits = [torch.randint(0, 2, (1, h, w, 16), generator=generator).float() for h, w in SCALES]
        picture = Tokens("image", "target", scale_codes=layout.quantizer.replay(bits))
        batch = collate([[build_document([text, picture], layout)]])
        embedded, mask = embed_batch(model.model, batch), SequenceMask(Places.of(batch))
        for (height, width), end in zip(SCALES, ends, strict=True):
            seen = mask.dense(slice(0, end), slice(0, end))
            out = model.model.run_stack(embedded[:, :end], batch.position_BT3[:, :end], seen, is_causal=False)
            model.model.visual.bit_head(out.hidden[:, -height * width :])

    assert model.model.visual is not None
    seconds = interleave({"ours": cached, "recompute": recompute}, repeats)
    ours, theirs = 1e3 * seconds["ours"], 1e3 * seconds["recompute"]
    case = f"draw one picture, 7 scales, prompt {prompt_length}"
    # The limit: recomputing runs so many times the positions that the cache runs.
    return Row(case, ours, {"recompute": theirs, "positions": theirs * ends[-1] / sum(ends)}, "ms", False)


def run(quick: bool) -> list[Row]:
    """All rows."""
    begun = time.perf_counter()
    rows = [training_row(quick), *many_experts_rows(quick), memory_row(quick), *decoding_rows(quick)]
    print(f"model: {time.perf_counter() - begun:.0f} s", file=sys.stderr)
    return rows
