"""`prepare-data` that is killed at any moment goes on, and leaves the bytes of a run that was not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ernie_elastic.stages import MANIFEST_NAME, read_manifest
from tests.support import ROOT
from tests.support.media_files import gif, png, wav
from tests.support.tiny_tokenizers import WORDS, save_tiny_tokenizers

WORKER = Path(__file__).with_name("prepare_worker.py")


def files_of(directory: Path) -> dict[str, bytes]:
    """Every file's bytes; of the manifest all but the time."""
    found = {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    manifest = json.loads(found[MANIFEST_NAME])
    del manifest["created_at"], manifest["config"]["num_workers"], manifest["fingerprint"]
    return found | {MANIFEST_NAME: json.dumps(manifest).encode()}


class Runs:
    """Runs of the worker on the same records."""

    def __init__(self, root: Path) -> None:
        self.root = root
        save_tiny_tokenizers(root / "tokenizers")
        data, rng = root / "data", np.random.default_rng(0)
        data.mkdir()
        for number in range(8):
            (data / f"{number}.png").write_bytes(png(rng) if number else b"broken")
            (data / f"{number}.gif").write_bytes(gif(rng, number + 1))
            (data / f"{number}.wav").write_bytes(wav(rng, 4000 + 700 * number))
            (data / f"{number}.txt").write_text(" ".join([WORDS] * (number + 1)))

    def command(self, out: str, workers: int, moment: int = 0) -> list[str]:
        places = [str(self.root / name) for name in ("tokenizers", "data", out)]
        return [sys.executable, str(WORKER), *places, str(workers), str(moment)]

    def environment(self) -> dict[str, str]:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}

    def run(self, out: str, workers: int = 1, moment: int = 0) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(out, workers, moment), env=self.environment(), capture_output=True, text=True, timeout=120
        )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("kill"))


@pytest.fixture(scope="module")
def whole(runs: Runs) -> tuple[dict[str, bytes], int]:
    """The files of a run that nothing stopped, and how many moments it has."""
    done = runs.run("whole")
    assert done.returncode == 0, done.stderr
    return files_of(runs.root / "whole"), int(done.stdout.split("calls ")[1])


@pytest.mark.timeout(1200)
def test_a_run_killed_at_any_moment_goes_on_to_the_same_bytes(
    runs: Runs, whole: tuple[dict[str, bytes], int], stress: int
) -> None:
    expected, moments = whole
    assert len([name for name in expected if name.startswith("shard-")]) == 8 and moments > 30
    # Sampled: three kills of one and the same output, one after the other. Full: also each of many moments by itself.
    chains = [[4, moments // 3, moments * 2 // 5]]
    if stress > 1:
        chains += [[moment] for moment in sorted({*range(1, moments + 1, 3), moments - 2, moments - 1, moments})]
    for number, chain in enumerate(chains):
        out = runs.root / f"killed-{number}"
        for moment in chain:
            stopped = runs.run(out.name, moment=moment)
            assert stopped.returncode == -signal.SIGKILL, (moment, stopped.stderr)
            assert not out.exists()
        again = runs.run(out.name)
        assert again.returncode == 0, again.stderr
        if len(chain) > 1:
            assert "going on with" in again.stdout
            assert int(again.stdout.split("calls ")[1]) < moments // 2, "finished shards are not made anew"
        assert files_of(out) == expected, chain
        read_manifest(out, verify=True)
        assert not list(runs.root.glob(f".{out.name}*")), "nothing is left beside the output"


def test_workers_end_with_a_killed_parent_and_their_shards_are_the_same(
    runs: Runs, whole: tuple[dict[str, bytes], int]
) -> None:
    out = runs.root / "parallel"
    process = subprocess.Popen(
        runs.command(out.name, 2), env=runs.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    notes = runs.root / ".parallel.progress"
    _until(lambda: notes.is_dir() and any(notes.glob("shard-*.json")))
    children = _descendants(process.pid)
    assert len(children) >= 2 and not out.exists()
    process.kill()
    process.wait()
    _until(lambda: not any(_runs(child) for child in children))
    again = runs.run(out.name, workers=2)
    assert again.returncode == 0 and "going on with" in again.stdout, again.stderr
    assert files_of(out) == whole[0]


def test_a_worker_ends_with_its_parent_in_the_middle_of_a_job(runs: Runs) -> None:
    process = subprocess.Popen(runs.command("endless", 2, -1), env=runs.environment(), stderr=subprocess.DEVNULL)
    _until(lambda: all((runs.root / f"endless-{number}").exists() for number in range(2)))
    children = _descendants(process.pid)
    process.kill()
    process.wait()
    try:
        _until(lambda: not any(_runs(child) for child in children), 20)
    finally:
        for child in filter(_runs, children):
            os.kill(child, signal.SIGKILL)


def _until(condition: object, seconds: float = 60.0) -> None:
    limit = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < limit
        time.sleep(0.002)


def _runs(pid: int) -> bool:
    """True while the process is there and no zombie, whose command line is empty."""
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except OSError:
        return False


def _descendants(pid: int) -> list[int]:
    """Processes below `pid`, as /proc lists them."""
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        found += [int(child), *_descendants(int(child))]
    return found
