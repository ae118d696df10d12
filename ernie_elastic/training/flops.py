"""How much of the hardware a step uses: floating-point operations of the active sub-model over a stated peak."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass

import torch

from ernie_elastic.modeling import ErnieElasticConfig, ErnieElasticForCausalLM
from ernie_elastic.schema import SubModelSpec

# Dense BF16 operations a second, from the vendors' data sheets; the first name that occurs in the device's counts.
GPU_PEAKS = (
    ("B200", 2250e12), ("H200", 989e12), ("H100 PCIe", 756e12), ("H100", 989e12), ("A100", 312e12), ("L40S", 362e12),
    ("L4", 121e12), ("A10", 125e12), ("V100", 125e12), ("T4", 65e12), ("4090", 165e12), ("3090", 71e12),
    ("MI300X", 1307e12),
)  # fmt: skip
MEASURED_SIZE = 1024


@dataclass(frozen=True)
class Peak:
    """Operations a second of one device, and where the number is from."""

    flops: float
    source: str


def device_peak(device: torch.device) -> Peak:
    """The table's peak of a GPU; for a CPU, or a GPU that the table lacks, the speed of an fp32 matmul measured now."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, flops in GPU_PEAKS:
            if part in name:
                return Peak(flops, f"{flops / 1e12:.0f} TFLOP/s, BF16 dense, data sheet of {part}")
    a = torch.randn(MEASURED_SIZE, MEASURED_SIZE, device=device)
    best = float("inf")
    for _ in range(4):
        begun = time.perf_counter()
        (a @ a).sum().item()
        best = min(best, time.perf_counter() - begun)
    flops = 2 * MEASURED_SIZE**3 / best
    return Peak(flops, f"{flops / 1e9:.0f} GFLOP/s, fp32 matmul of {MEASURED_SIZE} measured at start")


class StepFlops:
    """Operations of a training step of any sub-model: 6 for each active parameter and position (forward and twice as
    much backward), and 12 x row length x heads x head size a layer for attention.

    Embedding tables are looked up, not multiplied. Every head counts at every position, although a head computes only
    where it has a target, so heads are over- and the share of the layers underestimated (ours, the usual convention).
    """

    def __init__(self, config: ErnieElasticConfig, row_length: int) -> None:
        with torch.device("meta"):
            model = ErnieElasticForCausalLM(copy.deepcopy(config))
        self.num_experts = config.num_experts
        self.attention = 12 * row_length * config.num_attention_heads * config.head_dim
        self.layer = [0] * config.num_hidden_layers
        self.expert = [0] * config.num_hidden_layers
        self.rest = 0
        for name, parameter in model.named_parameters():
            if name.startswith("model.layers."):
                number = int(name.split(".")[2])
                (self.expert if ".mlp.experts." in name else self.layer)[number] += parameter.numel()
            elif "embed" not in name or (config.tie_word_embeddings and "embed_tokens" in name):
                self.rest += parameter.numel()

    def active(self, spec: SubModelSpec) -> int:
        """Parameters that a position meets under a spec, embedding tables left out."""
        kept = zip(spec.layers, spec.top_ks, strict=True)
        return self.rest + sum(self.layer[i] + self.expert[i] * top_k // self.num_experts for i, top_k in kept)

    def per_position(self, spec: SubModelSpec) -> float:
        """Operations of forward and backward for one position."""
        return 6.0 * self.active(spec) + self.attention * len(spec.layers)
