"""Balance without an auxiliary loss: each expert's selection bias moves against its load. Letters: L layers, E experts.

paper: section 1.2 (bias update speed per stage); eligible experts only is ours, since an expert that a reduced spec
leaves out would look starved.
"""

from __future__ import annotations

import torch

from ernie_elastic.modeling import ErnieElasticForCausalLM
from ernie_elastic.modeling.router import ErnieElasticTopKRouter
from ernie_elastic.schema import RouterOutput, SubModelSpec
from ernie_elastic.training.accumulation import Specs


class RoutingLedger:
    """Counts of one optimizer step, and the routed mass of all full-spec steps (which extraction ranks experts by)."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.counts_LE = torch.zeros(num_layers, num_experts, dtype=torch.float64)
        self.step_mass_LE = torch.zeros(num_layers, num_experts, dtype=torch.float64)
        self.mass_LE = torch.zeros(num_layers, num_experts, dtype=torch.float64)

    def add(self, routing: list[RouterOutput], layers: tuple[int, ...], full_spec: bool = True) -> None:
        """Add one micro-batch; mass is taken from full ones alone."""
        for layer, decision in zip(layers, routing, strict=True):
            self.counts_LE[layer] += decision.counts_E.cpu()
            if full_spec:
                self.step_mass_LE[layer] += decision.mass_E.cpu()

    def finish_step(self, all_reduce_sum, full_spec: bool) -> torch.Tensor:  # type: ignore[no-untyped-def]
        """Sum over ranks, keep the mass of full-spec steps, start anew; returns the step's counts float64 [L, E]."""
        both = all_reduce_sum(torch.stack([self.counts_LE, self.step_mass_LE]))
        counts = both[0].clone()
        if full_spec:
            self.mass_LE += both[1]
        self.clear()
        return counts

    def clear(self) -> None:
        """Forget the counts of the step that is being made."""
        self.counts_LE.zero_()
        self.step_mass_LE.zero_()


@torch.no_grad()
def update_bias(model: ErnieElasticForCausalLM, counts_LE: torch.Tensor, specs: Specs, speed: float) -> None:
    """bias += speed * sign(mean load - load) for the experts that were eligible in the layers that ran.

    specs: of the step, or of each of its micro-batches; an expert's load is then its mean over those that had it.
    """
    gates = routers(model)
    load_LE, eligible_LE = eligible_load(counts_LE, specs)
    for layer, gate in gates.items():
        kept = eligible_LE[layer].nonzero().flatten()
        if len(kept) == 0:
            continue
        load = load_LE[layer, kept]
        bias = gate.e_score_correction_bias
        bias[kept.to(bias.device)] += (speed * torch.sign(load.mean() - load)).to(bias)


def eligible_load(counts_LE: torch.Tensor, specs: Specs) -> tuple[torch.Tensor, torch.Tensor]:
    """(load float64, eligible bool), both [L, E]: counts divided by how many of the different specs had the expert."""
    all_specs = [specs] if isinstance(specs, SubModelSpec) else list(specs)
    if all(spec == all_specs[0] for spec in all_specs):
        all_specs = all_specs[:1]
    times_LE = torch.zeros_like(counts_LE)
    for spec in all_specs:
        for layer, experts in zip(spec.layers, spec.experts_per_layer, strict=True):
            times_LE[layer, torch.tensor(experts)] += 1
    return counts_LE / times_LE.clamp(min=1), times_LE > 0


def routers(model: ErnieElasticForCausalLM) -> dict[int, ErnieElasticTopKRouter]:
    """The router of every layer that has one (dense layers have none)."""
    return {i: layer.mlp.gate for i, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "gate")}


def load_max_over_mean(counts_LE: torch.Tensor, specs: Specs) -> list[float | None]:
    """Largest load over the mean load of the eligible experts per layer, from counts [L, E]; None for layers that did
    not run."""
    load_LE, eligible_LE = eligible_load(counts_LE, specs)
    ratios: list[float | None] = []
    for load_E, eligible_E in zip(load_LE, eligible_LE, strict=True):
        kept = load_E[eligible_E]
        ratios.append(float(kept.max() / kept.mean().clamp(min=1e-9)) if len(kept) else None)
    return ratios
