"""Steps whose loss or gradient is not finite: engines do not apply them, the guard counts them and ends a row of them.

The engines say so by a gradient norm that is not finite; it is the same number on every rank, so all ranks agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ernie_elastic.errors import TrainingError


class StepGuard:
    """Counts the steps that were not applied. limit: so many in a row end the run (0 = never)."""

    def __init__(self, limit: int) -> None:
        self.limit, self.skipped = limit, 0
        self._in_a_row: list[int] = []

    def to_json(self) -> dict[str, Any]:
        """The counters, for a checkpoint."""
        return {"skipped": self.skipped, "in_a_row": list(self._in_a_row)}

    def load_json(self, state: dict[str, Any]) -> None:
        """Inverse of `to_json`; an empty dict resets the counters."""
        self.skipped = int(state.get("skipped", 0))
        self._in_a_row = [int(step) for step in state.get("in_a_row", [])]

    def applied(self, step: int, norm: float, rows_of: Callable[[int], list[int]]) -> bool:
        """Take in a step's gradient norm before clipping; False when the step was not applied.

        rows_of gives the packed rows of a step, for the message. Raises TrainingError at the limit. ours: one bad step
        is an accident; many in a row mean that the run is lost, and every later one costs time.
        """
        if math.isfinite(norm):
            self._in_a_row.clear()
            return True
        self.skipped += 1
        self._in_a_row.append(step)
        if self.limit and len(self._in_a_row) >= self.limit:
            rows = "; ".join(f"step {number}: rows {_short(rows_of(number))}" for number in self._in_a_row[-3:])
            raise TrainingError(
                f"training: loss or gradient was not finite in {len(self._in_a_row)} steps in a row, up to step {step} "
                f"(limit {self.limit}); packed rows read: {rows}. Lower --training.learning-rate, look at those rows, "
                "or go on from an earlier checkpoint"
            )
        return False


def _short(rows: list[int], most: int = 8) -> str:
    return ", ".join(map(str, rows[:most])) + (f", ... ({len(rows)} in all)" if len(rows) > most else "")
