"""The tokenizers' training loop: resume to the bit, records that cannot be read, settings that changed, crops."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ernie_elastic.data.packed.order import shuffled_index
from ernie_elastic.errors import CheckpointError, ConfigError, DataError
from ernie_elastic.schema import Sample, Segment
from ernie_elastic.tokenizer_training import loop as tokenizer_loop
from ernie_elastic.tokenizer_training import media_batches
from ernie_elastic.tokenizer_training.loop import LoopConfig, WorkDirectory, run_loop, step_generator
from ernie_elastic.tokenizer_training.media_batches import MediaBatches, MediaReader, picture_crop, wave_crop
from tests.support import ROOT


class Regression:
    """A trainee of two numbers, with an optimizer that has a state and noise of its own."""

    def __init__(self) -> None:
        self.weight = torch.nn.Parameter(torch.zeros(2))
        self.optimizer = torch.optim.Adam([self.weight], lr=0.1)
        self.seen: list[int] = []

    def step(self, batch: torch.Tensor, step: int) -> dict[str, float]:
        if step == getattr(self, "dies_at", None):
            raise KeyboardInterrupt
        self.seen.append(step)
        noise = torch.randn(2, generator=step_generator(3, step))
        loss = (self.weight - batch.float().mean() / 100 - 0.1 * noise).square().sum()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"loss": float(loss.detach())}

    def state_dict(self) -> dict[str, Any]:
        return {"weight": self.weight.detach().clone(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weight.data.copy_(state["weight"])
        self.optimizer.load_state_dict(state["optimizer"])


class Pictures:
    """Records of flat pictures of increasing brightness; some cannot be read."""

    def __init__(self, count: int, broken: tuple[int, ...] = ()) -> None:
        self.count, self.broken, self.read = count, broken, 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        if index in self.broken:
            raise DataError(f"picture-{index}.png cannot be read: it is empty")
        self.read += 1
        array = np.full((12, 10, 3), index, np.uint8)
        return Sample(f"picture-{index}", "image", (Segment("image", "target", array=array),))


def batches(records: Pictures, size: int = 4) -> MediaBatches:
    crop = picture_crop(lambda step: (8, 8), lambda step: 1, 0.5, True)
    return MediaBatches(MediaReader(records, ("image",), "the pictures"), crop, size, 0)


def lines(work: WorkDirectory) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (work.path / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "step_s"} for line in found]


def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = LoopConfig(steps=11, checkpoint_every=4)
    whole, whole_work = Regression(), WorkDirectory(tmp_path / "whole", {"a": 1})
    run_loop(whole, batches(Pictures(9)), config, whole_work, "test")
    stopped = Regression()
    stopped.dies_at = 6  # type: ignore[attr-defined]
    with pytest.raises(KeyboardInterrupt):
        run_loop(stopped, batches(Pictures(9)), config, WorkDirectory(tmp_path / "out", {"a": 1}), "test")
    resumed, work = Regression(), WorkDirectory(tmp_path / "out", {"a": 1})
    report = run_loop(resumed, batches(Pictures(9)), config, work, "test")
    assert resumed.seen == list(range(4, 11)) and report.first_step == 4
    assert torch.equal(resumed.weight, whole.weight)
    assert lines(work) == lines(whole_work) and [line["step"] for line in lines(work)] == list(range(11))
    assert "goes on from step 4 of 11" in capsys.readouterr().out
    work.remove()
    assert [path.name for path in tmp_path.iterdir()] == [".whole.training"]


def test_worker_processes_change_nothing(tmp_path: Path) -> None:
    found = []
    for workers in (0, 2):
        trainee = Regression()
        work = WorkDirectory(tmp_path / f"out{workers}", {})
        report = run_loop(trainee, batches(Pictures(9, (2,))), LoopConfig(5, num_workers=workers, max_reject_share=1.0),
                          work, "test")  # fmt: skip
        found.append((trainee.weight.tolist(), lines(work), report.rejects))
    assert found[0] == found[1] and found[0][2] == ["picture-2.png cannot be read: it is empty"]


def test_other_settings_are_not_mixed_in(tmp_path: Path) -> None:
    run_loop(Regression(), batches(Pictures(5)), LoopConfig(2), WorkDirectory(tmp_path / "out", {"lr": 1.0}), "test")
    with pytest.raises(ConfigError, match=r"other settings \(lr: 1.0 there, 2.0 now\); .*--overwrite"):
        WorkDirectory(tmp_path / "out", {"lr": 2.0})
    anew = WorkDirectory(tmp_path / "out", {"lr": 2.0}, overwrite=True)
    assert anew.restore(Regression()) == (0, [])


def test_a_damaged_state_is_not_read(tmp_path: Path) -> None:
    work = WorkDirectory(tmp_path / "out", {})
    run_loop(Regression(), batches(Pictures(5)), LoopConfig(2), work, "test")
    state = work.path / "state.pt"
    data = bytearray(state.read_bytes())
    data[len(data) // 2] ^= 1
    state.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"state.pt is damaged"):
        work.restore(Regression())


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_state(tmp_path: Path) -> None:
    class Explodes(Regression):
        def step(self, batch: torch.Tensor, step: int) -> dict[str, float]:
            return {"loss": float("nan") if step == 3 else 1.0, "commitment": 0.0}

    work = WorkDirectory(tmp_path / "out", {})
    with pytest.raises(ConfigError, match=r"loss is nan at step 3; lower the learning rate"):
        run_loop(Explodes(), batches(Pictures(5)), LoopConfig(9, checkpoint_every=2), work, "test")
    assert work.restore(Regression())[0] == 2


def test_bad_records_are_named_once_and_their_place_is_taken(tmp_path: Path) -> None:
    records = Pictures(10, (3, 7))
    work = WorkDirectory(tmp_path / "out", {})
    report = run_loop(Regression(), batches(records), LoopConfig(20, max_reject_share=0.5), work, "test")
    assert report.rejects == [f"picture-{index}.png cannot be read: it is empty" for index in (3, 7)]
    assert report.items == 80 and records.read == 8  # each readable picture was decoded once
    crops = [batches(records)(step).items for step in range(5)]
    assert all(crop.shape == (4, 1, 8, 8, 3) and crop.dtype == torch.uint8 for crop in crops)
    values = [int(value) for crop in crops for value in crop[:, 0, 0, 0, 0]]
    assert sorted(values[:10]) == sorted([0, 1, 2, 4, 4, 5, 6, 8, 8, 9])  # 3 and 7 are replaced by their neighbours


def test_too_many_bad_records_stop_the_run(tmp_path: Path) -> None:
    work = WorkDirectory(tmp_path / "out", {})
    with pytest.raises(DataError, match=r"2 of the first \d+ records cannot be read, more than the limit of 1%"):
        run_loop(Regression(), batches(Pictures(10, (3, 7))), LoopConfig(20), work, "test")
    with pytest.raises(DataError, match=r"no record of the pictures can be read; the first one: picture-"):
        batches(Pictures(2, (0, 1)))(0)
    with pytest.raises(DataError, match=r"the pictures has no image to train on"):
        batches(Pictures(0))


def test_two_ranks_read_what_one_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = batches(Pictures(9))(3).items
    parts = []
    for place in (0, 1):
        monkeypatch.setattr(media_batches, "rank", lambda place=place: place)
        monkeypatch.setattr(media_batches, "world_size", lambda: 2)
        parts.append(batches(Pictures(9))(3).items)
    assert torch.equal(torch.cat(parts), whole)
    with pytest.raises(ConfigError, match="batch_size 3 is no multiple of 2 processes"):
        batches(Pictures(9), 3)


def test_random_numbers_differ_by_step_and_rank_and_not_by_run() -> None:
    draws = {
        torch.rand(1, generator=step_generator(*key)).item() for key in [(0, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 0)]
    }
    assert len(draws) == 4
    again = torch.rand(1, generator=tokenizer_loop.step_generator(0, 0, 0)).item()
    assert again in draws


@pytest.mark.parametrize("shape", [(1, 1, 3), (5, 300, 3), (64, 48, 3), (3, 20, 30, 3)])
def test_crops_of_any_size_have_the_shape_of_the_step(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    media = rng.integers(0, 256, shape, dtype=np.uint8)
    crop = picture_crop(lambda step: (16, 24) if step else (16, 16), lambda step: 1 + 4 * step, 0.25, True)
    assert crop(media, rng, 0).shape == (1, 16, 16, 3) and crop(media, rng, 1).shape == (5, 16, 24, 3)


def test_a_crop_of_an_equal_size_is_the_picture_or_its_mirror() -> None:
    media = np.random.default_rng(1).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    crop = picture_crop(lambda step: (16, 16), lambda step: 1, 1.0, True)
    found = [crop(media, np.random.default_rng(seed), 0)[0] for seed in range(8)]
    mirrored = [np.array_equal(item, media[:, ::-1]) for item in found]
    assert all(np.array_equal(item, media) or mirror for item, mirror in zip(found, mirrored, strict=True))
    assert 0 < sum(mirrored) < 8


def test_frames_of_a_crop_follow_each_other() -> None:
    clip = np.arange(6, dtype=np.uint8)[:, None, None, None].repeat(8, 1).repeat(8, 2).repeat(3, 3)
    crop = picture_crop(lambda step: (8, 8), lambda step: 4, 1.0, False)
    for seed in range(5):
        frames = crop(clip, np.random.default_rng(seed), 0)[:, 0, 0, 0].tolist()
        assert frames == list(range(frames[0], frames[0] + 4))
    assert crop(clip[:2], np.random.default_rng(0), 0)[:, 0, 0, 0].tolist() == [0, 1, 1, 1]


def test_sounds_are_cut_or_filled_up() -> None:
    wave = np.arange(1, 101, dtype=np.float32) / 100
    crop = wave_crop(40, (1.0, 1.0))
    cut = crop(wave, np.random.default_rng(0), 0)
    assert np.allclose(np.diff(cut), 0.01, atol=1e-6) and cut.dtype == np.float32
    short = crop(wave[:5], np.random.default_rng(0), 0)
    assert np.array_equal(short[:5], wave[:5]) and not short[5:].any()


def test_a_removal_that_was_cut_short_leaves_nothing_to_go_on_from(tmp_path: Path) -> None:
    work = WorkDirectory(tmp_path / "out", {"lr": 1.0})
    run_loop(Regression(), batches(Pictures(5)), LoopConfig(2), work, "test")
    (work.path / "settings.json").unlink()  # what goes first; the kill came before the state went too
    trainee = Regression()
    run_loop(trainee, batches(Pictures(5)), LoopConfig(2), WorkDirectory(tmp_path / "out", {"lr": 2.0}), "test")
    assert trainee.seen == [0, 1]


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write .*Not a directory; choose another --out"):
        WorkDirectory(tmp_path / "file" / "out", {})


def test_the_limit_counts_all_records_not_those_read_so_far(tmp_path: Path) -> None:
    first = tuple(shuffled_index(0, 0, place, 20) for place in range(3))  # what the first step reads
    early, late = LoopConfig(5, max_reject_share=0.1), LoopConfig(5, max_reject_share=0.1, num_records=20)
    with pytest.raises(DataError, match=r"2 of the first 4 records"):
        run_loop(Regression(), batches(Pictures(20, first[:2])), early, WorkDirectory(tmp_path / "a", {}), "test")
    report = run_loop(Regression(), batches(Pictures(20, first[:2])), late, WorkDirectory(tmp_path / "b", {}), "test")
    assert len(report.rejects) == 2
    with pytest.raises(DataError, match=r"3 of 20 records cannot be read, more than the limit of 10%"):
        run_loop(Regression(), batches(Pictures(20, first)), late, WorkDirectory(tmp_path / "c", {}), "test")


def test_two_trainings_do_not_share_a_directory(tmp_path: Path) -> None:
    WorkDirectory(tmp_path / "out", {})  # freed with the object
    code = (
        f"from ernie_elastic.tokenizer_training.loop import WorkDirectory as W; w = W({str(tmp_path / 'out')!r}, {{}})"
    )
    wait = f"{code}; print('there', flush=True); input()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", wait], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "there\n"
        with pytest.raises(ConfigError, match="is in use by another training"):
            WorkDirectory(tmp_path / "out", {})
        other.kill()
    WorkDirectory(tmp_path / "out", {}).remove()
    assert not list(tmp_path.iterdir())


def test_denormal_numbers_count_as_zero_while_training_only(tmp_path: Path) -> None:
    seen: list[float] = []

    class Looks(Regression):
        def step(self, batch: torch.Tensor, step: int) -> dict[str, float]:
            seen.append(float(torch.tensor(2.0**-140) * 1.0))
            return super().step(batch, step)

    run_loop(Looks(), batches(Pictures(5)), LoopConfig(2), WorkDirectory(tmp_path / "out", {}), "test")
    assert seen == [0.0, 0.0] and float(torch.tensor(2.0**-140) * 1.0) > 0
