"""Checkpoints that are written beside the training: the state of their step, whole or not at all, in order."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ernie_elastic.data.groups.grouping import build_document
from ernie_elastic.data.packed.packing import collate
from ernie_elastic.errors import CheckpointError
from ernie_elastic.modeling.document_layout import layout_of
from ernie_elastic.training.balance import RoutingLedger
from ernie_elastic.training.checkpoints import writer as checkpoint_writer
from ernie_elastic.training.checkpoints.checkpoint import (
    TrainerState,
    checkpoint_problem,
    latest_checkpoint,
    load_checkpoint,
)
from ernie_elastic.training.checkpoints.snapshot import HeldFile, HostCopies, diverted
from ernie_elastic.training.checkpoints.writer import CheckpointWriter, steps_to_remove
from ernie_elastic.training.configuration import TrainingConfig
from ernie_elastic.training.engines.choice import TorchEngine
from ernie_elastic.training.guards.skip import StepGuard
from ernie_elastic.training.losses import LossBalance, LossWeights, PosteriorWeights
from tests.modeling.common import DOCUMENTS, random_parts, tiny_model


def new_state() -> TrainerState:
    return TrainerState(RoutingLedger(6, 6), LossBalance(LossWeights(), PosteriorWeights()), StepGuard(3))


@pytest.fixture
def engine() -> TorchEngine:
    engine = TorchEngine(tiny_model(0), TrainingConfig(engine="torch", rows_per_step=1))
    train(engine)
    return engine


def train(engine: TorchEngine) -> None:
    config = engine.model.config
    parts = [random_parts(name, 1, config) for name in DOCUMENTS]
    batch = collate([[build_document(part, layout_of(config)) for part in parts]], 512)
    engine.train_step([batch], config.full_spec(), 1e-2)


def flat(engine: TorchEngine) -> list[torch.Tensor]:
    moments = engine.optimizer.state_dict()["state"]
    return [
        *(tensor.detach().clone() for tensor in engine.model.state_dict().values()),
        *(value.clone() for number in sorted(moments) for value in moments[number].values()),
    ]


def writer(tmp_path: Path, background: bool = True, keep: int = 3) -> CheckpointWriter:
    return CheckpointWriter(tmp_path, None, {}, keep, background)


@pytest.fixture
def gate(monkeypatch) -> threading.Event:
    """The background thread writes nothing before this is set."""
    gate, write = threading.Event(), HeldFile.write

    def waiting(self: HeldFile) -> None:
        assert gate.wait(60)
        write(self)

    monkeypatch.setattr(HeldFile, "write", waiting)
    return gate


def test_a_checkpoint_holds_its_own_step_whatever_is_trained_meanwhile(engine, tmp_path, gate):
    saved, state, work = flat(engine), new_state(), writer(tmp_path)
    state.ledger.mass_LE += 3
    state.balance.ema["text"], state.guard.skipped = 0.1, 7
    checkpoint = work.save(1, engine, state)
    train(engine)
    state.ledger.mass_LE += 1
    state.balance.ema["text"], state.guard.skipped = 0.2, 8
    engine.model.config.visual_active_bits = 1
    assert not checkpoint.exists() and latest_checkpoint(tmp_path) is None
    gate.set()
    work.wait()
    assert not all(torch.equal(now, then) for now, then in zip(flat(engine), saved, strict=True))
    found, loaded = TorchEngine(tiny_model(1), engine.training), new_state()
    assert load_checkpoint(latest_checkpoint(tmp_path), found, loaded) == 1
    assert all(torch.equal(now, then) for now, then in zip(flat(found), saved, strict=True))
    assert loaded.ledger.mass_LE.eq(3).all() and loaded.balance.ema == {"text": 0.1} and loaded.guard.skipped == 7
    weights = load_file(checkpoint / "model" / "model.safetensors")
    names = dict(found.model.named_parameters())
    assert all(torch.equal(names[n].to(torch.bfloat16), t) for n, t in weights.items() if n in names)
    assert '"visual_active_bits": 1' not in (checkpoint / "model" / "config.json").read_text()


def test_at_once_and_beside_write_the_same_bytes(engine, tmp_path):
    for name, background in (("at_once", False), ("beside", True)):
        work = writer(tmp_path / name, background)
        for step in (1, 2):  # the second snapshot uses the memory of the first
            work.save(step, engine, new_state())
        work.wait()
    first, second = (tmp_path / name / "checkpoints/step-2" for name in ("at_once", "beside"))
    names = sorted(str(path.relative_to(first)) for path in first.rglob("*") if path.is_file())
    assert names == sorted(str(path.relative_to(second)) for path in second.rglob("*") if path.is_file())
    for name in names:
        if not name.endswith(("manifest.json", "checksums.json", ".pt")):
            assert (first / name).read_bytes() == (second / name).read_bytes(), name
    assert not list(tmp_path.rglob(".*"))


def test_the_next_checkpoint_waits_for_the_one_before(engine, tmp_path, gate):
    work, done = writer(tmp_path), threading.Event()
    work.save(1, engine, new_state())

    def second() -> None:
        work.save(2, engine, new_state())
        done.set()

    thread = threading.Thread(target=second)
    thread.start()
    assert not done.wait(0.3)
    gate.set()
    thread.join(30)
    assert done.is_set() and checkpoint_problem(tmp_path / "checkpoints/step-1") is None
    work.wait()
    assert latest_checkpoint(tmp_path).name == "step-2"


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("where", ["engine", "model", "manifest", "name"])
def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(engine, tmp_path, monkeypatch, background, where):
    work = writer(tmp_path, background)
    good = work.save(1, engine, new_state())
    work.wait()

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    target, name = {
        "engine": (HeldFile, "write"), "model": (checkpoint_writer, "write_model"),
        "manifest": (checkpoint_writer, "write_manifest"), "name": (checkpoint_writer, "publish_directory"),
    }[where]  # fmt: skip
    monkeypatch.setattr(target, name, full)
    with pytest.raises(CheckpointError, match=r"disk full while writing .*step-2: .* MiB free"):
        work.save(2, engine, new_state())
        assert background, "written at once, it fails at once"
        work.wait()
    assert latest_checkpoint(tmp_path) == good and checkpoint_problem(good) is None
    assert sorted(path.name for path in good.parent.iterdir()) == ["latest", "step-1"]
    monkeypatch.undo()
    again = work.save(2, engine, new_state())
    work.wait()
    assert latest_checkpoint(tmp_path) == again


def test_a_file_of_the_model_is_checked_too(engine, tmp_path, caplog):
    work = writer(tmp_path)
    before, newest = work.save(1, engine, new_state()), work.save(2, engine, new_state())
    work.wait()
    weights = newest / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert latest_checkpoint(tmp_path) == before and "the SHA-256 of model.safetensors" in caplog.text


def test_names_appear_when_all_files_are_on_the_disk_and_latest_moves_last(engine, tmp_path, monkeypatch):
    events: list[str] = []
    for module, name in (
        (checkpoint_writer, "sync_tree"), (checkpoint_writer, "publish_directory"), (checkpoint_writer, "write_atomic"),
    ):  # fmt: skip
        original = getattr(module, name)

        def noted(*args, _name=name, _original=original, **kwargs):
            events.append(f"{_name} {Path(args[0]).name}")
            return _original(*args, **kwargs)

        monkeypatch.setattr(module, name, noted)
    work = writer(tmp_path)
    work.before_publishing = lambda: events.append("metrics")
    work.save(4, engine, new_state())
    work.wait()
    assert events == ["sync_tree .step-4.tmp", "metrics", "publish_directory .step-4.tmp", "write_atomic latest"]


def test_steps_beyond_the_newest_and_old_ones_go():
    assert steps_to_remove([3, 6, 9, 12], 12, 2) == [3, 6]
    assert steps_to_remove([3, 6, 9, 12], 6, 2) == [9, 12], "the run went back to 3 and came to 6 again"
    assert steps_to_remove([3], 3, 0) == []


def test_copies_keep_what_torch_save_sees():
    tied = torch.arange(6.0).view(2, 3)
    value = {"a": tied, "b": [tied, (torch.Size([2]), {"x": tied.t()})], "empty": torch.empty(0), "n": 3}
    copies = HostCopies()
    copies.begin()
    new = copies.tree(value)
    assert new["a"] is new["b"][0] and new["a"].data_ptr() != tied.data_ptr()
    assert new["b"][1][0] == torch.Size([2]) and torch.equal(new["b"][1][1]["x"], tied.t()) and new["n"] == 3
    tied += 1
    assert torch.equal(new["a"], torch.arange(6.0).view(2, 3))
    pointer = new["a"].data_ptr()
    copies.end()
    copies.begin()
    assert copies.tree({"a": tied})["a"].data_ptr() == pointer, "the memory is used again"


def test_torch_save_is_itself_again_after_a_snapshot(tmp_path):
    original = torch.save
    with pytest.raises(ValueError), diverted(HostCopies()) as held:
        torch.save({"x": 1}, tmp_path / "held")
        raise ValueError
    assert torch.save is original and [item.path.name for item in held] == ["held"]
    assert not (tmp_path / "held").exists()
