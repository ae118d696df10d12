"""Rows of the benchmark `training` that need checkpoints on a disk or runs of several processes."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.common import Row
from ernie_elastic.training.balance import RoutingLedger
from ernie_elastic.training.checkpoints.checkpoint import TrainerState
from ernie_elastic.training.checkpoints.writer import CheckpointWriter
from ernie_elastic.training.engines.choice import TorchEngine
from ernie_elastic.training.guards.skip import StepGuard
from ernie_elastic.training.losses import LossBalance, LossWeights, PosteriorWeights
from ernie_elastic.training.metrics import read_metrics

STEPS_BETWEEN = 4


def checkpoint_rows(engine: TorchEngine, step: Callable[[], Any], quick: bool) -> list[Row]:
    """How long a checkpoint stops the training, and what it costs in all, beside it and at once.

    Each round has STEPS_BETWEEN steps; the three kinds of round run in turn. The stall is the time in `save`; the cost
    is a round's time beyond one without a checkpoint, so it holds what writing takes from the steps beside it
    (1 ms where noise hides it).
    """
    config = engine.model.config
    state = TrainerState(
        RoutingLedger(config.num_hidden_layers, config.num_experts),
        LossBalance(LossWeights(), PosteriorWeights()),
        StepGuard(0),
    )
    stalls: dict[str, list[float]] = {"beside": [], "at_once": []}
    rounds: dict[str, list[float]] = {"none": [], "beside": [], "at_once": []}
    with tempfile.TemporaryDirectory() as folder:
        writers = {name: CheckpointWriter(Path(folder) / name, None, {}, 2, name == "beside") for name in stalls}
        for turn in range(2 if quick else 6):
            for name, times in rounds.items():
                begun = time.perf_counter()
                if name in writers:
                    writers[name].save(turn + 1, engine, state)
                    stalls[name].append(time.perf_counter() - begun)
                for _ in range(STEPS_BETWEEN):
                    step()
                if name in writers:
                    writers[name].wait()
                times.append(time.perf_counter() - begun)
    # The first round of each makes its memory and files.
    middle = {name: statistics.median(times[1:]) for name, times in rounds.items()}
    stall = {name: statistics.median(times[1:]) for name, times in stalls.items()}
    one = middle["none"] / STEPS_BETWEEN
    return [
        Row("checkpoint: the training waits", stall["beside"], {"step": one, "at_once": stall["at_once"]}, "s", False),
        Row(
            "checkpoint: cost in all", max(middle["beside"] - middle["none"], 1e-3),
            {"step": one, "at_once": max(middle["at_once"] - middle["none"], 1e-3)}, "s", False,
        ),
    ]  # fmt: skip


def run_rows() -> list[Row]:
    """Two ranks of one thread against one process, at the same global batch, and the time spent waiting for data.

    The three runs go one after another over the same packed data of the embedded world; medians over their steps.
    """
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder) / "inputs"
        _train(inputs, 1, 1, 2, inputs)
        runs = {
            name: _train(Path(folder) / name, ranks, threads, 16, inputs)
            for name, ranks, threads in (("ours", 2, 1), ("one_rank", 1, 1), ("one_rank_two_threads", 1, 2))
        }
    speed = {
        name: statistics.median(record["tokens_per_s"] for record in records[2:]) for name, records in runs.items()
    }
    waits = [record["data_wait_s"] for record in runs["ours"][2:]]
    steps = [record["seconds"] for record in runs["ours"][2:]]
    return [
        Row(
            "2 ranks x 1 thread, DeepSpeed", speed["ours"],
            {name: speed[name] for name in ("one_rank", "one_rank_two_threads")}, "positions/s", True,
        ),
        Row(
            "waiting for data, mean of a step", max(statistics.fmean(waits), 1e-6), {"step": statistics.fmean(steps)},
            "s", False,
        ),
    ]  # fmt: skip


def _train(run_dir: Path, ranks: int, threads: int, steps: int, inputs: Path) -> list[dict[str, Any]]:
    root = Path(__file__).resolve().parents[2]
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--rdzv_backend=c10d"]
    width = {
        "hidden-size": 128, "num-attention-heads": 4, "head-dim": 32, "moe-intermediate-size": 64,
        "understanding-width": 64,
    }  # fmt: skip
    command = [
        sys.executable, *launcher, "--rdzv_endpoint=localhost:0", str(root / "scripts" / "pretrain.py"), "debug",
        "--run-dir", str(run_dir), "--tokenizers-dir", str(inputs / "tokenizers"),
        "--packed-dir", str(inputs / "packed"),
        "--training.steps", str(steps), "--training.rows-per-step", "16", "--training.checkpoint-every", "0",
        "--training.log-every", "0", "--elastic.no-enabled",
        *[word for name, value in width.items() for word in (f"--model.{name}", str(value))],
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(root)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    return read_metrics(run_dir / "metrics.jsonl")
