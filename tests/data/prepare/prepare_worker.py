"""A process that runs `prepare_data` and may kill itself: TOKENIZERS DATA OUT WORKERS MOMENT.

MOMENT n: SIGKILL just before the n-th of the calls that make files last or give them their names; 0: never, and their
number is printed; -1: workers take jobs that do not end.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ernie_elastic.data.prepare.shard_job import Job, ShardMaker
from ernie_elastic.data.prepare.shard_pool import run_jobs
from ernie_elastic.data.prepare.stage import PrepareConfig, prepare_data
from tests.support.tiny_tokenizers import tiny_layout

CALLS = ("fsync", "replace", "rename")


def config(data: Path, num_workers: int, **changes: Any) -> PrepareConfig:
    """What every run of the kill test prepares."""
    return PrepareConfig(
        data=str(data), num_records=0, row_length=64, records_per_shard=4, num_workers=num_workers,
        max_reject_share=0.2, text_dropout=0.1, **changes,
    )  # fmt: skip


def die_at(moment: int) -> list[int]:
    """Count the calls, and die at one of them."""
    count = [0]

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    return count


class Endless(ShardMaker):
    """Says that it has a job, and never finishes it."""

    def make(self, job: Job, *_: object) -> None:
        job.note.touch()
        time.sleep(3600)


def endless(tokenizers: Path, out: Path) -> None:
    """Two workers in the middle of their jobs."""
    maker = Endless(None, str(tokenizers), tiny_layout(tokenizers), None)  # type: ignore[arg-type]
    jobs = [Job(out, out.with_name(f"{out.name}-{number}"), 0, 1) for number in range(2)]
    for _ in run_jobs(maker, jobs, 2, lambda _: None):
        raise AssertionError("an endless job ended")


if __name__ == "__main__":
    tokenizers, data, out = (Path(word) for word in sys.argv[1:4])
    if sys.argv[5] == "-1":
        endless(tokenizers, out)
    calls = die_at(int(sys.argv[5]))
    prepare_data(tokenizers, out, config(data, int(sys.argv[4])), tiny_layout(tokenizers))
    print(f"calls {calls[0]}")
