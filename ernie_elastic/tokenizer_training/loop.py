"""The loop that trains a tokenizer or the refiner: order, progress, metrics.jsonl, resume; one process or several.

Contract: what comes out is a function of (trainee, batches, steps) and of the number of ranks; a run that was stopped
or killed goes on from its last saved state to the same bits. Until the stage is done its state lies in a hidden
directory beside the output, `.NAME.training`: `settings.json`, `state.pt` with its SHA-256, `metrics.jsonl`, `lock`.

Shape letters: N items of one rank's share of a batch, F frames, H/W pixels, L samples.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

from ernie_elastic.errors import CheckpointError, ConfigError, DataError
from ernie_elastic.stages import disk_error, fingerprint, progress, say, to_jsonable, write_atomic, write_json
from ernie_elastic.training.metrics import MetricsWriter
from ernie_elastic.training.ranks import average_gradients, barrier, rank, world_size

STATE_NAME = "state.pt"
METRICS_NAME = "metrics.jsonl"
SETTINGS_NAME = "settings.json"
LOCK_NAME = "lock"  # held by rank 0 while it trains; the system frees it when the process ends, however it ends
STEP_SHIFT = 20  # bits of a generator's seed that the rank takes; the step lies above them


class Trainee(Protocol):
    """What the loop trains: models, optimizers and losses of one kind of tokenizer."""

    def step(self, batch: torch.Tensor, step: int) -> dict[str, float]:
        """One optimizer step on this rank's share: uint8 [N, F, H, W, 3] or float32 [N, L]; returns what to log."""

    def state_dict(self) -> dict[str, Any]:
        """All that a bit-exact resume needs, as tensors and plain values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""


@dataclass(frozen=True)
class Batch:
    """One rank's share of one step: uint8 [N, F, H, W, 3] or float32 [N, L], and records that could not be read."""

    items: torch.Tensor
    rejects: tuple[str, ...] = ()


class Batches(Protocol):
    """Batches as a function of the step, the same in every process and after every resume."""

    def __call__(self, step: int) -> Batch:
        """This rank's share of step `step`: items uint8 [N, F, H, W, 3] or float32 [N, L]."""


@dataclass(frozen=True)
class LoopConfig:
    """steps: optimizer steps. checkpoint_every: steps between saved states. num_workers: processes that read ahead;
    0 = this one. max_reject_share: the run stops when more of its records than this cannot be read; num_records: how
    many there are (None: as many as were read so far)."""

    steps: int
    checkpoint_every: int = 200
    num_workers: int = 0
    max_reject_share: float = 0.01
    num_records: int | None = None

    def __post_init__(self) -> None:
        if self.steps < 1 or self.checkpoint_every < 1 or self.num_workers < 0:
            raise ConfigError(
                f"tokenizer training: steps {self.steps} and checkpoint_every {self.checkpoint_every} must be at least "
                f"1, num_workers {self.num_workers} at least 0"
            )


@dataclass
class LoopReport:
    """Of a finished loop: items seen by all ranks, the records that could not be read (each once), the seconds of this
    session, and where a resumed one began."""

    items: int
    rejects: list[str]
    seconds: float
    first_step: int


def step_generator(seed: int, step: int, of_rank: int | None = None) -> torch.Generator:
    """Random numbers of one step on one rank (default: this process), the same after a resume."""
    place = rank() if of_rank is None else of_rank
    digest = hashlib.blake2b(f"{seed}:{step}:{place}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


class WorkDirectory:
    """Where an unfinished training keeps its state; removed when its stage is written."""

    def __init__(self, out: Path | str, settings: Any, overwrite: bool = False) -> None:
        """settings: what decides the training, JSON-able; a directory of other settings is an error.

        overwrite: begin anew when the settings differ. Raises ConfigError with the first difference, or when another
        process trains there now; CheckpointError when the directory cannot be made.
        """
        out = Path(out)
        self.path = out.with_name(f".{out.name}.training")
        wanted = to_jsonable(settings)
        if rank() == 0:
            self._take()
            found = self._settings()
            if found is None and (self.path / STATE_NAME).exists():
                # The settings go first when a directory is removed, so a kill in between left what nobody can name.
                say(f"{self.path} has no {SETTINGS_NAME}, its removal was cut short; training begins anew")
                self._clear()
            if found is not None and fingerprint(found) != fingerprint(wanted):
                if not overwrite:
                    raise ConfigError(
                        f"{self.path} holds an unfinished training with other settings "
                        f"({_first_difference(found, wanted)}); run it with the same ones to go on, pass --overwrite "
                        "to begin anew, or choose another --out"
                    )
                self._clear()
            write_json(self.path / SETTINGS_NAME, wanted)
        barrier()

    def _take(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / LOCK_NAME, "w")  # noqa: SIM115 - held as long as this object
        except OSError as error:
            raise disk_error(error, self.path) from error
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise ConfigError(
                    f"{self.path} is in use by another training, maybe one whose launcher was killed; wait for it, end "
                    "it, or choose another --out"
                ) from error
            raise disk_error(error, self.path) from error

    def _settings(self) -> Any:
        try:
            return json.loads((self.path / SETTINGS_NAME).read_text())
        except (OSError, ValueError):
            return None

    def save(self, trainee: Trainee, step: int, rejects: list[str]) -> None:
        """Keep the state after `step` steps; called by every rank, written by rank 0, whole or not at all."""
        every = [rejects]
        if dist.is_available() and dist.is_initialized():
            every = [[] for _ in range(world_size())]
            dist.all_gather_object(every, rejects)
        if rank() == 0:
            stream = io.BytesIO()
            torch.save({"step": step, "rejects": every, "trainee": trainee.state_dict()}, stream)
            data = stream.getvalue()
            write_atomic(self.path / STATE_NAME, hashlib.sha256(data).digest() + data)
        barrier()

    def restore(self, trainee: Trainee) -> tuple[int, list[str]]:
        """(finished steps, records that could not be read on this rank so far); (0, []) for a fresh start.

        Raises CheckpointError when the state is damaged, ConfigError when it is of another number of ranks.
        """
        path = self.path / STATE_NAME
        if not path.exists():
            return 0, []
        data = path.read_bytes()
        if hashlib.sha256(data[32:]).digest() != data[:32]:
            raise CheckpointError(f"{path} is damaged: its SHA-256 is not the stored one; remove {self.path}")
        state = torch.load(io.BytesIO(data[32:]), map_location="cpu", weights_only=True)
        if len(state["rejects"]) != world_size():
            raise ConfigError(
                f"{self.path} was trained by {len(state['rejects'])} processes and now {world_size()} run; start as "
                "many, or choose another --out"
            )
        trainee.load_state_dict(state["trainee"])
        return int(state["step"]), list(state["rejects"][rank()])

    def remove(self) -> None:
        """Forget the state, after its stage is written."""
        if rank() == 0:
            self._clear()
            shutil.rmtree(self.path, ignore_errors=True)
            self._lock.close()

    def _clear(self) -> None:
        (self.path / SETTINGS_NAME).unlink(missing_ok=True)
        for file in self.path.iterdir():
            if file.name != LOCK_NAME:
                file.unlink()


class _Steps(Dataset):
    """Batches behind an index, as a DataLoader reads them."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __getitem__(self, step: int) -> Batch | str:
        try:
            return self.batches(step)
        except DataError as error:  # a worker would wrap it into another kind
            return str(error)


def run_loop(trainee: Trainee, batches: Batches, config: LoopConfig, work: WorkDirectory, desc: str) -> LoopReport:
    """Train to the last step, from the state that `work` holds; desc names the bar.

    Metrics are of rank 0's share. Raises DataError when too many records cannot be read, ConfigError when a metric is
    not finite; the state before stays.
    """
    with _denormals_as_zero():
        return _run(trainee, batches, config, work, desc)


@contextlib.contextmanager
def _denormals_as_zero() -> Iterator[None]:
    """A step of a convolutional tokenizer whose activations hold denormal numbers takes a CPU six times as long.

    The processor's state is this thread's, and is put back.
    """
    before = float(torch.tensor(2.0**-140) * 1.0) == 0.0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def _run(trainee: Trainee, batches: Batches, config: LoopConfig, work: WorkDirectory, desc: str) -> LoopReport:
    first, rejects = work.restore(trainee)
    if first:
        say(f"{desc}: goes on from step {first} of {config.steps}")
    writer = MetricsWriter(work.path / METRICS_NAME, first) if rank() == 0 else None
    begun, items = time.perf_counter(), 0
    bar = progress(total=config.steps, desc=desc, unit="step", initial=first)
    try:
        for step, batch in enumerate(_read(batches, config, first), start=first):
            before = time.perf_counter()
            metrics = trainee.step(batch.items, step)
            _check_finite(metrics, step, work.path)
            items += len(batch.items) * world_size()
            rejects = list(dict.fromkeys([*rejects, *batch.rejects]))
            _check_rejects(rejects, (step + 1) * len(batch.items), config)
            if writer is not None:
                rounded = {name: float(f"{value:.6g}") for name, value in metrics.items()}
                writer.write({"step": step, **rounded, "step_s": round(time.perf_counter() - before, 4)})
            bar.update()
            if (step + 1) % config.checkpoint_every == 0 and step + 1 < config.steps:
                work.save(trainee, step + 1, rejects)
        work.save(trainee, config.steps, rejects)
    finally:
        bar.close()
        if writer is not None:
            writer.close()
    return LoopReport(items, _all_rejects(rejects), time.perf_counter() - begun, first)


def _read(batches: Batches, config: LoopConfig, first: int) -> Iterator[Batch]:
    # Forked, since crops are closures that cannot be sent to a fresh process.
    start = "fork" if config.num_workers else None
    loader: DataLoader = DataLoader(
        _Steps(batches), batch_size=None, sampler=range(first, config.steps), num_workers=config.num_workers,
        multiprocessing_context=start,
    )  # fmt: skip
    for batch in loader:
        if isinstance(batch, str):
            raise DataError(batch)
        yield batch


def _check_finite(metrics: dict[str, float], step: int, path: Path) -> None:
    bad = {name: value for name, value in metrics.items() if not math.isfinite(value)}
    if bad:
        raise ConfigError(
            f"tokenizer training: {', '.join(f'{name} is {value}' for name, value in bad.items())} at step {step}; "
            f"lower the learning rate or the weight of that loss (the last saved state is in {path})"
        )


def _check_rejects(rejects: list[str], items: int, config: LoopConfig) -> None:
    total = config.num_records or items
    if len(rejects) > max(1, config.max_reject_share * total):
        of = f"the first {items}" if config.num_records is None else f"{total}"
        raise DataError(
            f"tokenizer training: {len(rejects)} of {of} records cannot be read, more than the limit of "
            f"{config.max_reject_share:.0%}; the first one: {rejects[0]}"
        )


def _all_rejects(rejects: list[str]) -> list[str]:
    every = [rejects]
    if dist.is_available() and dist.is_initialized():
        every = [[] for _ in range(world_size())]
        dist.all_gather_object(every, rejects)
    return sorted({reason for part in every for reason in part})


def _first_difference(found: Any, wanted: Any, name: str = "") -> str:
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in [*wanted, *found]:
            if found.get(key) != wanted.get(key):
                return _first_difference(found.get(key), wanted.get(key), f"{name}.{key}".lstrip("."))
    return f"{name}: {found!r} there, {wanted!r} now"


__all__ = [
    "METRICS_NAME",
    "Batch",
    "Batches",
    "LoopConfig",
    "LoopReport",
    "Trainee",
    "WorkDirectory",
    "average_gradients",
    "run_loop",
    "step_generator",
]
