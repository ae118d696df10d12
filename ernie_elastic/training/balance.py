"""Balance without an auxiliary loss: each expert's selection bias moves against its load. Letters: L layers, E experts.

paper: section 1.2 (bias update speed per stage); eligible experts only is ours, since an expert that a reduced spec
leaves out would look starved.
"""

from __future__ import annotations

import torch

from ernie_elastic.modeling import ErnieElasticForCausalLM
from ernie_elastic.modeling.router import ErnieElasticTopKRouter
from ernie_elastic.schema import RouterOutput, SubModelSpec


class RoutingLedger:
    """Counts of one optimizer step, and the routed mass of all full-spec steps (which extraction ranks experts by)."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.counts_LE = torch.zeros(num_layers, num_experts, dtype=torch.float64)
        self.step_mass_LE = torch.zeros(num_layers, num_experts, dtype=torch.float64)
        self.mass_LE = torch.zeros(num_layers, num_experts, dtype=torch.float64)

    def add(self, routing: list[RouterOutput], layers: tuple[int, ...]) -> None:
        """Add one micro-batch."""
        for layer, decision in zip(layers, routing, strict=True):
            self.counts_LE[layer] += decision.counts_E.cpu()
            self.step_mass_LE[layer] += decision.mass_E.cpu()

    def finish_step(self, all_reduce_sum, full_spec: bool) -> torch.Tensor:  # type: ignore[no-untyped-def]
        """Sum over ranks, keep the mass of full-spec steps, start anew; returns the step's counts float64 [L, E]."""
        both = all_reduce_sum(torch.stack([self.counts_LE, self.step_mass_LE]))
        counts = both[0].clone()
        if full_spec:
            self.mass_LE += both[1]
        self.counts_LE.zero_()
        self.step_mass_LE.zero_()
        return counts


@torch.no_grad()
def update_bias(model: ErnieElasticForCausalLM, counts_LE: torch.Tensor, spec: SubModelSpec, speed: float) -> None:
    """bias += speed * sign(mean load - load) for the experts that were eligible in the layers that ran."""
    gates = routers(model)
    for layer, experts in zip(spec.layers, spec.experts_per_layer, strict=True):
        if layer not in gates:
            continue
        kept = torch.tensor(experts)
        load = counts_LE[layer, kept]
        bias = gates[layer].e_score_correction_bias
        bias[kept.to(bias.device)] += (speed * torch.sign(load.mean() - load)).to(bias)


def routers(model: ErnieElasticForCausalLM) -> dict[int, ErnieElasticTopKRouter]:
    """The router of every layer that has one (dense layers have none)."""
    return {i: layer.mlp.gate for i, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "gate")}


def load_max_over_mean(counts_LE: torch.Tensor, spec: SubModelSpec) -> list[float | None]:
    """Largest load over the mean load of the eligible experts per layer; None for layers that did not run."""
    ratios: list[float | None] = [None] * len(counts_LE)
    for layer, experts in zip(spec.layers, spec.experts_per_layer, strict=True):
        load = counts_LE[layer, torch.tensor(experts)]
        ratios[layer] = float(load.max() / load.mean().clamp(min=1e-9))
    return ratios
