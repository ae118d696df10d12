"""The launch scripts build the command lines that they say, and what docs/training.md shows is taken by pretrain."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ernie_elastic import cli
from ernie_elastic.pipeline import commands
from tests.support import ROOT
from tests.support.commands import bash_lines

LAUNCH = ROOT / "scripts" / "launch"
PRETRAIN = str(ROOT / "scripts" / "pretrain.py")


def start(script: str, folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a launch script where torchrun, deepspeed, srun, scontrol and nvidia-smi print what they are given."""
    for name in ("torchrun", "deepspeed", "srun"):
        program = folder / name
        program.write_text(f'#!/bin/sh\necho {name} "$@"; echo threads "$OMP_NUM_THREADS" master "$MASTER_ADDR"\n')
    (folder / "scontrol").write_text("#!/bin/sh\necho node-7; echo node-8\n")
    (folder / "nvidia-smi").write_text(
        '#!/bin/sh\ni=0; while [ "$i" -lt "${GPUS:-0}" ]; do echo GPU; i=$((i+1)); done\n'
    )
    for program in folder.iterdir():
        program.chmod(0o755)
    environment = {"PATH": f"{folder}:/usr/bin:/bin", **variables}
    command = ["bash", str(LAUNCH / script), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def words(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[0].split()


def test_torchrun_on_one_machine_starts_a_process_per_gpu(tmp_path):
    line = words(start("torchrun.sh", tmp_path, "small", "--training.steps", "2", GPUS="4"))
    assert line == ["torchrun", "--standalone", "--nproc_per_node=4", PRETRAIN, "small", "--training.steps", "2"]
    assert "--nproc_per_node=2" in words(start("torchrun.sh", tmp_path, "small"))
    assert "--nproc_per_node=3" in words(start("torchrun.sh", tmp_path, "small", GPUS="4", NPROC="3"))


def test_torchrun_on_several_machines_meets_at_the_first(tmp_path):
    line = words(start("torchrun.sh", tmp_path, "small", NNODES="2", MASTER_ADDR="node-a", MASTER_PORT="1234"))
    assert line[1:] == [
        "--nnodes=2", "--nproc_per_node=2", "--rdzv_backend=c10d", "--rdzv_id=ernie-elastic",
        "--rdzv_endpoint=node-a:1234", PRETRAIN, "small",
    ]  # fmt: skip


def test_deepspeed_gets_no_local_rank(tmp_path):
    line = words(start("deepspeed.sh", tmp_path, "small", MASTER_PORT="1234", GPUS="8"))
    assert line == ["deepspeed", "--no_local_rank", "--master_port=1234", "--num_gpus=8", PRETRAIN, "small"]
    line = words(start("deepspeed.sh", tmp_path, "small", HOSTFILE="hosts"))
    assert "--hostfile=hosts" in line and not any(word.startswith("--num_gpus") for word in line)


def test_slurm_starts_one_torchrun_per_machine(tmp_path):
    job = {"SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "node-[7-8]", "SLURM_JOB_NUM_NODES": "2"}
    done = start("slurm.sh", tmp_path, "small", SLURM_SUBMIT_DIR=str(ROOT), SLURM_GPUS_ON_NODE="8", **job)
    assert words(done) == ["srun", "--kill-on-bad-exit=1", str(LAUNCH / "torchrun.sh"), "small"]
    assert "master node-7" in done.stdout
    lost = start("slurm.sh", tmp_path, "small", SLURM_SUBMIT_DIR=str(tmp_path), **job)
    assert lost.returncode == 2 and "submit from the checkout" in lost.stderr


def test_a_missing_launcher_is_named(tmp_path):
    empty = subprocess.run(
        ["/bin/bash", str(LAUNCH / "deepspeed.sh"), "small"],
        env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert empty.returncode == 2 and "deepspeed is not on PATH" in empty.stderr


def test_scripts_are_clean():
    scripts = [str(path) for path in sorted(LAUNCH.glob("*.sh"))]
    assert len(scripts) == 4
    for path in scripts:
        done = subprocess.run(["bash", "-n", path], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed; bash -n found nothing")
    done = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def documented() -> list[str]:
    text = (ROOT / "docs" / "training.md").read_text()
    return [line for _, line in bash_lines(text) if "scripts/launch/" in line]


@pytest.mark.parametrize("line", documented())
def test_documented_launches_exist_and_parse(line):
    parts = line.split()
    at = next(i for i, word in enumerate(parts) if word.startswith("scripts/launch/"))
    assert (ROOT / parts[at]).is_file() and os.access(ROOT / parts[at], os.X_OK)
    cli.parse("scripts/pretrain.py", commands.pretrain, parts[at + 1 :])


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("script", ["torchrun.sh", "deepspeed.sh"])
def test_real_launchers_start_pretrain(script):
    """Two processes print the help: the launcher's own arguments do not reach the command line."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "MASTER_PORT": "29631", "NPROC": "2"}
    done = subprocess.run(
        ["bash", str(LAUNCH / script), "debug", "--help"], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "--training.zero-stage" in done.stdout
