"""One sub-model spec per (seed, optimizer step): the same on all ranks, for all micro-batches and after a resume."""

from __future__ import annotations

import random

from ernie_elastic.elastic.space import ElasticConfig, choose_layers, droppable_layers
from ernie_elastic.modeling import ErnieElasticConfig
from ernie_elastic.schema import SubModelSpec


def sample_spec(
    elastic: ElasticConfig, config: ErnieElasticConfig, seed: int, step: int, total_steps: int = 0
) -> SubModelSpec:
    """The spec of an optimizer step. The three axes are drawn independently (ours: the report is silent).

    Depth: a number of layers between min_depth and one less than all. Width: a random subset of the experts of each
    layer. Sparsity: a top_k below the standard one. The first elastic.start_share of
    total_steps is full. paper: section 4.1.
    """
    full = config.full_spec()
    if not elastic.enabled or step < elastic.start_share * total_steps:
        return full
    rng = random.Random(f"elastic:{seed}:{step}")
    shrink_depth, shrink_width, shrink_k = (
        rng.random() >= share for share in (elastic.full_depth, elastic.full_width, elastic.full_sparsity)
    )
    layers = full.layers
    smallest = max(
        1, round(elastic.min_depth * config.num_hidden_layers), config.num_hidden_layers - len(droppable_layers(config))
    )
    if shrink_depth and smallest < config.num_hidden_layers:
        depth = rng.randint(smallest, config.num_hidden_layers - 1)
        layers = choose_layers(config, depth, elastic.layer_policy, rng)
    top_k = config.num_experts_per_tok
    if shrink_k and top_k > 1:
        top_k = rng.randint(1, top_k - 1)
    count = config.num_experts
    if shrink_width:
        count = max(top_k, round(rng.choice(elastic.expert_shares) * config.num_experts))
    experts = tuple(tuple(sorted(rng.sample(range(config.num_experts), count))) for _ in layers)
    return SubModelSpec(layers, experts, top_k)
