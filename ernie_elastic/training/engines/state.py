"""What an engine's state says about itself, so that it is never read by the wrong engine or number of ranks."""

from __future__ import annotations

import json
from pathlib import Path

from ernie_elastic.errors import CheckpointError
from ernie_elastic.stages import write_json
from ernie_elastic.training.configuration import TrainingConfig
from ernie_elastic.training.ranks import rank, world_size

STATE_TABLE = "engine.json"


def write_table(directory: Path, training: TrainingConfig) -> None:
    """Rank 0 writes engine, ranks and split of the state in `directory`; the other ranks do nothing."""
    if rank() == 0:
        table = {"engine": training.engine, "ranks": world_size(), "expert_parallel": training.expert_parallel}
        write_json(directory / STATE_TABLE, table)


def saved_ranks(directory: Path, training: TrainingConfig) -> int:
    """The number of ranks that wrote the state in `directory`.

    Raises CheckpointError for the state of another engine, for another split of the experts, and for another number of
    ranks unless the configuration allows it.
    """
    path = directory / STATE_TABLE
    if not path.exists():
        raise CheckpointError(
            f"{directory} has no {STATE_TABLE}, so its engine and number of ranks are unknown; start the run anew"
        )
    table = json.loads(path.read_text())
    if table["engine"] != training.engine:
        raise CheckpointError(
            f"{directory} was not written by the {training.engine} engine; pass --training.engine {table['engine']}"
        )
    if table["expert_parallel"] != training.expert_parallel:
        raise CheckpointError(
            f"{directory} was written with expert_parallel {table['expert_parallel']}, now it is "
            f"{training.expert_parallel}; pass --training.expert-parallel {table['expert_parallel']} on as many ranks"
        )
    if table["ranks"] != world_size() and not training.resume_other_world_size:
        raise CheckpointError(
            f"{directory} was written by {table['ranks']} ranks, now there are {world_size()}; start "
            f"{table['ranks']} ranks, or pass --training.resume-other-world-size"
        )
    return int(table["ranks"])
