"""Writing checkpoints beside the training: the state is copied, a thread writes it, rank 0 gives it its name.

Order on rank 0: files of all ranks, fsync, rename to `step-N`, then `latest`. A kill at any moment leaves the
checkpoints before as they are, and at most a hidden folder that the next run removes.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ernie_elastic.data.prepare.tokenise import Tokenizers
from ernie_elastic.errors import CheckpointError
from ernie_elastic.stages import (
    disk_error,
    publish_directory,
    sha256_file,
    sync_tree,
    system_error,
    write_atomic,
    write_json,
    write_manifest,
)
from ernie_elastic.training.checkpoints.checkpoint import (
    CHECKSUM_FILE,
    LEDGER_FILE,
    MODEL_STAGE,
    STATE_FILE,
    TrainerState,
    export_dtype,
    list_steps,
    parameter_names,
    write_model,
)
from ernie_elastic.training.checkpoints.snapshot import HeldFile, HostCopies, diverted
from ernie_elastic.training.engines.choice import Engine
from ernie_elastic.training.ranks import all_reduce_sum, barrier, rank, world_size

POLL_S = 0.02
SETTLE_S = 5.0


@dataclass
class _Job:
    """One checkpoint on its way. The tensors belong to the writer's host copies."""

    step: int
    temporary: Path
    final: Path
    held: list[HeldFile]
    state: dict[str, Any]
    mass_LE: torch.Tensor
    model: dict[str, torch.Tensor]
    config: Any  # of the model, as it was at this step
    own_done: threading.Event = field(default_factory=threading.Event)
    cancelled: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None


class CheckpointWriter:
    """Writes the checkpoints of one run; every rank has one and makes the same calls.

    resolved: the run's configuration, for the manifest. keep: so many checkpoints stay. background: write in a thread
    while the training goes on, at the cost of the state once more in host memory; False writes at once.
    before_publishing: called on rank 0 when all files are written, before they get their name.
    """

    def __init__(
        self,
        run_dir: Path,
        tokenizers: Tokenizers | None,
        resolved: Any,
        keep: int,
        background: bool = True,
        before_publishing: Callable[[], None] = lambda: None,
    ) -> None:
        self.root, self.tokenizers, self.resolved, self.keep = run_dir / "checkpoints", tokenizers, resolved, keep
        self.background, self.before_publishing = background, before_publishing
        self._copies = HostCopies()
        self._job: _Job | None = None
        self._thread: threading.Thread | None = None

    def save(self, step: int, engine: Engine, state: TrainerState) -> Path:
        """Begin the checkpoint of a step, after the one before has its name; returns the directory it will have.

        Raises CheckpointError on every rank when one of them could not write the checkpoint before.
        """
        self.wait()
        final, temporary = self.root / f"step-{step}", self.root / f".step-{step}.tmp"
        try:
            if rank() == 0:
                for left in self.root.glob(".step-*"):
                    shutil.rmtree(left, ignore_errors=True)
                (temporary / "optimizer").mkdir(parents=True)
            barrier()
            self._job = job = self._snapshot(step, temporary, final, engine, state)
        except (OSError, RuntimeError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise _readable(error, final, self.root) from error
        if self.background:
            self._thread = threading.Thread(target=self._run, args=(job,), name="checkpoint", daemon=True)
            self._thread.start()
        else:
            self._run(job)
            self.wait()
        return final

    def failed(self) -> bool:
        """True when this rank's part of the checkpoint that is being written has failed; `wait` raises it."""
        return self._job is not None and self._job.error is not None

    def wait(self) -> None:
        """Until the checkpoint that is being written has its name; every rank calls it. CheckpointError on all ranks
        when one of them failed; what was written of it is removed."""
        job, thread = self._job, self._thread
        self._job = self._thread = None
        if job is None:
            return
        job.own_done.wait()
        failed = float(all_reduce_sum(torch.tensor(float(job.error is not None)))) > 0
        if failed:
            job.cancelled.set()
        if thread is not None:
            thread.join()
        if not failed:  # rank 0 may still fail when it gives the directory its name
            failed = float(all_reduce_sum(torch.tensor(float(job.error is not None)))) > 0
        if not failed:
            return
        if rank() == 0:
            shutil.rmtree(job.temporary, ignore_errors=True)
        if job.error is not None and not isinstance(job.error, _Cancelled):
            raise _readable(job.error, job.final, self.root) from job.error
        raise CheckpointError(f"cannot write {job.final}: another rank failed; its message says why")

    def go_back(self, step: int) -> None:
        """Make `step-N` the newest checkpoint again and remove those after it; every rank calls it."""
        if rank() == 0:
            write_atomic(self.root / "latest", f"step-{step}\n")
            _sync_names(self.root)
            for later in list_steps(self.root):
                if later > step:
                    self._remove(later)
        barrier()

    def _remove(self, step: int) -> None:
        # Under a hidden name first: a kill in the middle leaves no half directory that looks like a checkpoint.
        old = self.root / f".step-{step}.old"
        (self.root / f"step-{step}").rename(old)
        shutil.rmtree(old, ignore_errors=True)

    def settle(self) -> None:
        """Without the other ranks, when the run fails: give the writing a moment to end, else remove what is there."""
        job, thread = self._job, self._thread
        self._job = self._thread = None
        if job is None or thread is None:
            return
        thread.join(SETTLE_S)
        job.cancelled.set()
        thread.join(SETTLE_S)
        if rank() == 0:
            shutil.rmtree(job.temporary, ignore_errors=True)

    def _snapshot(self, step: int, temporary: Path, final: Path, engine: Engine, state: TrainerState) -> _Job:
        """Copy everything that the checkpoint holds; collective, since engines gather in `save_state`."""
        self._copies.begin()
        with diverted(self._copies) as held:
            engine.save_state(temporary / "optimizer")
        model: dict[str, torch.Tensor] = {}
        whole = engine.full_state_dict()  # every rank; empty but on rank 0
        parameters = parameter_names(engine.model.config) if whole else set()
        for name, tensor in whole.items():
            model[name] = self._copies.tensor(tensor, export_dtype(name, tensor, parameters))
        config = copy.deepcopy(engine.model.config)
        self._copies.end()
        return _Job(
            step, temporary, final, held, state.to_json(step), state.ledger.mass_LE.clone(), model, config
        )  # fmt: skip

    def _run(self, job: _Job) -> None:
        try:
            try:
                self._write_own(job)
            finally:
                job.own_done.set()
            if rank() == 0:
                self._write_rank0(job)
                self._collect(job)
                self._publish(job)
        except BaseException as error:
            job.error = error

    def _write_own(self, job: _Job) -> None:
        """This rank's files, then a note of their SHA-256, by which rank 0 knows that they are there."""
        folder = job.temporary / "optimizer"
        for item in job.held:
            item.write()
        table = {str(item.path.relative_to(folder)): sha256_file(item.path) for item in job.held}
        write_json(folder / f".written-{rank()}.json", table)

    def _write_rank0(self, job: _Job) -> None:
        optimizer, model_dir = job.temporary / "optimizer", job.temporary / "model"
        save_file({"mass_LE": job.mass_LE}, optimizer / LEDGER_FILE)
        write_json(optimizer / STATE_FILE, job.state)
        write_model(job.config, job.model, model_dir, self.tokenizers)
        save_file({"mass_LE": job.mass_LE}, model_dir / LEDGER_FILE)
        write_manifest(model_dir, MODEL_STAGE, self.resolved, extra={"step": job.step})

    def _collect(self, job: _Job) -> None:
        """Wait for the notes of all ranks and make them one table, with what engines wrote in other ways."""
        folder, table = job.temporary / "optimizer", {}
        for number in range(world_size()):
            note = folder / f".written-{number}.json"
            while not note.exists():
                if job.cancelled.wait(POLL_S):
                    raise _Cancelled
            table.update(json.loads(note.read_text()))
            note.unlink()
        for file in sorted(folder.rglob("*")):
            name = str(file.relative_to(folder))
            if file.is_file() and name not in table:
                table[name] = sha256_file(file)
        write_json(folder / CHECKSUM_FILE, dict(sorted(table.items())))

    def _publish(self, job: _Job) -> None:
        sync_tree(job.temporary)
        self.before_publishing()
        if job.cancelled.is_set():
            raise _Cancelled
        publish_directory(job.temporary, job.final)
        _sync_names(self.root)
        write_atomic(self.root / "latest", f"step-{job.step}\n")
        _sync_names(self.root)
        for step in steps_to_remove(list_steps(self.root), job.step, self.keep):
            self._remove(step)


class _Cancelled(Exception):
    """The checkpoint is given up because of something that another rank or the training met."""


def _sync_names(folder: Path) -> None:
    """Wait until the disk has the names in a folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def steps_to_remove(steps: list[int], newest: int, keep: int) -> list[int]:
    """Which checkpoints go when `newest` has been written: all but the last `keep`, and what is beyond it, left by a
    run that went back to an earlier one."""
    past = [step for step in steps if step <= newest]
    return past[: -max(1, keep)] + [step for step in steps if step > newest]


def _readable(error: BaseException, final: Path, root: Path) -> BaseException:
    """A full disk and its like as one line; other errors as they are."""
    cause = system_error(error, root) if isinstance(error, Exception) else None
    return error if cause is None else disk_error(cause, final)


__all__ = ["CheckpointWriter", "steps_to_remove"]
