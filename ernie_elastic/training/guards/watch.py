"""Ranks that watch each other, so that one that dies or hangs ends the job with its name instead of a wait without end.

Every rank tells the launcher's store that it lives and what it does; each one listens to its right neighbour (so the
store's work grows with the ranks, not with their square) and to what the others found. Processes of one machine are
looked up directly. ours: collectives alone say at best that a connection closed, and only after their own limit.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ernie_elastic.errors import ErnieElasticError, TrainingError
from ernie_elastic.training.ranks import rank, world_size

POLLS_PER_LIMIT = 6
# What backends say when a peer is gone or silent; both raise plain RuntimeErrors among others.
PEER_ERRORS = ("Connection closed", "Connection reset", "Broken pipe", "Timed out", "timed out", "NCCL", "gloo")
ADVICE = "the job ends; start the same command again, it goes on from the last checkpoint"


@dataclass(frozen=True)
class Beat:
    """What a rank last said. count grows with every beat; node and pid say which process it is."""

    count: int
    node: str
    pid: int
    doing: str

    def pack(self) -> str:
        """One line for the store."""
        return "\t".join((str(self.count), self.node, str(self.pid), self.doing))

    @staticmethod
    def unpack(line: str) -> Beat:
        """Inverse of `pack`."""
        count, node, pid, doing = line.split("\t", 3)
        return Beat(int(count), node, int(pid), doing)


class RankWatch:
    """The watch of one rank. limit_s: seconds without a sign of life after which a rank counts as dead; 0 = no watch.

    Silence is counted in own polls, not by the clock, so that a machine that slept does not look like a dead peer.
    Without a launcher's group, nothing is watched.
    """

    def __init__(self, limit_s: float) -> None:
        self.limit_s, self.interval = limit_s, max(0.2, limit_s / POLLS_PER_LIMIT)
        self.doing = "starting"
        self._ended, self._ticks, self._quiet, self._count = threading.Event(), 0, 0, 0
        self._last: Beat | None = None
        self._store: Any = None

    def start(self) -> None:
        """Begin to beat and to listen; the process group must have been joined."""
        if self.limit_s <= 0 or world_size() == 1 or not dist.is_initialized():
            return
        self._store = _connect(self.limit_s)
        for target in (self._beat_on, self._count_on):
            threading.Thread(target=target, name="rank watch", daemon=True).start()

    def note(self, doing: str) -> None:
        """Say what this rank does now, such as `step 17`; told with the next beat."""
        self.doing = doing

    def stop(self) -> None:
        """End the watch after all ranks are done (behind a barrier)."""
        self._ended.set()

    def fail(self, error: BaseException) -> BaseException:
        """Tell the others that this rank fails with `error`; returns what to raise: it names the rank that began it.

        An exchange that broke because of another rank becomes a TrainingError with that rank's name; this may take
        limit_s, until the other one's silence is certain.
        """
        if world_size() == 1:
            return error
        with contextlib.suppress(Exception):
            if self._store is not None and not _is_peer_error(error):
                self._store.set(f"left/{rank()}", f"failed: {_one_line(error)}")
        if _is_peer_error(error) and self._store is not None:
            found = self._search()
            self._ended.set()
            named = TrainingError(f"rank {rank()} lost its peers while in {self.doing}: {found}; {ADVICE}")
            named.__cause__ = error
            error = named
        else:
            self._ended.set()
            if isinstance(error, ErnieElasticError):
                error = type(error)(f"rank {rank()}: {error}")
            else:
                error.add_note(f"this was rank {rank()}, in {self.doing}; {ADVICE}")
        _record_for_launcher(error)
        return error

    def _beat_on(self) -> None:
        while not self._ended.is_set():
            try:
                self._poll()
                self._ticks = 0
            except (RuntimeError, OSError):
                pass  # the store is gone: _count_on speaks when it stays so
            self._ended.wait(self.interval)

    def _count_on(self) -> None:
        """The store itself may hang or go, with the process that hosts it."""
        while not self._ended.wait(self.interval):
            self._ticks += 1
            if self._ticks > POLLS_PER_LIMIT:
                self._die("the launcher, or the rank 0 that hosts its store, is gone or hangs")

    def _poll(self) -> None:
        store = self._store
        self._count += 1
        store.set(f"beat/{rank()}", Beat(self._count, _node(), os.getpid(), self.doing).pack())
        if store.check(["gone"]):
            self._die(store.get("gone").decode())
        neighbour = (rank() + 1) % world_size()
        found = self._state_of(neighbour)
        if found is not None and not self._ended.is_set():
            store.set("gone", found)
            self._die(found)

    def _state_of(self, neighbour: int) -> str | None:
        """Why a neighbour is lost, or None."""
        store = self._store
        if store.check([f"left/{neighbour}"]):
            return f"rank {neighbour} {store.get(f'left/{neighbour}').decode()}"
        if not store.check([f"beat/{neighbour}"]):
            return None  # it still starts; the collectives' own limit covers that
        beat = Beat.unpack(store.get(f"beat/{neighbour}").decode())
        if _process_is_gone(beat):
            return f"rank {neighbour} (process {beat.pid} on {_host(beat)}) died, last heard in {beat.doing}"
        self._quiet = self._quiet + 1 if beat == self._last else 0
        self._last = beat
        if self._quiet >= POLLS_PER_LIMIT:
            return (
                f"rank {neighbour} (process {beat.pid} on {_host(beat)}) gave no sign of life for "
                f"{self.limit_s:.0f} s, last heard in {beat.doing}"
            )
        return None

    def _search(self) -> str:
        """Which rank is behind a broken exchange; waits up to the limit for a clear sign."""
        store, ranks = self._store, [number for number in range(world_size()) if number != rank()]
        first: dict[int, Beat] = {}
        deadline = time.monotonic() + self.limit_s
        try:
            while time.monotonic() < deadline:
                if store.check(["gone"]):
                    return str(store.get("gone").decode())
                for other in ranks:
                    if store.check([f"left/{other}"]):
                        return f"rank {other} {store.get(f'left/{other}').decode()}"
                    if not store.check([f"beat/{other}"]):
                        continue
                    beat = Beat.unpack(store.get(f"beat/{other}").decode())
                    first.setdefault(other, beat)
                    if _process_is_gone(beat):
                        return f"rank {other} (process {beat.pid} on {_host(beat)}) died, last heard in {beat.doing}"
                time.sleep(0.2)
            silent = [
                f"rank {other} (process {beat.pid} on {_host(beat)})"
                for other, beat in first.items()
                if Beat.unpack(store.get(f"beat/{other}").decode()) == beat
            ]
            if silent:
                return f"{', '.join(silent)} gave no sign of life for {self.limit_s:.0f} s"
            places = ", ".join(
                f"rank {other} in {Beat.unpack(store.get(f'beat/{other}').decode()).doing}" for other in first
            )
            return f"every rank lives ({places}), so one waits for what another does not send"
        except (RuntimeError, OSError):
            return "the launcher, or the rank 0 that hosts its store, is gone"

    def _die(self, found: str) -> None:
        """End this process from the watch's thread: the main one may wait in an exchange that nobody answers."""
        if self._ended.is_set():
            return
        self._ended.set()
        message = f"pretrain: error: rank {rank()}, in {self.doing}: {found}; {ADVICE}"
        _record_for_launcher(TrainingError(message))
        print(message, file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)


def _connect(limit_s: float) -> Any:
    """A connection of the watch's own: the group's blocks while another thread waits in it."""
    from datetime import timedelta

    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=limit_s),
    )
    return dist.PrefixStore(f"ernie_elastic/watch/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _node() -> str:
    """Names a set of processes that see each other's numbers: host and process namespace."""
    namespace = ""
    with contextlib.suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    return f"{socket.gethostname()} {namespace}"


def _host(beat: Beat) -> str:
    return beat.node.partition(" ")[0]


def _process_is_gone(beat: Beat) -> bool:
    """True when the beat's process ran on this machine and has ended."""
    if beat.node != _node():
        return False
    try:
        os.kill(beat.pid, 0)
        state = Path(f"/proc/{beat.pid}/stat").read_text().rpartition(")")[2].split()[0]
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return state in "ZX"


def _is_peer_error(error: BaseException) -> bool:
    return (
        isinstance(error, RuntimeError)
        and not isinstance(error, ErnieElasticError)
        and any(sign in str(error) for sign in PEER_ERRORS)
    )


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]


def _record_for_launcher(error: BaseException) -> None:
    """Leave the message where torchrun looks for it when it sums up a failure."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        with contextlib.suppress(Exception):
            get_error_handler().record_exception(error)
