"""metrics.jsonl, one line per step on rank 0, and the optional tracker."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ernie_elastic.errors import ConfigError
from ernie_elastic.stages import write_atomic


class MetricsWriter:
    """Appends records to metrics.jsonl; on a resume the lines of steps that will be run again are dropped."""

    def __init__(self, path: Path, start_step: int, wandb_mode: str = "off", run_name: str = "") -> None:
        self.path = path
        kept = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    if json.loads(line)["step"] < start_step:
                        kept.append(line)
                except (ValueError, KeyError):
                    continue  # a line cut short by a kill
        write_atomic(path, "".join(f"{line}\n" for line in kept))
        self.stream = open(path, "a", buffering=1)  # noqa: SIM115 - closed by close()
        self.tracker = _start_tracker(path.parent, wandb_mode, run_name)

    def write(self, record: dict[str, Any]) -> None:
        """Append one record."""
        self.stream.write(json.dumps(record) + "\n")
        if self.tracker is not None:
            flat = {name: value for name, value in record.items() if isinstance(value, (int, float))}
            flat.update({f"loss/{name}": value for name, value in record.get("losses", {}).items()})
            self.tracker.log(flat, step=record["step"])

    def sync(self) -> None:
        """Wait until the disk has every line."""
        os.fsync(self.stream.fileno())

    def close(self) -> None:
        """Flush and end the tracker's run."""
        self.stream.close()
        if self.tracker is not None:
            self.tracker.finish()


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
