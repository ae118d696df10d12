"""Ranks that start in a moment: forked from a server that has imported torch, Transformers and DeepSpeed already.

A fresh interpreter takes 9 seconds of a core to import them, most of the time of a short run; what a launcher prints
about a rank, and what a command needs before it runs, is tested on real interpreters instead. The ranks see no GPU:
DeepSpeed looks for one when it is imported, and a process forked after that cannot use it.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests.support import ROOT

LIMIT_S = 280
# Read when the server imports torch and DeepSpeed.
SHARED = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
TORCHRUN = "torch.distributed.run"
SERVER = multiprocessing.get_context("forkserver")
# DeepSpeed imports its Muon, and with it torch's compiler, when it makes an engine.
SERVER.set_forkserver_preload(
    ["deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer", TORCHRUN, "tyro", "ernie_elastic.pipeline.commands",
     "ernie_elastic.pipeline.pretrain", "tests.modeling.common"]
)  # fmt: skip


class Forked:
    """A process forked from the server, with the methods of subprocess.Popen that tests need."""

    def __init__(self, program: Path | str, arguments: Sequence[str], log: Path, **variables: str) -> None:
        """Run a script, or TORCHRUN with its arguments; what it prints is appended to `log`."""
        _start_server()
        environment = {**os.environ, **SHARED, **variables}
        self._process = SERVER.Process(target=_run, args=(program, tuple(arguments), environment, log, os.getcwd()))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """The exit code, None while it runs; minus the signal's number when a signal ended it."""
        return self._process.exitcode

    def wait(self, limit_s: float | None = None) -> int:
        """The exit code once it has ended. Raises subprocess.TimeoutExpired after `limit_s` seconds."""
        self._process.join(limit_s)
        code = self._process.exitcode
        if code is None:
            raise subprocess.TimeoutExpired(self._process.name, limit_s or 0.0)
        return code

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()


def torchrun(ranks: int, script: Path, *arguments: str, log: Path, **variables: str) -> Forked:
    """torchrun's own agent, forked, which forks so many ranks; what all of them print is appended to `log`."""
    options = [f"--nproc_per_node={ranks}", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    forks = ["--run-path", "--start-method=fork"]
    return Forked(TORCHRUN, [*options, *forks, str(script.resolve()), *arguments], log, **variables)


def ranks_of(ranks: int, script: Path, arguments: Sequence[str], logs: Sequence[Path]) -> list[Forked]:
    """The ranks themselves, without an agent; rank i prints to logs[i]."""
    group = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        Forked(script, arguments, logs[rank], RANK=str(rank), LOCAL_RANK=str(rank), **group) for rank in range(ranks)
    ]


def launch(ranks: int, script: Path, *arguments: str) -> CompletedProcess[str]:
    """Run a script on so many ranks, one thread each; what all of them printed is in `stderr`.

    The first rank that fails ends the others. AssertionError after LIMIT_S seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "printed"
        processes: list[Forked] = []
        try:
            if ranks == 1:
                processes = [Forked(script, arguments, log)]
            else:
                processes = ranks_of(ranks, script, arguments, [log] * ranks)
            code = _end_of(processes)
        finally:
            for process in processes:
                process.kill()
                process.wait(30)
        return CompletedProcess([str(script), *arguments], code, "", log.read_text())


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _start_server() -> None:
    """Start the server that ranks are forked from, unless it runs."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SHARED.items():
            patch.setenv(name, value)
        multiprocessing.forkserver.ensure_running()


def _run(program: Path | str, arguments: Sequence[str], variables: Mapping[str, str], log: Path, folder: str) -> None:
    """What a process does that was forked for it."""
    with open(log, "a") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server ignores it
    if program == TORCHRUN:
        from torch.distributed import run

        run.main(list(arguments))
        return
    sys.argv = [str(program), *arguments]
    runpy.run_path(str(program), run_name="__main__")


def _end_of(processes: Sequence[Forked]) -> int:
    """Wait for all, or for the first that fails; its exit code."""
    begun = time.monotonic()
    while time.monotonic() - begun < LIMIT_S:
        codes = [process.poll() for process in processes]
        failed = [code for code in codes if code]
        if failed or None not in codes:
            return failed[0] if failed else 0
        time.sleep(0.02)
    raise AssertionError(f"the ranks did not end within {LIMIT_S} s")
