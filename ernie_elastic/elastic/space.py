"""What may shrink: the elastic space of a model, and the policies that choose which layers stay.

paper: section 4 (depth, width and sparsity elasticity); which layers and experts is silent, so the policies are ours.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ernie_elastic.errors import ConfigError
from ernie_elastic.modeling import ErnieElasticConfig

LayerPolicy = Literal["random", "prefix", "uniform"]


@dataclass(frozen=True)
class ElasticConfig:
    """How sub-models are drawn while training.

    full_depth, full_width, full_sparsity: share of the steps at which that axis is not shrunk (paper: 75/80/80 %).
    min_depth: smallest share of the layers that is drawn. expert_shares: shares of the experts that are drawn
    (paper: the ablation draws one half). layer_policy: which layers stay. start_share: this share of a run's
    steps trains the full model first (ours: a short run learns little while it shrinks). enabled: False does so
    throughout. per_micro_batch: a spec of its own for each micro-batch of a step, the same on all ranks (paper: sampled
    "per training instance"; ours: per step is the default, since one step then has one meaning). sandwich: the
    micro-batches of a step are the full model, the smallest one, then random ones. peer: slimmable networks.
    per_layer_top_k: where top_k shrinks, each layer draws a number of its own, from 1 to its full one. peer:
    Matryoshka-MoE.
    """

    enabled: bool = True
    full_depth: float = 0.75
    full_width: float = 0.80
    full_sparsity: float = 0.80
    min_depth: float = 0.5
    expert_shares: tuple[float, ...] = (0.5,)
    layer_policy: LayerPolicy = "random"
    start_share: float = 0.0
    per_micro_batch: bool = False
    sandwich: bool = False
    per_layer_top_k: bool = False

    def __post_init__(self) -> None:
        for name in ("full_depth", "full_width", "full_sparsity", "min_depth", "start_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"elastic.{name} {getattr(self, name)} must lie in 0..1")
        if self.per_micro_batch and self.sandwich:
            raise ConfigError("elastic: per_micro_batch and sandwich each choose the specs of a step; switch one off")
        if not self.expert_shares or not all(0.0 < share <= 1.0 for share in self.expert_shares):
            raise ConfigError(f"elastic.expert_shares {self.expert_shares} must all lie in (0, 1]")


def droppable_layers(config: ErnieElasticConfig) -> list[int]:
    """Layers without an audio head, increasing."""
    return [layer for layer in range(config.num_hidden_layers) if layer not in (config.audio_head_layers or ())]


def check_space(config: ErnieElasticConfig) -> None:
    """Raise ConfigError unless at least half of the layers can be dropped (ours: else depth cannot shrink)."""
    free = len(droppable_layers(config))
    if 2 * free < config.num_hidden_layers:
        raise ConfigError(
            f"elastic: only {free} of {config.num_hidden_layers} layers carry no audio head; at least half must be "
            "droppable; use fewer audio levels or more layers"
        )


def evenly_spaced(items: Sequence[int], count: int) -> list[int]:
    """`count` of `items`, evenly spaced, both ends kept when count > 1."""
    if count >= len(items):
        return list(items)
    if count <= 0:
        return []
    if count == 1:
        return [items[0]]
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def choose_layers(
    config: ErnieElasticConfig, depth: int, policy: LayerPolicy = "uniform", rng: random.Random | None = None
) -> tuple[int, ...]:
    """`depth` layers: all that carry audio heads, the rest by policy among the droppable ones.

    Raises ConfigError when depth is larger than the model or leaves no room for the audio-head layers.
    """
    total, heads = config.num_hidden_layers, list(config.audio_head_layers or ())
    if not 1 <= depth <= total:
        raise ConfigError(f"--depth {depth} must lie in 1..{total}, the model's layers")
    if depth < len(heads):
        raise ConfigError(
            f"--depth {depth} is less than the {len(heads)} layers that carry audio heads ({heads}); keep more, or "
            "pass --drop-modality audio"
        )
    free, wanted = droppable_layers(config), depth - len(heads)
    if policy == "prefix":
        kept = free[:wanted]
    elif policy == "uniform":
        kept = evenly_spaced(free, wanted)
    elif policy == "random":
        kept = (rng or random.Random(0)).sample(free, wanted)
    else:
        raise ConfigError(f"layer policy {policy!r} is not one of random, prefix, uniform")
    return tuple(sorted([*heads, *kept]))
