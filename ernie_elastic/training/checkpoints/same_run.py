"""Whether a run that exists was started with the configuration that is asked for now, and whether it still runs."""

from __future__ import annotations

import contextlib
import fcntl
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ernie_elastic.errors import CheckpointError, ConfigError
from ernie_elastic.stages import fingerprint, say, to_jsonable, write_json
from ernie_elastic.training.ranks import rank

RUN_FILE, LOCK_FILE = "run.json", ".lock"
# What may differ between start and resume: it changes how long a run goes and what it says, never a number of it.
FREE = {
    "fingerprint",
    "training.steps",
    "training.checkpoint_every",
    "training.stop_after",
    "training.keep_checkpoints",
    "training.skip_limit",
    "training.log_every",
    "training.wandb",
    "training.tensorboard",
    "training.step_limit_s",
    "training.rank_limit_s",
    "training.async_checkpoint",
    "training.resume_other_world_size",
    "training.spikes.max_rollbacks",
    "model.transformers_version",
}


@contextlib.contextmanager
def only_process(run_dir: Path, wait_s: float) -> Iterator[None]:
    """Hold the run's lock on rank 0; the system frees it when the process ends, however it does.

    wait_s: ranks whose launcher was killed outlive it for so long at most, so that they are waited for. Raises
    CheckpointError when another process still trains in the directory then.
    """
    if rank() != 0:
        yield
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    deadline, said = time.monotonic() + wait_s, False
    with open(run_dir / LOCK_FILE, "wb") as lock:
        while True:
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if time.monotonic() >= deadline:
                    raise CheckpointError(
                        f"another process trains in {run_dir}; wait for it or end it, or choose another --run-dir"
                    ) from error
            if not said:
                say(f"pretrain: another process trains in {run_dir}; waiting up to {wait_s:.0f} s for it to end")
                said = True
            time.sleep(0.2)
        yield


def check_same_run(run_dir: Path, resolved: dict[str, Any]) -> None:
    """Note the configuration of a new run; raise ConfigError that names the difference to an existing one."""
    path = run_dir / RUN_FILE
    new = _comparable(to_jsonable(resolved))
    if path.exists():
        old = _comparable(json.loads(path.read_text()))
        changed = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
        if changed:
            key = changed[0]
            raise ConfigError(
                f"{run_dir} was started with {key} = {old.get(key)!r}, now {new.get(key)!r}; choose another --run-dir, "
                "or remove the old run"
            )
    elif rank() == 0:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_json(path, {**resolved, "fingerprint": fingerprint(resolved)})


def _comparable(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flat dotted keys of what must not change between start and resume."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        name = f"{prefix}{key}"
        if name in FREE:
            continue
        if isinstance(item, dict):
            flat.update(_comparable(item, f"{name}."))
        else:
            flat[name] = item
    return flat
