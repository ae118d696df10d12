"""Which model directory a user means: that of a run, of a step, a sub-model, a compressed or any Hugging Face one."""

from __future__ import annotations

from pathlib import Path

from ernie_elastic.errors import CheckpointError

RUNS = Path("runs")


def newest_run(root: Path = RUNS) -> Path:
    """The run below `root` whose `latest` pointer moved last; CheckpointError when there is none."""
    pointers = sorted(root.glob("*/checkpoints/latest"), key=lambda path: path.stat().st_mtime)
    if not pointers:
        raise CheckpointError(f"{root.absolute()} holds no run with a checkpoint; name the source, or train one first")
    return pointers[-1].parent.parent


def resolve_model_dir(source: Path | str | None) -> Path:
    """The model directory that a user means: a run, a step, a sub-model, a compressed or any Hugging Face directory.

    Raises CheckpointError when nothing of the kind is there.
    """
    path = newest_run() if source is None else Path(source)
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a directory; expected a run, a checkpoint step or a model directory")
    pointer = path / "checkpoints" / "latest"
    if pointer.exists():
        path = path / "checkpoints" / pointer.read_text().strip()
    if (path / "model" / "config.json").exists():
        path = path / "model"
    if not (path / "config.json").exists():
        raise CheckpointError(f"{path} holds no config.json; expected a run, a checkpoint step or a model directory")
    return path
