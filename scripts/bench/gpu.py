"""What the GPU benchmarks share: weights that rotate beyond the L2 cache, calls captured in one CUDA graph, medians.

A benchmark of the GPU declares tasks: named pieces of work that each give rows, the most telling ones first, so that
`scripts/gpu_check.py` can stop between two of them when its time runs out.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bench.common import Row
from ernie_elastic.errors import ConfigError

DEVICE = "cuda"
CACHES = 2  # how often the rotating weights fill the L2 cache
MIN_CALLS = 8  # calls in one graph
REPEATS = 15  # replays of each graph


@dataclass(frozen=True)
class Task:
    """Work that gives rows; seconds: roughly what it takes, compilation included."""

    name: str
    work: Callable[[], list[Row]]
    seconds: float


def require_gpu(name: str) -> None:
    """ConfigError, which becomes one line, when torch sees no CUDA device."""
    if not torch.cuda.is_available():
        raise ConfigError(f"{name} needs a CUDA device and torch sees none; run it on a machine with a GPU")


def run_all(name: str, tasks: Callable[[bool], list[Task]], quick: bool) -> list[Row]:
    """Rows of all tasks. ConfigError without a CUDA device."""
    require_gpu(name)
    rows: list[Row] = []
    for task in tasks(quick):
        print(f"{name}: {task.name}", file=sys.stderr, flush=True)
        rows += task.work()
    return rows


def copies(bytes_each: int) -> int:
    """How many weights of that size (the smallest form of them) fill the L2 cache CACHES times; at least 2."""
    return max(2, -(-CACHES * torch.cuda.get_device_properties(DEVICE).L2_cache_size // bytes_each))


def graph_of(call: Callable[[int], Any], turns: int, calls: int) -> torch.cuda.CUDAGraph:
    """`calls` calls with k % turns captured in one graph, after two outside of it that compile and warm up."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for k in range(2):
            call(k % turns)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for k in range(calls):
            call(k % turns)
    return graph


def seconds_per_call(
    variants: Mapping[str, Callable[[int], Any]], turns: int, repeats: int = REPEATS
) -> dict[str, float]:
    """Median seconds of a call of each variant, their graphs replayed in turn. Call k works on weights k % turns."""
    calls = turns * -(-MIN_CALLS // turns)
    graphs = {name: graph_of(call, turns, calls) for name, call in variants.items()}
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in graphs}
    for _ in range(repeats + 2):
        for name, graph in graphs.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            events[name].append((begin, end))
    torch.cuda.synchronize()
    return {
        name: statistics.median(begin.elapsed_time(end) for begin, end in pairs[2:]) / 1e3 / calls
        for name, pairs in events.items()
    }


def speed_row(case: str, variants: Mapping[str, Callable[[int], Any]], turns: int, bytes_of: Mapping[str, int]) -> Row:
    """Time the variants; GB/s of the bytes that each is credited with. One variant is named `ours`."""
    seconds = seconds_per_call(variants, turns)
    speed = {name: bytes_of[name] / value / 1e9 for name, value in seconds.items()}
    return Row(case, speed.pop("ours"), speed, "GB/s", higher_is_better=True)


def fastest(candidates: Mapping[Any, Callable[[int], Any]], turns: int) -> Any:
    """The candidate with the smallest median of a few replays; one that cannot be launched is left out aloud."""
    found: dict[Any, float] = {}
    for name, call in candidates.items():
        try:
            found[name] = seconds_per_call({"ours": call}, turns, repeats=3)["ours"]
        except Exception as error:  # too much shared memory, or a compiler's limit: known at the launch only
            print(f"tuning: {name} is left out: {str(error).splitlines()[0][:120]}", file=sys.stderr)
            torch.cuda.synchronize()
    if not found:
        raise RuntimeError("no candidate could be launched")
    return min(found, key=lambda name: found[name])


def mean_row(name: str, rows: list[Row]) -> Row:
    """Geometric means of rows of one unit, over the peers that all of them have."""
    peers = set.intersection(*(set(row.theirs) for row in rows))

    def mean(values: list[float]) -> float:
        return math.exp(statistics.fmean(map(math.log, values)))

    theirs = {peer: mean([row.theirs[peer] for row in rows]) for peer in rows[0].theirs if peer in peers}
    return Row(f"{name}: geometric mean of {len(rows)}", mean([row.ours for row in rows]), theirs, rows[0].unit, True)


def check_bits(what: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """RuntimeError unless both tensors, of the same shape, have the same bits: wrong results are not timed."""
    kind = {2: torch.int16, 4: torch.int32}[ours.element_size()]
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype or not torch.equal(ours.view(kind), theirs.view(kind)):
        raise RuntimeError(f"{what}: the bits differ; nothing is measured")


def check_close(what: str, ours: torch.Tensor, exact: torch.Tensor, limit: float) -> None:
    """RuntimeError unless |ours - exact| / |exact| over tensors of the same shape is at most limit."""
    error = float((ours.double() - exact.double()).norm() / exact.double().norm())
    if not error <= limit:
        raise RuntimeError(f"{what}: relative error {error:.2e}, at most {limit:.0e}; nothing is measured")
