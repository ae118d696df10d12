"""A run that meets data which makes its loss rise: back to the checkpoint before, around that data, bit for bit."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from ernie_elastic.data.packed.loader import PackedLoader
from ernie_elastic.data.packed.mixture import MixtureConfig
from ernie_elastic.data.prepare.stage import prepare_data
from ernie_elastic.data.prepare.tokenise import Tokenizers
from ernie_elastic.errors import CheckpointError, ConfigError, TrainingError
from ernie_elastic.modeling.document_layout import layout_of
from ernie_elastic.pipeline.pretrain import run_pretrain
from ernie_elastic.presets import debug
from ernie_elastic.training import loop
from ernie_elastic.training.guards.spikes import SpikeConfig
from tests.distributed import rollback_worker
from tests.distributed.rollback_worker import STEPS
from tests.support import pretrain_runs as runs
from tests.support.warm_ranks import launch

pytestmark = pytest.mark.distributed
ROLLBACK_WORKER = Path(rollback_worker.__file__)


@pytest.fixture
def reads(monkeypatch) -> list[int]:
    """The units that the loader reads; losses of a step that read a poisoned one are five times as high."""
    reads: list[int] = []
    read = PackedLoader.step

    def noted(self, unit):
        reads.append(unit)
        return read(self, unit)

    monkeypatch.setattr(PackedLoader, "step", noted)
    monkeypatch.setattr(loop._Run, "step", rollback_worker.poisoned(loop._Run.step))
    return reads


def run(run_dir, data=None, **changes):
    config = debug()
    training = dataclasses.replace(
        config.training, engine="torch", rows_per_step=2, log_every=0,
        **{"steps": STEPS, "checkpoint_every": 5, "spikes": SpikeConfig(factor=1.8, steps=2, window=20), **changes},
    )  # fmt: skip
    run_pretrain("debug", dataclasses.replace(config, run_dir=run_dir, training=training, data=data or config.data))


def mixture(whole, folder):
    """Two sources, the second of another task, whose weight grows where the run is past its spike."""
    tokenizers, model = whole / "tokenizers", debug().model
    prepare = dataclasses.replace(debug().prepare, num_records=60, seed=9, task_weights={"text": 1.0})
    prepare_data(tokenizers, folder / "other", prepare, layout_of(model.to_config(Tokenizers.load(tokenizers))))
    return MixtureConfig(((whole / "packed", 3.0), (folder / "other", 1.0)), ((0.75, 1, 9.0),))


# The second has a checkpoint inside the spike, and two sources.
@pytest.mark.parametrize(("every", "back", "mixed"), [(5, 15, False), (2, 16, True)])
def test_the_run_goes_back_and_around_and_a_resume_meets_the_same(whole, tmp_path, reads, every, back, mixed):
    once, data = runs.copy_inputs(whole, tmp_path / "once"), mixture(whole, tmp_path) if mixed else None
    run(once, data, checkpoint_every=every)
    records = runs.records(once)
    events = [record for record in records if "event" in record]
    assert len(events) == 1
    assert {k: events[0][k] for k in ("event", "step", "spike_step", "skipped_rows")} == {
        "event": "rollback", "step": back, "spike_step": 18, "skipped_rows": 2 * (19 - back),
    }  # fmt: skip
    steps = [record["step"] for record in records if "event" not in record]
    assert steps == list(range(STEPS)), "every step once: those of the spike are gone"
    assert json.loads((once / "rollbacks.json").read_text()) == [
        {"step": back, "spike": 18, "skipped_units": 19 - back}
    ]
    after = reads[reads.index(18) + 2 :]  # the feed reads one ahead
    assert after == list(range(19, STEPS + 19 - back)), "it reads what follows the spike"
    parts = runs.copy_inputs(whole, tmp_path / "parts")
    for _ in range(STEPS // (3 * every)):
        run(parts, data, stop_after=3 * every, checkpoint_every=every)
    assert runs.records(parts) == records
    if mixed:
        with pytest.raises(ConfigError, match="weights"):
            run(parts, dataclasses.replace(data, changes=()), checkpoint_every=every)


@pytest.mark.slow
def test_two_ranks_under_deepspeed_go_back_too(whole, tmp_path):
    """DeepSpeed's state is loaded into an engine that has gone on training; a resume meets the same run."""
    once, parts = (runs.copy_inputs(whole, tmp_path / name) for name in ("once", "parts"))
    for run_dir, stops in ((once, ["0"]), (parts, ["15", "15"])):
        for stop in stops:
            done = launch(2, ROLLBACK_WORKER, str(run_dir), stop)
            assert done.returncode == 0, done.stderr[-3000:]
    records = runs.records(once)
    assert [record["step"] for record in records if "event" in record] == [15]
    assert runs.records(parts) == records


def test_two_runs_in_one_directory_do_not_mix(whole, tmp_path):
    run_dir = runs.copy_inputs(whole, tmp_path / "run")
    holder = subprocess.Popen(
        [sys.executable, "-c", "import fcntl, sys, time; f = open(sys.argv[1], 'wb'); fcntl.lockf(f, fcntl.LOCK_EX); "
         "print('held', flush=True); time.sleep(float(sys.argv[2]))", str(run_dir / ".lock"), "60"],
        stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(CheckpointError, match="another process trains in"):
            run(run_dir, steps=2, rank_limit_s=0.5)
        assert not (run_dir / "run.json").exists()
        threading.Timer(2, holder.kill).start()
        run(run_dir, steps=2, rank_limit_s=60)  # it waits for the other one to end
    finally:
        holder.kill()
        holder.wait()
    assert runs.num_lines(run_dir) == 2


def test_too_many_rollbacks_and_no_checkpoint_to_go_back_to_are_errors(whole, tmp_path, reads):
    with pytest.raises(TrainingError, match=r"after 0 rollbacks already .limit 0"):
        run(
            runs.copy_inputs(whole, tmp_path / "none"),
            spikes=SpikeConfig(factor=1.8, steps=2, window=20, max_rollbacks=0),
        )
    with pytest.raises(TrainingError, match="no checkpoint is older"):
        run(runs.copy_inputs(whole, tmp_path / "young"), checkpoint_every=50)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU trains with it")
def test_an_attention_that_cannot_train_here_ends_the_run_before_its_first_step(whole, tmp_path):
    run_dir = runs.copy_inputs(whole, tmp_path / "run")
    with pytest.raises(ConfigError, match="flex_attention trains on a GPU only"):
        run(run_dir, steps=2, attention="flex_attention")
    assert not (run_dir / "metrics.jsonl").exists() and not (run_dir / "checkpoints").exists()
