"""Shards by several processes: each takes the next job when it has finished one.

Contract: the first error of any worker is raised here and ends all of them, as does Ctrl-C; what they had half written
has no final name. A worker whose parent was killed ends at once. ours: not concurrent.futures, whose workers outlive a
killed parent, and cannot be stopped in the middle of a job.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from typing import Any

from ernie_elastic.data.prepare.shard_job import Job, ShardMaker
from ernie_elastic.errors import ErnieElasticError

Progress = Callable[[int], None]


class WorkerError(ErnieElasticError, RuntimeError):
    """A worker that ended by itself, such as one that ran out of memory."""


def run_jobs(maker: ShardMaker, jobs: Sequence[Job], num_workers: int, done: Progress) -> Generator[Job, None, None]:
    """Carry out the jobs, in this process or in num_workers others; yields each when it is finished, in any order.

    done is told of every few records. Closing the generator ends the workers. Raises what a job raises, WorkerError
    when a worker dies.
    """
    if num_workers <= 1 or len(jobs) <= 1:
        tokenizers = maker.load() if jobs else None
        for job in jobs:
            assert tokenizers is not None
            maker.make(job, tokenizers, done)
            yield job
        return
    context = get_context("spawn")  # a fork would copy torch's threads in an undefined state
    workers: dict[Connection, Any] = {}
    try:
        for _ in range(min(num_workers, len(jobs))):
            ours, theirs = context.Pipe()
            workers[ours] = context.Process(target=_serve, args=(theirs, maker), daemon=True)
            workers[ours].start()
            theirs.close()
        yield from _hand_out(workers, deque(jobs), done)
    finally:
        for connection, process in workers.items():
            process.kill()
            process.join()
            connection.close()


def _hand_out(workers: dict[Connection, Any], waiting: deque[Job], done: Progress) -> Generator[Job, None, None]:
    busy: dict[Connection, Job] = {}

    def hand(connection: Connection) -> None:
        busy[connection] = waiting.popleft()
        with contextlib.suppress(OSError):  # it has died, which the next reading says
            connection.send(busy[connection])

    for connection in workers:
        hand(connection)
    while busy:
        for ready in wait(list(busy)):
            assert isinstance(ready, Connection)
            try:
                said = ready.recv()
            except (EOFError, OSError) as error:
                job, process = busy[ready], workers[ready]
                process.join()
                raise WorkerError(
                    f"prepare-data: a worker ended with exit code {process.exitcode} at the records {job.start} to "
                    f"{job.stop - 1}; use fewer --num-workers or a smaller --records-per-shard if memory ran out, then "
                    "run the same command again: what is done is kept"
                ) from error
            if isinstance(said, int):
                done(said)
            elif isinstance(said, BaseException):
                raise said
            else:
                finished = busy.pop(ready)
                if waiting:
                    hand(ready)
                yield finished


def _serve(connection: Connection, maker: ShardMaker) -> None:
    """A worker: jobs in; numbers of records, then None for a finished job or its error out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(OSError):  # nobody is there to tell
        try:
            tokenizers = maker.load()
            while (job := _next(connection)) is not None:
                maker.make(job, tokenizers, connection.send)
                connection.send(None)
        except Exception as error:
            connection.send(_picklable(error))


def _next(connection: Connection) -> Job | None:
    try:
        return connection.recv()
    except EOFError:
        return None


def _picklable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # an error whose class cannot be made anew from its arguments
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
