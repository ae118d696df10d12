"""`train-tokenizer --data`: whole output directories, resume, bad records, several processes; tiny sizes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from ernie_elastic.cli import main
from ernie_elastic.data.sources.open import open_source
from ernie_elastic.errors import CheckpointError, ConfigError, DataError
from ernie_elastic.modeling.refiner import RefinerConfig
from ernie_elastic.stages import read_manifest
from ernie_elastic.tokenizer_training import train_on_data as train_on_data_module
from ernie_elastic.tokenizer_training.audio.recipe import AudioRecipe, AudioRun
from ernie_elastic.tokenizer_training.audio.seanet import SeanetTrainingConfig
from ernie_elastic.tokenizer_training.refiner.recipe import RefinerRecipe, RefinerRun
from ernie_elastic.tokenizer_training.refiner.train import RefinerTrainingConfig
from ernie_elastic.tokenizer_training.train_on_data import train_on_data
from ernie_elastic.tokenizer_training.visual import recipe as recipe_visual
from ernie_elastic.tokenizer_training.visual.conv import ConvVisualTrainee, ConvVisualTrainingConfig
from ernie_elastic.tokenizer_training.visual.recipe import VisualModel, VisualRecipe, VisualRun
from ernie_elastic.tokenizers.audio.base import AudioTokenizer
from ernie_elastic.tokenizers.audio.seanet import SeanetAudioTokenizerConfig
from ernie_elastic.tokenizers.visual.base import VisualTokenizer
from tests.support import ROOT

MODEL = VisualModel(
    image_size=32, stride=8, num_bits=8, bit_series=(4, 8), width=8, num_scales=3, aspect_ratios=((3, 4),)
)
VISUAL = VisualRun(
    data="world", model=MODEL, training=ConvVisualTrainingConfig(steps=8, batch_size=4), health_items=3,
    checkpoint_every=3,
)  # fmt: skip
AUDIO = AudioRun(
    data="world",
    model=SeanetAudioTokenizerConfig(
        sample_rate=16000, strides=(8, 5, 4, 4, 2), width=4, max_width=16, latent_width=8, num_levels=2, codebook_size=8
    ),
    training=SeanetTrainingConfig(steps=6, batch_size=4, crop_seconds=0.48, quantiser_dropout=0.0), health_items=3,
    checkpoint_every=2,
)  # fmt: skip
AUDIO_FLAGS = [
    "--model.sample-rate", "16000", "--model.strides", "8", "5", "4", "4", "2", "--model.width", "4",
    "--model.max-width", "16", "--model.latent-width", "8", "--model.num-levels", "2", "--model.codebook-size", "8",
    "--training.steps", "6", "--training.batch-size", "4", "--training.crop-seconds", "0.48", "--health-items", "3",
    "--checkpoint-every", "2", "--training.quantiser-dropout", "0",
]  # fmt: skip


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of 40 pictures of several sizes, and of files that are none."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(40):
        small = rng.integers(0, 256, (6, 5 + number % 4, 3), dtype=np.uint8)
        Image.fromarray(small).resize((50 + number, 40)).save(folder / f"{number:02d}.png")
    (folder / "cut.png").write_bytes((folder / "00.png").read_bytes()[:100])
    (folder / "empty.jpg").write_bytes(b"")
    return folder


def visual(data: str, **changes: Any) -> VisualRun:
    return dataclasses.replace(VISUAL, data=data, **changes)


def test_a_visual_directory_is_whole(tmp_path: Path, pictures: Path) -> None:
    run = visual(str(pictures), max_reject_share=0.5, held_out_share=0.3)
    health = train_on_data(VisualRecipe(run), run, tmp_path / "out")
    manifest = read_manifest(tmp_path / "out", ("train-tokenizer-visual",), verify=True)
    assert manifest.extra["health"] == health == json.loads((tmp_path / "out" / "health.json").read_text())
    assert set(manifest.files) == {
        "config.json", "tokenizer.safetensors", "health.json", "metrics.jsonl", "rejects.txt", "report.html",
        "samples.png",
    }  # fmt: skip
    tokenizer = VisualTokenizer.load(tmp_path / "out")
    assert tokenizer.architecture == "conv" and tokenizer.config.sizes[0] == (32, 32)
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 8
    rejects = (tmp_path / "out" / "rejects.txt").read_text().splitlines()
    assert len(rejects) == health["rejected_records"] and all(
        "cut.png" in line or "empty.jpg" in line for line in rejects
    )
    assert health["train_records"] + health["held_out_records"] == 42
    page = (tmp_path / "out" / "report.html").read_text()
    assert "data:image/png;base64" in page and "psnr db" in page
    assert not (tmp_path / ".out.training").exists()


def test_a_stopped_training_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_on_data(VisualRecipe(VISUAL), VISUAL, tmp_path / "whole")
    step = ConvVisualTrainee.step

    def dies(self: ConvVisualTrainee, batch: torch.Tensor, number: int) -> dict[str, float]:
        if number == 7:
            raise KeyboardInterrupt
        return step(self, batch, number)

    monkeypatch.setattr(ConvVisualTrainee, "step", dies)
    with pytest.raises(KeyboardInterrupt):
        train_on_data(VisualRecipe(VISUAL), VISUAL, tmp_path / "out")
    assert not (tmp_path / "out").exists() and (tmp_path / ".out.training").exists()
    monkeypatch.setattr(ConvVisualTrainee, "step", step)
    with pytest.raises(ConfigError, match=r"training.steps: 8 there, 9 now"):
        changed = dataclasses.replace(VISUAL, training=dataclasses.replace(VISUAL.training, steps=9))
        train_on_data(VisualRecipe(changed), changed, tmp_path / "out")
    train_on_data(VisualRecipe(VISUAL), VISUAL, tmp_path / "out")
    first, second = (tmp_path / name / "tokenizer.safetensors" for name in ("whole", "out"))
    assert first.read_bytes() == second.read_bytes()


def test_an_audio_directory_is_whole_and_can_be_listened_to(tmp_path: Path) -> None:
    health = train_on_data(AudioRecipe(AUDIO), AUDIO, tmp_path / "out")
    tokenizer = AudioTokenizer.load(tmp_path / "out")
    assert tokenizer.architecture == "seanet" and len(health["levels"]) == 2
    original, rate = soundfile.read(tmp_path / "out" / "sample-0-original.wav", dtype="float32")
    decoded, _ = soundfile.read(tmp_path / "out" / "sample-0-decoded.wav", dtype="float32")
    expected = np.asarray(tokenizer.decode(tokenizer.encode(original)))[: len(original)]
    assert rate == 16000 and len(decoded) == len(original) and np.abs(expected - decoded).max() < 0.05
    assert (tmp_path / "out" / "report.html").read_text().count("<audio") == 6


def test_what_stands_there_is_kept(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match=r"out exists already; pass --overwrite"):
        train_on_data(AudioRecipe(AUDIO), AUDIO, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_data_that_cannot_be_used_is_refused(tmp_path: Path, pictures: Path) -> None:
    for number in range(8):
        (pictures / f"text-{number}.png").write_text("no picture")
    run = visual(str(pictures), held_out_share=0.3)
    with pytest.raises(DataError, match=r"records cannot be read, more than the limit of 1%"):
        train_on_data(VisualRecipe(run), run, tmp_path / "out")
    few = visual(str(pictures), held_out_share=1e-9)
    with pytest.raises(DataError, match=r"none is held out at a share of 1e-09; raise --held-out-share"):
        train_on_data(VisualRecipe(few), few, tmp_path / "out2")
    wrong = dataclasses.replace(AUDIO, model=dataclasses.replace(AUDIO.model, sample_rate=24000))
    with pytest.raises(ConfigError, match=r"embedded world has 16000 Hz and the tokenizer 24000"):
        train_on_data(AudioRecipe(wrong), wrong, tmp_path / "out3")


def test_a_2d_tokenizer_is_inflated_and_trained_on_clips(tmp_path: Path) -> None:
    train_on_data(VisualRecipe(VISUAL), VISUAL, tmp_path / "flat")
    clips = dataclasses.replace(
        VISUAL, model=dataclasses.replace(MODEL, temporal_stride=2), init=tmp_path / "flat", clip_frames=5
    )
    train_on_data(VisualRecipe(clips), clips, tmp_path / "deep")
    tokenizer = VisualTokenizer.load(tmp_path / "deep")
    clip = np.zeros((5, 32, 32, 3), np.uint8)
    assert tokenizer.encode_video(clip).shape == (3, 4, 4, 8)
    assert not tokenizer.frames_alone and tokenizer.decode_video(tokenizer.encode_video(clip)).shape == clip.shape
    with pytest.raises(ConfigError, match=r"clip_frames 4 must be 1 \+ a multiple of the temporal stride 2"):
        dataclasses.replace(clips, clip_frames=4)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train-tokenizer", "audio", "--data", "world", "--out", str(tmp_path / "out"), *AUDIO_FLAGS]) == 0
    assert "report.html" in capsys.readouterr().out
    assert AudioTokenizer.load(tmp_path / "out").num_levels == 2
    assert main(["train-tokenizer", "speech", "--data", "world", "--out", str(tmp_path / "x")]) == 2
    assert "'speech' is not one of text, visual, audio, refiner" in capsys.readouterr().err
    assert main(["train-tokenizer", "refiner", "--out", str(tmp_path / "x")]) == 2
    assert "refiner needs --data" in capsys.readouterr().err


@pytest.mark.distributed
def test_two_processes_train_one_tokenizer(tmp_path: Path) -> None:
    launcher = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d",
        "--rdzv_endpoint=localhost:0", "-m", "ernie_elastic.cli",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*launcher, "train-tokenizer", "audio", "--data", "world", "--out", str(tmp_path / "two"), *AUDIO_FLAGS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("wrote") == 1
    train_on_data(AudioRecipe(AUDIO), AUDIO, tmp_path / "one")
    two, one = (AudioTokenizer.load(tmp_path / name).state_dict() for name in ("two", "one"))
    worst = max(float((two[name].float() - one[name].float()).abs().max()) for name in one)
    assert worst < 1e-3


def test_every_size_is_measured_on_several_records(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With as many held-out records as sizes, a size must not always meet the same record."""
    seen: list[tuple[tuple[int, ...], bytes]] = []

    def health(tokenizer: Any, pieces: list[np.ndarray], teacher: Any) -> dict[str, Any]:
        seen.extend((piece.shape, piece.tobytes()) for piece in pieces)
        return {"collapse": []}

    monkeypatch.setattr(recipe_visual, "conv_visual_health", health)
    for path in list(pictures.iterdir()):
        path.unlink()
    for grey in (0, 80, 160, 240):
        Image.fromarray(np.full((40, 50, 3), grey, np.uint8)).save(pictures / f"{grey}.png")
    share = next(s / 100 for s in range(1, 100) if len(open_source(pictures, ("image",)).split(s / 100, True)) == 2)
    run = visual(str(pictures), held_out_share=share, health_items=8)
    train_on_data(VisualRecipe(run), run, tmp_path / "out")
    for size in {shape for shape, _ in seen}:
        assert len({data for shape, data in seen if shape == size}) == 2


def test_held_out_records_that_cannot_be_read_are_found_before_the_training(tmp_path: Path, pictures: Path) -> None:
    for name in ("cut.png", "empty.jpg"):
        (pictures / name).unlink()
    source = open_source(pictures, ("image",)).split(0.2, True)
    names = [source.key(index) for index in range(len(source))]
    (pictures / names[0]).write_text("no picture")
    run = visual(str(pictures), held_out_share=0.2)
    train_on_data(VisualRecipe(run), run, tmp_path / "out")
    rejects = (tmp_path / "out" / "rejects.txt").read_text().splitlines()
    assert len(rejects) == 1 and rejects[0].startswith(names[0])
    for name in names:
        (pictures / name).write_text("no picture")
    for share, message in (
        (0.01, f"2 of {len(names)} held-out records cannot be read"),
        (1.0, "no held-out record of"),
    ):
        run = visual(str(pictures), held_out_share=0.2, max_reject_share=share)
        with pytest.raises(DataError, match=message):
            train_on_data(VisualRecipe(run), run, tmp_path / "out2")
        assert not (tmp_path / ".out2.training").exists()


def test_other_records_under_the_same_name_are_refused(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = visual(str(pictures), held_out_share=0.3, max_reject_share=0.5)
    with monkeypatch.context() as patch:
        patch.setattr(VisualRecipe, "finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train_on_data(VisualRecipe(run), run, tmp_path / "out")
    assert (tmp_path / ".out.training" / "state.pt").exists() and not (tmp_path / "out").exists()
    for number in range(5):
        Image.new("RGB", (40, 40)).save(pictures / f"more-{number}.png")
    with pytest.raises(ConfigError, match=r"other settings \(records\.\w+: \d+ there, \d+ now\)"):
        train_on_data(VisualRecipe(run), run, tmp_path / "out")


def test_no_rank_waits_for_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    joined = []

    @contextlib.contextmanager
    def watched() -> Iterator[None]:
        joined.append(True)
        yield
        joined.pop()

    monkeypatch.setattr(train_on_data_module, "group", watched)
    finish = VisualRecipe.finish

    def alone(*args: Any) -> Any:
        assert not joined, "the other ranks wait for the report, and give up on a long one"
        return finish(*args)

    monkeypatch.setattr(VisualRecipe, "finish", alone)
    train_on_data(VisualRecipe(VISUAL), VISUAL, tmp_path / "out")


def test_settings_that_cannot_be_are_config_errors() -> None:
    with pytest.raises(ConfigError, match="seed -1 must be 0 or more"):
        dataclasses.replace(VISUAL, seed=-1)
    for gain in ((1.0, 0.5), (0.0, 1.0), (1.0, float("inf"))):
        with pytest.raises(ConfigError, match="gain"):
            dataclasses.replace(AUDIO, gain=gain)
    with pytest.raises(ConfigError, match=r"smallest_crop -1.0 must lie in \(0, 1\]"):
        RefinerRun(data="world", smallest_crop=-1.0)


def test_a_refiner_is_called_one_and_no_collapse_is_claimed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RefinerRun(
        data="world", model=RefinerConfig(width=4, blocks=1), health_size=32, health_items=2,
        training=RefinerTrainingConfig(steps=2, batch_size=2, crop=32),
    )  # fmt: skip
    health = train_on_data(RefinerRecipe(run), run, tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<h1>Refiner: world</h1>" in page and "of collapse" not in page and "collapse" not in health
    assert "refiner: wrote" in capsys.readouterr().out
    train_on_data(AudioRecipe(AUDIO), AUDIO, tmp_path / "codec")
    assert "of collapse" in (tmp_path / "codec" / "report.html").read_text()
