"""One sub-model spec per (seed, optimizer step): the same on all ranks, for all micro-batches and after a resume."""

from __future__ import annotations

import dataclasses
import random

from ernie_elastic.elastic.space import ElasticConfig, choose_layers, droppable_layers
from ernie_elastic.errors import ConfigError
from ernie_elastic.modeling import ErnieElasticConfig
from ernie_elastic.schema import SubModelSpec


def sample_spec(
    elastic: ElasticConfig, config: ErnieElasticConfig, seed: int, step: int, total_steps: int = 0
) -> SubModelSpec:
    """The spec of an optimizer step. The three axes are drawn independently (ours: the report is silent).

    Depth: a number of layers between min_depth and one less than all. Width: a random subset of the experts of each
    layer. Sparsity: a top_k below the standard one, or one for each layer. The first elastic.start_share of
    total_steps is full. paper: section 4.1.
    """
    full = config.full_spec()
    if not elastic.enabled or step < elastic.start_share * total_steps:
        return full
    return _draw(elastic, config, random.Random(f"elastic:{seed}:{step}"))


def sample_specs(
    elastic: ElasticConfig, config: ErnieElasticConfig, seed: int, step: int, total_steps: int, micro_batches: int
) -> list[SubModelSpec]:
    """The spec of each micro-batch of a step, the same on all ranks: by default one for all of them (`sample_spec`).

    Raises ConfigError when a sandwich has no room: it needs a micro-batch for the full and one for the smallest model.
    """
    one = sample_spec(elastic, config, seed, step, total_steps)
    full = config.full_spec()
    drawn = elastic.enabled and step >= elastic.start_share * total_steps
    if not drawn or not (elastic.per_micro_batch or elastic.sandwich):
        return [one] * micro_batches
    rngs = [random.Random(f"elastic:{seed}:{step}:{number}") for number in range(micro_batches)]
    if elastic.per_micro_batch:
        return [_draw(elastic, config, rng) for rng in rngs]
    if micro_batches < 2:
        raise ConfigError(
            f"elastic: a sandwich needs at least 2 micro-batches in a step, it has {micro_batches}; pass "
            "--training.micro-batches 3"
        )
    always = dataclasses.replace(elastic, full_depth=0.0, full_width=0.0, full_sparsity=0.0)
    middle = [_draw(always, config, rng) for rng in rngs[2:]]
    return [full, smallest_spec(elastic, config, rngs[1]), *middle]


def smallest_spec(elastic: ElasticConfig, config: ErnieElasticConfig, rng: random.Random) -> SubModelSpec:
    """The smallest sub-model that is drawn: least depth, fewest experts (a random subset), top-1."""
    layers = choose_layers(config, _least_depth(elastic, config), elastic.layer_policy, rng)
    count = max(1, round(min(elastic.expert_shares) * config.num_experts))
    experts = tuple(tuple(sorted(rng.sample(range(config.num_experts), count))) for _ in layers)
    return SubModelSpec(layers, experts, 1)


def _least_depth(elastic: ElasticConfig, config: ErnieElasticConfig) -> int:
    return max(
        1, round(elastic.min_depth * config.num_hidden_layers), config.num_hidden_layers - len(droppable_layers(config))
    )


def _draw(elastic: ElasticConfig, config: ErnieElasticConfig, rng: random.Random) -> SubModelSpec:
    full = config.full_spec()
    shrink_depth, shrink_width, shrink_k = (
        rng.random() >= share for share in (elastic.full_depth, elastic.full_width, elastic.full_sparsity)
    )
    layers = full.layers
    smallest = _least_depth(elastic, config)
    if shrink_depth and smallest < config.num_hidden_layers:
        depth = rng.randint(smallest, config.num_hidden_layers - 1)
        layers = choose_layers(config, depth, elastic.layer_policy, rng)
    top_ks = [full.top_ks[layer] for layer in layers]
    if shrink_k and full.top_k > 1:
        top_ks = _shrunk(top_ks, elastic.per_layer_top_k, full.top_k, rng)
    count = config.num_experts
    if shrink_width:
        count = max(*top_ks, round(rng.choice(elastic.expert_shares) * config.num_experts))
    experts = tuple(tuple(sorted(rng.sample(range(config.num_experts), count))) for _ in layers)
    return SubModelSpec.of(layers, experts, top_ks)


def _shrunk(top_ks: list[int], per_layer: bool, largest: int, rng: random.Random) -> list[int]:
    if per_layer:
        return [rng.randint(1, top_k) for top_k in top_ks]
    drawn = rng.randint(1, largest - 1)
    return [min(drawn, top_k) for top_k in top_ks]
