"""Whether a run that exists was started with the configuration that is asked for now."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ernie_elastic.errors import ConfigError
from ernie_elastic.stages import fingerprint, to_jsonable, write_json
from ernie_elastic.training.ranks import rank

RUN_FILE = "run.json"
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
    "training.spikes.max_rollbacks",
    "model.transformers_version",
}


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
