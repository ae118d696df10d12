"""What a benchmark is, and what all of them share: rows, interleaved medians, the table and the JSON.

A benchmark is a file NAME.py in this folder with
  * a module docstring, whose first line `run.py --list` prints;
  * PEERS: tuple[str, ...], the keys that its rows may have under `theirs`;
  * run(quick: bool) -> list[Row], which says aloud (`skip_peer`) when a peer cannot run and leaves it out.
`run.py` finds it by its name. Variants of one row run interleaved in one process (`interleave`), medians are quoted.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ernie_elastic import stages


@dataclass(frozen=True)
class Row:
    """One case: our value and the peers', in the same unit."""

    case: str
    ours: float
    theirs: Mapping[str, float]
    unit: str
    higher_is_better: bool

    @property
    def ratio(self) -> dict[str, float]:
        """Ours relative to each peer; above 1 we are better."""
        if self.higher_is_better:
            return {peer: self.ours / value for peer, value in self.theirs.items()}
        return {peer: value / self.ours for peer, value in self.theirs.items()}

    def to_json(self) -> dict[str, Any]:
        """The row as the JSON file has it."""
        return {
            "case": self.case,
            "ours": self.ours,
            "theirs": dict(self.theirs),
            "unit": self.unit,
            "ratio": self.ratio,
        }


def interleave(
    variants: Mapping[str, Callable[[int], Any]], repeats: int, warmup: int = 1, synchronize: Callable[[], Any] = bool
) -> dict[str, float]:
    """Median seconds of each variant. All variants run in turn, `repeats` times after `warmup` unmeasured rounds.

    A variant is called with a running number that differs between the variants of a round, so that what it indexes
    has not just been read by another one. synchronize waits for work that a variant only started (a GPU's).
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    count = 0
    for turn in range(warmup + repeats):
        for name, variant in variants.items():
            synchronize()
            begin = time.perf_counter()
            variant(count)
            synchronize()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - begin)
            count += 1
    return {name: statistics.median(values) for name, values in seconds.items()}


def skip_peer(benchmark: str, peer: str, reason: str) -> None:
    """Say aloud that a peer is missing from the rows."""
    print(f"{benchmark}: peer {peer} is left out: {reason}", file=sys.stderr, flush=True)


def processor() -> str:
    """Name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def hardware() -> str:
    """One line: processor, cores, torch's threads, GPU if any, torch's version."""
    parts = [processor(), f"{os.cpu_count()} cores", f"{torch.get_num_threads()} threads"]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name(0))
    return ", ".join([*parts, f"torch {torch.__version__}"])


def cache_bytes() -> int:
    """Bytes of the largest CPU cache; 64 MiB where the system does not say."""
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        factor = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:], 1)
        sizes.append(int(text.rstrip("KM")) * factor)
    return max(sizes, default=64 << 20)


def report(name: str, rows: list[Row]) -> dict[str, Any]:
    """The JSON object of a benchmark."""
    return {
        "name": name,
        "hardware": hardware(),
        "commit": stages.git_commit(),
        "rows": [row.to_json() for row in rows],
    }


def table(rows: list[Row]) -> str:
    """Rows as aligned text: case, unit, ours, then each peer with our ratio to it."""
    peers = list(dict.fromkeys(peer for row in rows for peer in row.theirs))
    lines = [["case", "unit", "ours", *peers]]
    for row in rows:
        cells = [f"{row.theirs[peer]:.4g} ({row.ratio[peer]:.2f}x)" if peer in row.theirs else "-" for peer in peers]
        lines.append([row.case, row.unit, f"{row.ours:.4g}", *cells])
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
