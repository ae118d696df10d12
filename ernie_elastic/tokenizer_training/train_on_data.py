"""The stage `train-tokenizer` on any data: the full tokenizers and the refiner, as a stage directory.

Contract: `out` appears whole: the tokenizer, `health.json` (numbers on held-out records), samples, `report.html`,
`metrics.jsonl`, `rejects.txt` (records that could not be read, and why) and a manifest. Until then the state lies in
`.NAME.training` beside it and the same command goes on from there. Under torchrun all ranks train; rank 0 writes.

Shape letters: N items, F frames, H/W pixels, L samples.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ernie_elastic.errors import ConfigError, DataError
from ernie_elastic.schema import Sample, SegmentKind
from ernie_elastic.stages import say, stage_output, to_jsonable, write_atomic, write_json
from ernie_elastic.tokenizer_training.loop import (  # fmt: skip
    METRICS_NAME,
    LoopConfig,
    LoopReport,
    Trainee,
    WorkDirectory,
    run_loop,
)
from ernie_elastic.tokenizer_training.media_batches import Crop, MediaBatches, MediaReader, Records
from ernie_elastic.tokenizer_training.records import open_records
from ernie_elastic.tokenizer_training.report import SampleSheet, write_report
from ernie_elastic.training.metrics import read_metrics
from ernie_elastic.training.ranks import group, rank

# Fields of a run that change no weight: a stopped training goes on with other values of them.
UNDECISIVE = ("health_items", "checkpoint_every", "num_workers", "max_reject_share")
SHEET_ITEMS = 6  # most held-out records that a sample sheet shows


@dataclass(frozen=True)
class DataRun:
    """What every tokenizer run on data has.

    data: a directory of files, a Hugging Face dataset, or "world" for the embedded world. seed: of order, crops and
    training. held_out_share: share of the records, by the hash of their names, that is not trained on. health_items:
    how many pieces of those are measured. checkpoint_every: steps between saved states. num_workers: processes that
    read ahead. max_reject_share: the run stops when more of the records than this cannot be read.
    """

    data: str
    seed: int = 0
    held_out_share: float = 0.1
    health_items: int = 24
    checkpoint_every: int = 200
    num_workers: int = 0
    max_reject_share: float = 0.01

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ConfigError(f"train-tokenizer: seed {self.seed} must be 0 or more")
        if not 0 < self.held_out_share < 1 or self.health_items < 1:
            raise ConfigError(
                f"train-tokenizer: held_out_share {self.held_out_share} must lie in (0, 1), health_items "
                f"{self.health_items} at least 1"
            )

    def loop(self, steps: int, num_records: int) -> LoopConfig:
        """The loop's part; num_records: those that are trained on."""
        return LoopConfig(steps, self.checkpoint_every, self.num_workers, self.max_reject_share, num_records)


class Recipe(Protocol):
    """How one kind of tokenizer is trained on data, measured and shown."""

    kind: str
    media: tuple[SegmentKind, ...]
    sample_rate: int | None  # Hz of the sounds that it wants
    size: int | None  # pixels of a side of the embedded world's pictures
    steps: int
    batch_size: int

    def crop(self) -> Crop:
        """The crop of a training batch: uint8 [F, H, W, 3] or float32 [L] of one record's medium."""

    def trainee(self) -> Trainee:
        """The trainee of this process; called once, before any batch of shape [N, ...] is read."""

    def finish(self, trainee: Any, held_out: Records, directory: Path) -> tuple[dict[str, Any], SampleSheet]:
        """Save what was trained; return its health on held-out records (shapes as in the batches) and samples."""


def train_on_data(recipe: Recipe, run: DataRun, out: Path | str, overwrite: bool = False) -> dict[str, Any]:
    """Train, write the stage directory to `out`, return its health.

    Raises ConfigError for settings that do not fit, DataError when the data cannot be used, CheckpointError when `out`
    exists and overwrite is False.
    """
    out = Path(out)
    if out.exists() and not overwrite:
        with stage_output(out, f"train-tokenizer-{recipe.kind}", {}):  # raises the one message for it
            pass
    begun = time.perf_counter()
    health: dict[str, Any] = {}
    with group():
        train = open_records(run, recipe.media, "train", recipe.sample_rate, recipe.size)
        held_out = open_records(run, recipe.media, "held-out", recipe.sample_rate, recipe.size)
        if not len(held_out):
            raise DataError(
                f"train-tokenizer: of {len(train)} records of {run.data} none is held out at a share of "
                f"{run.held_out_share}; raise --held-out-share or give more records"
            )
        # Before the training, so that a set whose held-out part cannot be read does not fail after it.
        measured = _readable(held_out, recipe.media, run)
        # The numbers of records too: other data under the same name would go on with a state that never saw it.
        records = {"train": len(train), "held_out": len(held_out)}
        decisive = {name: value for name, value in to_jsonable(run).items() if name not in UNDECISIVE}
        work = WorkDirectory(out, {"kind": recipe.kind, "records": records, **decisive}, overwrite)
        trainee = recipe.trainee()
        batches = MediaBatches(MediaReader(train, recipe.media, run.data), recipe.crop(), recipe.batch_size, run.seed)
        report = run_loop(trainee, batches, run.loop(recipe.steps, len(train)), work, f"{_name(recipe)}")
    # Without the other ranks, who have left: they would give up on a report that takes longer than the group's limit.
    if rank() == 0:
        report.rejects = sorted({*report.rejects, *measured.rejects})
        health = _write(recipe, run, out, overwrite, trainee, (records, measured), (work, report))
        work.remove()
        say(f"{_name(recipe)}: wrote {out} in {time.perf_counter() - begun:.0f} s; open {out / 'report.html'}")
    return health


def _name(recipe: Recipe) -> str:
    return recipe.kind if recipe.kind == "refiner" else f"{recipe.kind} tokenizer"


def _write(
    recipe: Recipe,
    run: DataRun,
    out: Path,
    overwrite: bool,
    trainee: Trainee,
    records: tuple[dict[str, int], Records],
    done: tuple[WorkDirectory, LoopReport],
) -> dict[str, Any]:
    (counts, held_out), (work, report) = records, done
    extra: dict[str, Any] = {}
    stage = f"train-tokenizer-{recipe.kind}"
    with stage_output(
        out, stage, {"kind": recipe.kind, **to_jsonable(run)}, overwrite=overwrite, extra=extra
    ) as folder:
        measured, sheet = recipe.finish(trainee, held_out, folder)
        seen = {
            "train_records": counts["train"], "held_out_records": counts["held_out"], "train_steps": recipe.steps,
            "items_seen": recipe.steps * recipe.batch_size, "rejected_records": len(report.rejects),
        }  # fmt: skip
        health = seen | measured
        shutil.copyfile(work.path / METRICS_NAME, folder / METRICS_NAME)
        write_atomic(folder / "rejects.txt", "".join(f"{reason}\n" for reason in report.rejects))
        write_json(folder / "health.json", health)
        write_report(
            folder, f"{_name(recipe).capitalize()}: {run.data}", health, read_metrics(folder / METRICS_NAME), sheet
        )
        extra["health"] = health
    for line in health.get("collapse", []):
        say(f"{_name(recipe)}: sign of collapse: {line}")
    if report.rejects:
        unread = f"{len(report.rejects)} records could not be read"
        say(f"{_name(recipe)}: {unread}; {out / 'rejects.txt'} names them")
    return health


class Readable:
    """Held-out records that can be read, and why the others among them cannot."""

    def __init__(self, records: Records, indices: list[int], rejects: list[str]) -> None:
        self.records, self.indices, self.rejects = records, indices, rejects

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Sample:
        """The record; its media are uint8 [H, W, 3] or [F, H, W, 3], or float32 [L]."""
        return self.records[self.indices[index]]


def _readable(records: Records, media: tuple[SegmentKind, ...], run: DataRun) -> Readable:
    reader = MediaReader(records, media, f"the held-out part of {run.data}")
    indices: list[int] = []
    rejects: list[str] = []
    for index in range(len(records)):
        if len(indices) == max(run.health_items, SHEET_ITEMS):
            break
        try:
            reader.media(index)
            indices.append(index)
        except DataError as error:
            rejects.append(str(error))
        if len(rejects) > max(1, run.max_reject_share * len(records)):
            raise DataError(
                f"train-tokenizer: {len(rejects)} of {len(records)} held-out records cannot be read, more than the "
                f"limit of {run.max_reject_share:.0%}; the first one: {rejects[0]}"
            )
    if not indices:
        raise DataError(f"train-tokenizer: no held-out record of {run.data} can be read; the first one: {rejects[0]}")
    return Readable(records, indices, rejects)


def held_out_pieces(
    records: Records, media: tuple[str, ...], crop: Callable[[np.ndarray, np.random.Generator, int], np.ndarray],
    count: int, seed: int,
) -> list[np.ndarray]:  # fmt: skip
    """`count` pieces (uint8 [F, H, W, 3] or float32 [L]) of held-out records in turn; the same at every call.

    The next record takes the place of one that cannot be read (the stage passes only those that can). Raises DataError
    when none can.
    """
    reader = MediaReader(records, media, "the held-out part")
    pieces = []
    for number in range(count):
        array, _ = reader.readable(number % len(records))
        rng = np.random.default_rng((seed, number))
        pieces.append(crop(array[0], rng, number))
    return pieces


__all__ = ["DataRun", "Recipe", "held_out_pieces", "train_on_data"]
