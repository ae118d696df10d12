"""Loss spikes: go back to the last checkpoint before one, and leave out the data that was read since.

ours: the report is silent; large runs of other groups restart by hand in this way. Every decision is a function of the
losses, and what was decided lies in a file of the run, so a resume meets the same run.
"""

from __future__ import annotations

import json
import statistics
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ernie_elastic.errors import ConfigError, TrainingError
from ernie_elastic.stages import write_json

ROLLBACK_FILE = "rollbacks.json"
SMOOTHING = 0.5
WARM_UP = 10  # losses of a kind before its median is trusted


@dataclass(frozen=True)
class SpikeConfig:
    """factor: a spike is a smoothed loss above factor times its running median (0 = no watch). steps: for so many steps
    in a row. window: losses under the median, per modality. max_rollbacks: one more ends the run."""

    factor: float = 0.0
    steps: int = 5
    window: int = 100
    max_rollbacks: int = 3

    def __post_init__(self) -> None:
        if self.factor != 0 and self.factor <= 1:
            raise ConfigError(f"spikes.factor {self.factor} must be 0 (off) or above 1")
        if self.steps < 1 or self.window < WARM_UP or self.max_rollbacks < 0:
            raise ConfigError(
                f"spikes: steps {self.steps} must be at least 1, window {self.window} at least {WARM_UP}, "
                f"max_rollbacks {self.max_rollbacks} at least 0"
            )


class SpikeWatch:
    """Compares each modality's loss with its running median; its state is part of a checkpoint."""

    def __init__(self, config: SpikeConfig) -> None:
        self.config = config
        self._past: dict[str, deque[float]] = {}
        self._smooth, self._above = 1.0, 0

    def is_spike(self, losses: dict[str, float]) -> bool:
        """Take in a step's mean losses; True when the smoothed ratio to the medians was too high for so many steps.

        Losses of a step that is too high do not enter the medians: else a spike would become the norm.
        """
        config = self.config
        if not config.factor:
            return False
        ratios = [
            loss / max(statistics.median(self._past[name]), 1e-9)
            for name, loss in losses.items()
            if len(self._past.get(name, ())) >= WARM_UP
        ]
        if ratios:
            self._smooth = SMOOTHING * self._smooth + (1 - SMOOTHING) * statistics.fmean(ratios)
        if self._smooth > config.factor:
            self._above += 1
        else:
            self._above = 0
            for name, loss in losses.items():
                self._past.setdefault(name, deque(maxlen=config.window)).append(loss)
        return self._above >= config.steps

    def to_json(self) -> dict[str, Any]:
        """The state, for a checkpoint."""
        past = {name: list(values) for name, values in self._past.items()}
        return {"past": past, "smooth": self._smooth, "above": self._above}

    def load_json(self, state: dict[str, Any]) -> None:
        """Inverse of `to_json`; an empty dict starts anew."""
        window = self.config.window
        self._past = {name: deque(map(float, values), window) for name, values in state.get("past", {}).items()}
        self._smooth, self._above = float(state.get("smooth", 1.0)), int(state.get("above", 0))


@dataclass(frozen=True)
class Rollback:
    """The run went back to `step` finished steps from a spike that ended at step `spike`; so many units of data, from
    the one that `step` would have read, are left out."""

    step: int
    spike: int
    skipped_units: int


class Rollbacks:
    """The rollbacks of a run, in its directory. Data is shifted by all of those at or before a step."""

    def __init__(self, run_dir: Path, config: SpikeConfig) -> None:
        self.path, self.config = run_dir / ROLLBACK_FILE, config
        self.items: list[Rollback] = []
        if self.path.exists():
            self.items = [Rollback(**item) for item in json.loads(self.path.read_text())]

    def shift(self, step: int) -> int:
        """Units by which the data of a step lies further on."""
        return sum(item.skipped_units for item in self.items if item.step <= step)

    def check(self, step: int) -> None:
        """Raise TrainingError when the run has gone back too often already."""
        if len(self.items) >= self.config.max_rollbacks:
            raise TrainingError(
                f"training: the loss rose to more than {self.config.factor:g} times its median at step {step}, after "
                f"{len(self.items)} rollbacks already (limit {self.config.max_rollbacks}, {self.path}); lower "
                "--training.learning-rate, look at the data, or raise --training.spikes.max-rollbacks"
            )

    def add(self, item: Rollback, write: bool) -> None:
        """Note a rollback; write: in the file too (rank 0)."""
        self.items.append(item)
        if write:
            write_json(self.path, self.items)
