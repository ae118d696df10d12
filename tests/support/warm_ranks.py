"""Ranks that start in a moment: forked from a server that has imported torch, Transformers and DeepSpeed already.

A fresh interpreter takes 6 seconds of a core to import them, most of the time of a short run. Tests of launchers, of
kills and of what a command prints start real interpreters instead. The ranks see no GPU: DeepSpeed looks for one when
it is imported, and a process forked after that cannot use it.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests.support import ROOT
from tests.support.pretrain_runs import free_port

LIMIT_S = 280
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["deepspeed", "ernie_elastic.pipeline.pretrain", "tests.modeling.common"])


def launch(ranks: int, script: Path, *arguments: str) -> CompletedProcess[str]:
    """Run a script on so many ranks, one thread each; what all of them printed is in `stderr`.

    The first rank that fails ends the others. AssertionError after LIMIT_S seconds.
    """
    _start_server()
    shared = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **NO_GPU}
    if ranks > 1:
        shared |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "printed"
        processes: list[BaseProcess] = []
        for rank in range(ranks):
            variables = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            if ranks == 1:
                variables = {**os.environ, **shared}
            processes.append(SERVER.Process(target=_run, args=(script, arguments, variables, log)))
        try:
            for process in processes:
                process.start()
            code = _end_of(processes)
        finally:
            for process in processes:
                process.kill()
                process.join(30)
        return CompletedProcess([str(script), *arguments], code, "", log.read_text())


def _start_server() -> None:
    """Start the server that ranks are forked from, unless it runs."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in NO_GPU.items():
            patch.setenv(name, value)
        multiprocessing.forkserver.ensure_running()


def _run(script: Path, arguments: Sequence[str], variables: dict[str, str], log: Path) -> None:
    """What a rank does, in a process forked for it."""
    with open(log, "a") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    os.environ.clear()
    os.environ.update(variables)
    import torch

    torch.set_num_threads(1)  # OMP_NUM_THREADS is read when torch is imported
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")


def _end_of(processes: Sequence[BaseProcess]) -> int:
    """Wait for all, or for the first that fails; its exit code."""
    begun = time.monotonic()
    while time.monotonic() - begun < LIMIT_S:
        codes = [process.exitcode for process in processes]
        failed = [code for code in codes if code]
        if failed or None not in codes:
            return failed[0] if failed else 0
        time.sleep(0.02)
    raise AssertionError(f"the ranks did not end within {LIMIT_S} s")
