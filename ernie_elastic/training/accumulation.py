"""Steps over several micro-batches: a sub-model for each, and counts that may differ from step to step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ernie_elastic.errors import ConfigError
from ernie_elastic.schema import SubModelSpec

Specs = SubModelSpec | Sequence[SubModelSpec]


def specs_of(spec: Specs, count: int) -> list[SubModelSpec]:
    """The spec of each of `count` micro-batches: one for all of them, or a list with one for each."""
    if isinstance(spec, SubModelSpec):
        return [spec] * count
    if len(spec) != count:
        raise ConfigError(f"training: {len(spec)} sub-model specs for {count} micro-batches; give one, or one for each")
    return list(spec)


def one_or_all(specs: Sequence[SubModelSpec]) -> Specs:
    """Inverse of `specs_of`."""
    return specs[0] if all(spec == specs[0] for spec in specs) else specs


def accumulate_over(engine: Any, count: int) -> None:
    """Tell a DeepSpeed engine that its next step has `count` micro-batches: it divides the loss by that number.

    It counts micro-batches over the run to find the last one of a step, which a changing number breaks: the caller
    must mark the last one by `set_gradient_accumulation_boundary`.
    """
    if engine.gradient_accumulation_steps() == count:
        return
    engine.set_train_batch_size(engine.train_micro_batch_size_per_gpu() * engine.dp_world_size * count)
    if hasattr(engine.optimizer, "gradient_accumulation_steps"):
        engine.optimizer.gradient_accumulation_steps = count  # ZeRO keeps a number of its own
