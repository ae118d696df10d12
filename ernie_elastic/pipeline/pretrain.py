"""`pretrain`: a preset with overrides in, a trained run out; what it lacks (tokenizers, packed data) is made first."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from ernie_elastic.data.packed.shards import STAGE as PACKED_STAGE
from ernie_elastic.data.prepare.stage import prepare_data
from ernie_elastic.data.prepare.tokenise import TOKENIZER_NAMES, Tokenizers
from ernie_elastic.errors import CheckpointError, ConfigError
from ernie_elastic.modeling.document_layout import layout_of
from ernie_elastic.presets import PRESETS, RunConfig
from ernie_elastic.stages import fingerprint, is_main_process, read_manifest, say
from ernie_elastic.tokenizer_training.train_on_world import train_tokenizer
from ernie_elastic.training.loop import pretrain

WAIT_LIMIT = timedelta(hours=6)


def parse_run(prog: str, arguments: list[str]) -> tuple[str, RunConfig]:
    """(preset name, its config with overrides). Without a name the demo preset is meant."""
    import tyro

    if not arguments or (arguments[0].startswith("--") and arguments[0] != "--help"):
        arguments = ["demo", *arguments]
    presets = {name: (make.__doc__ or name, make()) for name, make in PRESETS.items()}
    config = tyro.extras.overridable_config_cli(presets, prog=prog, args=arguments)
    return arguments[0], config


def run_pretrain(preset: str, run: RunConfig) -> Path:
    """Make what is missing (on rank 0, the others wait), then train. Returns the last checkpoint."""
    marker = (
        run.run_dir / f".ready-{os.environ.get('TORCHELASTIC_RUN_ID', 'single')}-{os.environ.get('MASTER_PORT', '0')}"
    )
    if is_main_process():
        make_inputs(run)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            marker.parent.mkdir(parents=True, exist_ok=True)
            marker.touch()
    else:
        _wait_for(marker)
    try:
        return pretrain(
            run.run_dir, run.model.to_config, run.training, run.elastic, run.tokenizers_path, run.mixture(), preset
        )
    finally:
        if is_main_process():
            marker.unlink(missing_ok=True)


def make_inputs(run: RunConfig) -> None:
    """Train the tokenizers and pack the data of a run, unless they stand there with the same configuration.

    What stands in a directory that the user named is taken as it is; `pretrain` checks that data, tokenizers and model
    fit each other.
    """
    for kind in TOKENIZER_NAMES:
        path = run.tokenizers_path / kind
        if run.tokenizers_dir is not None and path.exists():
            continue
        if not is_done(path, f"train-tokenizer-{kind}", run.tokenizers.resolved(kind)):
            train_tokenizer(kind, path, run.tokenizers)
    if run.data.sources or (run.packed_dir is not None and run.packed_dir.exists()):
        return
    if not is_done(run.packed_path, PACKED_STAGE, run.prepare):
        layout = layout_of(run.model.to_config(Tokenizers.load(run.tokenizers_path)))
        prepare_data(run.tokenizers_path, run.packed_path, run.prepare, layout)


def is_done(path: Path, stage: str, config: Any) -> bool:
    """True when `path` is a whole output of `stage` with this configuration; ConfigError when it has another one."""
    if not path.exists():
        return False
    manifest = read_manifest(path, (stage,))
    if manifest.fingerprint != fingerprint(config):
        raise ConfigError(
            f"{path} was made with configuration {manifest.fingerprint}, this run needs {fingerprint(config)}; remove "
            "it, or choose another --run-dir"
        )
    say(f"{stage}: {path} is there already")
    return True


def _wait_for(marker: Path) -> None:
    begun = time.monotonic()
    while not marker.exists():
        if time.monotonic() - begun > WAIT_LIMIT.total_seconds():
            raise CheckpointError(f"rank 0 did not finish the inputs within {WAIT_LIMIT}; look at its messages")
        time.sleep(0.2)


__all__ = ["is_done", "make_inputs", "parse_run", "run_pretrain"]
