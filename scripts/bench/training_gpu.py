"""A training step of `ablation_3b` on a GPU, in BF16 with fp32 masters, against Transformers' model of the same size.

Text, one document in a row; a step is forward, backward, clipping and fused AdamW over the same masters for all. Ours
goes through the plain-torch engine with FlexAttention and `sorted_experts`; `sdpa` and `grouped_mm` are ours with one
of the two replaced. `transformers` is Ernie4_5_Moe with its grouped experts and causal SDPA. What it lacks (multi-token
prediction, QK-norm, heads of sounds) is off in ours, and the heads of pictures are one bit wide. Both models do not fit
together, so theirs is measured after ours. MFU: operations of `training/flops.py` over the vendor's dense BF16 peak.
"""

from __future__ import annotations

import gc
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM

from bench import gpu
from bench.common import Row, interleave, skip_peer
from ernie_elastic.data.groups.grouping import build_document
from ernie_elastic.data.groups.tokens import Tokens
from ernie_elastic.data.packed.packing import collate
from ernie_elastic.modeling import ErnieElasticConfig, ErnieElasticForCausalLM
from ernie_elastic.modeling.document_layout import layout_of
from ernie_elastic.modeling.sizes import ModelSizes
from ernie_elastic.presets import ablation_3b, small
from ernie_elastic.schema import PackedBatch
from ernie_elastic.training.configuration import TrainingConfig
from ernie_elastic.training.engines.choice import TorchEngine, make_optimizer
from ernie_elastic.training.engines.masters import keep_masters
from ernie_elastic.training.flops import StepFlops, device_peak

PEERS = ("transformers", "sdpa", "grouped_mm")
# (attention, experts) of ours and of what one of the two gives.
VARIANTS = {
    "ours": ("flex_attention", "sorted_experts"),
    "sdpa": ("sdpa", "sorted_experts"),
    "grouped_mm": ("flex_attention", "grouped_mm"),
}
SHARED = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "tie_word_embeddings",
)  # fmt: skip
BYTES_PER_PARAMETER = 24  # fp32 master, two moments and gradient, BF16 weight and gradient, and some room
ACTIVATION_BYTES = 24 << 30
LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Size:
    """What is measured: a preset's model, and rows of row_length positions in micro-batches."""

    name: str
    model: ModelSizes
    vocab_size: int
    rows: int
    row_length: int
    micro_batches: int
    seconds: float

    @property
    def tokens(self) -> int:
        """Positions of a step."""
        return self.rows * self.row_length


SMALL = Size("small", small().model, 4096, 32, 1024, 1, 60)
ABLATION = Size("ablation_3b", ablation_3b().model, 32_768, 4, 8192, 2, 120)


def our_config(size: Size) -> ErnieElasticConfig:
    """The preset's stack for text; of pictures it knows one bit, since packed training needs their heads."""
    sizes = size.model
    return ErnieElasticConfig(
        **{name: getattr(sizes, name) for name in SHARED}, moe_intermediate_size=sizes.moe_intermediate_size,
        num_experts=sizes.num_experts, num_experts_per_tok=sizes.num_experts_per_tok, vocab_size=size.vocab_size,
        max_position_embeddings=size.row_length, qk_norm=False, visual_bits=1, visual_scales=[[1, 1]],
        visual_amplitudes=[0.5], understanding_patch=4, understanding_width=16,
    )  # fmt: skip


def their_config(size: Size) -> Ernie4_5_MoeConfig:
    """The same dimensions; every layer has experts."""
    sizes = size.model
    fields: dict[str, Any] = {name: getattr(sizes, name) for name in SHARED}
    fields["experts_implementation"] = "grouped_mm"
    return Ernie4_5_MoeConfig(
        **fields, moe_intermediate_size=sizes.moe_intermediate_size, moe_num_experts=sizes.num_experts,
        moe_k=sizes.num_experts_per_tok, moe_num_shared_experts=0, moe_layer_start_index=0,
        vocab_size=size.vocab_size, max_position_embeddings=size.row_length,
    )  # fmt: skip


@contextmanager
def on_device() -> Iterator[None]:
    """Parameters are made where they stay, from one seed, after what the last model left is given back."""
    gc.collect()
    torch.manual_seed(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with torch.device(gpu.DEVICE):
        yield


def peak_gib() -> float:
    """Most memory that tensors took on the device since `on_device` began."""
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else float("nan")


def batches_of(size: Size, config: ErnieElasticConfig, ids: np.ndarray) -> list[PackedBatch]:
    """ids int32 [rows, row_length] as packed micro-batches, one document a row."""
    layout = layout_of(config)

    def document(row: np.ndarray) -> Any:
        return build_document([Tokens("text", "target", ids=row)], layout)

    marks = len(document(ids[0])) - size.row_length  # positions that the layout adds
    rows = [[document(row[: size.row_length - marks])] for row in ids]
    share = size.rows // size.micro_batches
    return [collate(rows[i : i + share], size.row_length) for i in range(0, size.rows, share)]


def check_first(name: str, loss: float, vocab_size: int) -> None:
    """RuntimeError unless the first loss is that of random weights: a step that goes wrong is not timed."""
    if not abs(loss - math.log(vocab_size)) < 0.5:
        raise RuntimeError(f"{name}: the first loss is {loss:.3f}, not about {math.log(vocab_size):.3f}")


def measure_ours(size: Size, ids: np.ndarray, repeats: int) -> tuple[dict[str, float], float]:
    """Seconds of a step of each variant that runs here, and the peak memory of the first one in GiB."""
    os.environ["LOCAL_RANK"] = str(torch.cuda.current_device() if torch.cuda.is_available() else 0)
    with on_device():
        model = ErnieElasticForCausalLM(our_config(size))
    training = TrainingConfig(
        engine="torch", precision="bf16", rows_per_step=size.rows, micro_batches=size.micro_batches
    )
    engine = TorchEngine(model, training)
    batches, full = batches_of(size, model.config, ids), model.config.full_spec()

    def step(attention: str, experts: str) -> Callable[[int], Any]:
        def run_step(_: int) -> float:
            model.config._experts_implementation = experts
            if model.config._attn_implementation != attention:
                model.set_attn_implementation(attention)
            results, _norm = engine.train_step(batches, full, LEARNING_RATE)
            sums, counts = (sum(getattr(result, name)[0] for result in results) for name in ("sums", "counts"))
            return float(sums / counts)

        return run_step

    steps: dict[str, Callable[[int], Any]] = {}
    memory = float("nan")
    for name, variant in VARIANTS.items():
        try:
            loss = step(*variant)(0)
        except Exception as error:  # a compiler's, or memory: the other rows are still worth having
            skip_peer("training_gpu", name, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:150]}")
            model.zero_grad()
            engine.optimizer.zero_grad()  # the masters', of micro-batches that went well
            continue
        if not steps:
            check_first(name, loss, size.vocab_size)
            step(*variant)(0)
            memory = peak_gib()
        steps[name] = step(*variant)
    if not steps:
        raise RuntimeError("none of our variants could take a step")
    return interleave(steps, repeats, 2, synchronize), memory


def measure_theirs(size: Size, ids: np.ndarray, repeats: int) -> tuple[float, float]:
    """Seconds of a step, and the peak memory in GiB."""
    with on_device():
        model = Ernie4_5_MoeForCausalLM(their_config(size)).train()
    optimizer = make_optimizer(model, TrainingConfig(engine="torch"))
    masters = keep_masters(model, torch.bfloat16)
    parts = torch.from_numpy(ids).long().to(gpu.DEVICE).chunk(size.micro_batches)
    stepped = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def step(_: int) -> float:
        losses = []
        for ids_BT in parts:
            loss = model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss
            (loss / len(parts)).backward()
            masters.collect()
            losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(stepped, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE
        optimizer.step()
        masters.publish()
        optimizer.zero_grad(set_to_none=True)
        return float(sum(losses)) / len(parts)

    check_first("transformers", step(0), size.vocab_size)
    return interleave({"transformers": step}, repeats, 2, synchronize)["transformers"], peak_gib()


def synchronize() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def rows_of(size: Size, repeats: int) -> list[Row]:
    """Tokens a second, MFU and peak memory of one size; none, aloud, on a GPU that is too small."""
    flops = StepFlops(our_config(size), size.row_length)
    if torch.cuda.is_available():
        needed = BYTES_PER_PARAMETER * parameters(size) + ACTIVATION_BYTES
        total = torch.cuda.get_device_properties(gpu.DEVICE).total_memory
        if total < needed:
            words = f"needs {needed / 2**30:.0f} GiB, the GPU has {total / 2**30:.0f}"
            print(f"training_gpu: {size.name} is left out: {words}", file=sys.stderr)
            return []
    ids = np.random.default_rng(0).integers(10, size.vocab_size, (size.rows, size.row_length)).astype(np.int32)
    seconds, ours_gib = measure_ours(size, ids, repeats)
    theirs_gib: dict[str, float] = {}
    try:
        seconds["transformers"], theirs_gib["transformers"] = measure_theirs(size, ids, repeats)
    except torch.OutOfMemoryError as error:
        skip_peer("training_gpu", "transformers", str(error).splitlines()[0][:150])
    speed = {name: size.tokens / value for name, value in seconds.items()}
    peak, work = device_peak(torch.device(gpu.DEVICE)).flops, flops.per_position(our_config(size).full_spec())
    used = {name: 100 * value * work / peak for name, value in speed.items()}
    first = next(iter(seconds))  # "ours", or where it cannot run here the first variant that can
    case = f"{size.name}, {size.tokens:,} tokens a step, {' and '.join(VARIANTS[first])}"
    rows = [Row(case, speed.pop(first), speed, "tokens/s", True), Row(f"{case}: MFU", used.pop(first), used, "%", True)]
    memory = Row(f"{case}: peak memory", ours_gib, theirs_gib, "GiB", False)
    return rows if math.isnan(ours_gib) else [*rows, memory]


def parameters(size: Size) -> int:
    """Parameters of our model of a size."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in ErnieElasticForCausalLM(our_config(size)).parameters())


def tasks(quick: bool) -> list[gpu.Task]:
    """The ablation's size, then the small one; quick: the small one."""
    repeats = 3 if quick else 7
    return [
        gpu.Task(size.name, lambda size=size: rows_of(size, repeats), size.seconds)  # type: ignore[misc]
        for size in ((SMALL,) if quick else (ABLATION, SMALL))
    ]


def run(quick: bool) -> list[Row]:
    """All rows. ConfigError without a CUDA device."""
    return gpu.run_all("training_gpu", tasks, quick)
