"""Which experts matter: routed mass per layer and expert. Letters: L layers, E experts.

paper: silent on how experts are ranked at extraction; ours: the weight that full-spec training steps routed to them.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file

from ernie_elastic.data.packed.loader import PackedLoader
from ernie_elastic.data.packed.shards import PackedCorpus
from ernie_elastic.errors import CheckpointError, ConfigError
from ernie_elastic.modeling import ErnieElasticForCausalLM
from ernie_elastic.modeling.document_layout import layout_of
from ernie_elastic.schema import PackedBatch
from ernie_elastic.stages import progress, read_manifest

MASS_FILE = "routed_mass.safetensors"
ExpertPolicy = Literal["mass", "random", "first"]


def stored_mass(model_dir: Path) -> torch.Tensor:
    """Routed mass float64 [L, E] that travels with a model directory; CheckpointError when it is missing."""
    path = model_dir / MASS_FILE
    if not path.exists():
        raise CheckpointError(f"{model_dir} carries no {MASS_FILE}; pass --data with packed shards to measure it anew")
    return load_file(path)["mass_LE"].double()


def packed_rows(
    packed_dir: Path, model: ErnieElasticForCausalLM, num_rows: int, batch_rows: int = 8
) -> list[PackedBatch]:
    """The first `num_rows` rows of a packed directory in a fixed order, without flips, as batches."""
    manifest = read_manifest(packed_dir, ("prepare-data",))
    corpus = PackedCorpus(packed_dir)
    count = min(num_rows, corpus.num_rows) // batch_rows * batch_rows or min(num_rows, corpus.num_rows)
    size = min(batch_rows, count)
    loader = PackedLoader(corpus, layout_of(model.config), size, int(manifest.config["row_length"]), seed=1)
    return [loader.step(step)[0] for step in range(count // size)]


@torch.inference_mode()
def measured_mass(model: ErnieElasticForCausalLM, packed_dir: Path, num_rows: int = 64) -> torch.Tensor:
    """Routed mass float64 [L, E] of the full model over `num_rows` packed rows."""
    mass_LE = torch.zeros(model.config.num_hidden_layers, model.config.num_experts, dtype=torch.float64)
    for batch in progress(packed_rows(packed_dir, model, num_rows), desc="expert importance", unit="batch"):
        output = model.forward_packed(batch)
        for layer, decision in zip(output.layers, output.routing, strict=True):
            mass_LE[layer] += decision.mass_E.double()
    return mass_LE


def choose_experts(
    mass_LE: torch.Tensor, layers: tuple[int, ...], count: int, policy: ExpertPolicy = "mass", seed: int = 0
) -> tuple[tuple[int, ...], ...]:
    """`count` experts of each layer, increasing: the heaviest, random ones, or the first. ConfigError when too many."""
    total = mass_LE.shape[1]
    if not 1 <= count <= total:
        raise ConfigError(f"--experts {count} must lie in 1..{total}, the experts of each layer")
    if policy == "mass":
        return tuple(tuple(sorted(mass_LE[layer].topk(count).indices.tolist())) for layer in layers)
    if policy == "first":
        return tuple(tuple(range(count)) for _ in layers)
    if policy == "random":
        rng = random.Random(f"experts:{seed}")
        return tuple(tuple(sorted(rng.sample(range(total), count))) for _ in layers)
    raise ConfigError(f"expert policy {policy!r} is not one of mass, random, first")
