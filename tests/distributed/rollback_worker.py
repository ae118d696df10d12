"""A run of the debug preset whose loss rises at some data; on every rank: RUN_DIR STOP_AFTER (0 = to the end)."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from ernie_elastic.pipeline.pretrain import run_pretrain
from ernie_elastic.presets import debug
from ernie_elastic.training import loop
from ernie_elastic.training.guards.spikes import SpikeConfig
from ernie_elastic.training.record import mean_losses

POISON = range(17, 19)  # units of data; two steps in a row are a spike
STEPS = 30


def poisoned(step: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """`_Run.step`, but losses of a step that reads a poisoned unit are five times as high."""

    def wrapped(self: Any, number: int, batches: list[Any], waited: float = 0.0) -> dict[str, Any]:
        if not set(self._units_of(number)) & set(POISON):
            return step(self, number, batches, waited)
        with mock.patch.object(
            loop, "mean_losses", lambda results: {k: 5 * v for k, v in mean_losses(results).items()}
        ):
            return step(self, number, batches, waited)

    return wrapped


def main(run_dir: str, stop_after: str) -> None:
    """Train with two ranks under ZeRO-1."""
    config = debug()
    training = dataclasses.replace(
        config.training, rows_per_step=2, log_every=0, steps=STEPS, checkpoint_every=5, stop_after=int(stop_after),
        spikes=SpikeConfig(factor=1.8, steps=2, window=20),
    )  # fmt: skip
    with mock.patch.object(loop._Run, "step", poisoned(loop._Run.step)):
        run_pretrain("debug", dataclasses.replace(config, run_dir=Path(run_dir), training=training))


if __name__ == "__main__":
    main(*sys.argv[1:])
