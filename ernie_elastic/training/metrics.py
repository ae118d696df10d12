"""metrics.jsonl, one line per step on rank 0, and the optional tracker."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ernie_elastic.errors import ConfigError
from ernie_elastic.stages import write_atomic


class MetricsWriter:
    """Appends records to metrics.jsonl; on a resume the lines of steps that will be run again are dropped.

    A line with an "event" tells of something at its step, such as a rollback to it, and stays.
    """

    def __init__(
        self, path: Path, start_step: int, wandb_mode: str = "off", run_name: str = "", tensorboard: bool = False
    ) -> None:
        self.path = path
        self._open(start_step)
        self.tracker = _start_tracker(path.parent, wandb_mode, run_name)
        self.events = _start_tensorboard(path.parent) if tensorboard else None

    def _open(self, start_step: int) -> None:
        kept = []
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                try:
                    record = json.loads(line)
                    if record["step"] < start_step + ("event" in record):
                        kept.append(line)
                except (ValueError, KeyError):
                    continue  # a line cut short by a kill
        write_atomic(self.path, "".join(f"{line}\n" for line in kept))
        self.stream = open(self.path, "a", buffering=1)  # noqa: SIM115 - closed by close()

    def go_back(self, step: int) -> None:
        """Drop the lines of steps from `step` on, which will be run again."""
        self.stream.close()
        self._open(step)

    def write(self, record: dict[str, Any]) -> None:
        """Append one record."""
        self.stream.write(json.dumps(record) + "\n")
        if self.tracker is None and self.events is None:
            return
        flat = scalars(record)
        if self.tracker is not None:
            self.tracker.log(flat, step=record["step"])
        if self.events is not None:
            for name, value in flat.items():
                self.events.add_scalar(name, value, record["step"])

    def sync(self) -> None:
        """Wait until the disk has every line."""
        os.fsync(self.stream.fileno())

    def close(self) -> None:
        """Flush and end the trackers' runs."""
        self.stream.close()
        if self.tracker is not None:
            self.tracker.finish()
        if self.events is not None:
            self.events.close()


def scalars(record: dict[str, Any]) -> dict[str, float]:
    """What a tracker draws: numbers under their names, losses by modality, and once more by the spec's bucket."""
    flat = {name: value for name, value in record.items() if isinstance(value, (int, float)) and name != "step"}
    bucket = record.get("spec", {}).get("bucket")
    for name, value in record.get("losses", {}).items():
        flat[f"loss/{name}"] = value
        if bucket is not None:
            flat[f"loss_by_spec/{bucket}/{name}"] = value
    loads = [value for value in record.get("load_max_over_mean", ()) if value is not None]
    if loads:
        flat["load_max_over_mean"] = max(loads)
    return flat


def _start_tensorboard(directory: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            f"training: --training.tensorboard needs the package tensorboard ({error}); run `pip install tensorboard`"
        ) from error
    return SummaryWriter(str(directory / "tensorboard"))


def _start_tracker(directory: Path, mode: str, run_name: str) -> Any:
    if mode == "off":
        return None
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(
            f"training: --training.wandb {mode} needs the package wandb ({error}); run `pip install wandb`"
        ) from error
    os.environ.setdefault("WANDB_SILENT", "true")
    return wandb.init(project="ernie_elastic", name=run_name, dir=str(directory), mode=mode)  # type: ignore[arg-type]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All records of a metrics.jsonl."""
    return [json.loads(line) for line in path.read_text().splitlines() if line]
