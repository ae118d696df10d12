"""Every documented command, run in order at smoke size in one folder, and what must be true of its outputs."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from safetensors import SafetensorError
from transformers import MimiConfig, MimiModel

from ernie_elastic import cli
from ernie_elastic.data.world.scenes import WorldConfig, world_sample
from ernie_elastic.presets import DEMO_WORLD
from ernie_elastic.stages import read_manifest, sha256_file
from tests.scripts.test_demo_seeds import made_up_summary
from tests.support import ROOT
from tests.support.commands import EXECUTED, program_and_arguments
from tests.support.pretrain_runs import kill_all
from tests.support.warm_ranks import torchrun

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]


def run_line(line: str, folder: Path) -> str:
    """Run one line of EXECUTED in `folder`: our own commands in this process, launchers in processes that are warm
    (tests/distributed/test_kill_rank.py types a launcher's line), other scripts in interpreters of their own; what it
    printed."""
    words = tuple(shlex.split(line))
    started, arguments = program_and_arguments(words)
    if words[0] in ("ernie-elastic", "extract_submodel"):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            short = words[0] == "extract_submodel"
            assert (cli.run(words[0], "extract", arguments) if short else cli.main(list(words[1:]))) == 0, line
        return printed.getvalue()
    if words[0] == "torchrun":
        log = folder / "printed.log"
        log.unlink(missing_ok=True)
        ranks = int(next(word for word in words if word.startswith("--nproc_per_node=")).split("=")[1])
        agent = torchrun(ranks, Path(started[0]), *arguments, log=log)
        try:
            assert agent.wait(240) == 0, f"{line}\n{log.read_text()[-5000:]}"
        finally:
            kill_all([agent])
        return log.read_text()
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *started, *arguments]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def tiny_mimi() -> MimiModel:
    """A Mimi of random weights that runs in milliseconds."""
    torch.manual_seed(0)
    return MimiModel(
        MimiConfig(
            sampling_rate=2400, hidden_size=16, num_filters=4, upsampling_ratios=[6, 4], codebook_size=16,
            codebook_dim=8, num_quantizers=4, vector_quantization_hidden_dimension=8, num_hidden_layers=1,
            intermediate_size=16, num_attention_heads=2, num_key_value_heads=2, sliding_window=8, upsample_groups=16,
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder in which every line of EXECUTED has been run."""
    folder = tmp_path_factory.mktemp("pipeline")
    (folder / "scripts").symlink_to(ROOT / "scripts")
    before = Path.cwd()
    os.chdir(folder)
    try:
        clip = next(
            s for s in world_sample("video_to_text", 0, 0, "train", DEMO_WORLD).segments if s.kind == "video"
        ).array
        Image.fromarray(np.concatenate(list(clip), axis=1)).save("strip.png")
        phrase = next(s for s in world_sample("audio_to_text", 0, 0).segments if s.kind == "audio").array
        soundfile.write("phrase.wav", phrase, WorldConfig().sample_rate)
        for number, name in enumerate(("demo", "demo-1", "demo-2")):
            (folder / "runs" / name).mkdir(parents=True)
            (folder / "runs" / name / "summary.json").write_text(json.dumps(made_up_summary(0.1 * number)))
        tiny_mimi().save_pretrained(folder / "mimi")
        printed = {line: run_line(line, folder) for line in EXECUTED}
        (folder / "printed.json").write_text(json.dumps(printed))
    finally:
        os.chdir(before)
    return folder


def test_every_stage_left_a_manifest(folder):
    stages = {
        "tokenizers/text": "train-tokenizer-text", "tokenizers/visual": "train-tokenizer-visual",
        "tokenizers/audio": "train-tokenizer-audio", "packed": "prepare-data",
        "runs/debug/checkpoints/step-16/model": "pretrain", "submodel": "extract", "compressed": "compress",
        "evaluation": "evaluate", "report": "routing", "neural/text": "train-tokenizer-text",
        "neural/visual": "train-tokenizer-visual", "neural/audio": "train-tokenizer-audio",
        "refiner": "train-tokenizer-refiner", "codec": "train-tokenizer-audio",
    }  # fmt: skip
    for name, stage in stages.items():
        manifest = json.loads((folder / name / "manifest.json").read_text())
        assert manifest["stage"] == stage and len(manifest["fingerprint"]) == 16
    parent = json.loads((folder / "compressed" / "manifest.json").read_text())["parent"]
    assert parent["path"] == "submodel" and parent["sha256"]


def test_metrics_hold_what_they_promise(folder):
    records = [json.loads(line) for line in (folder / "runs/debug/metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(16)), "the second command went on where the first ended"
    for record in records:
        assert set(record["losses"]) <= {"text", "image", "video", "audio"} and record["tokens_per_s"] > 0
        assert len(record["load_max_over_mean"]) == 8 and record["spec"]["num_layers"] <= 8
    assert all(any(name in record["losses"] for record in records) for name in ("text", "image", "video", "audio"))
    assert records[-1]["losses"]["text"] < records[0]["losses"]["text"]


def test_a_resumed_run_continues_bit_for_bit(folder):
    def losses(name):
        lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
        return [(record["losses"], record["grad_norm"]) for record in map(json.loads, lines)]

    assert losses("debug") == losses("whole"), "10 steps, a stop and 6 more are the same as 16 in one go"
    weights = [folder / "runs" / name / "checkpoints/step-16/model/model.safetensors" for name in ("debug", "whole")]
    assert sha256_file(weights[0]) == sha256_file(weights[1])


def test_weights_are_bf16_and_nothing_that_is_read_is_a_pickle(folder):
    from safetensors.torch import load_file

    model = folder / "runs/debug/checkpoints/step-16/model"
    dtypes = {name: tensor.dtype for name, tensor in load_file(model / "model.safetensors").items()}
    assert {dtype for name, dtype in dtypes.items() if "correction_bias" not in name} == {torch.bfloat16}
    assert {dtype for name, dtype in dtypes.items() if "correction_bias" in name} == {torch.float32}
    for name in ("submodel", "compressed", str(model.relative_to(folder))):
        assert not [p for p in (folder / name).rglob("*") if p.suffix in (".pt", ".bin", ".pkl", ".pickle")]


def test_storage_is_smaller_than_serving(folder):
    sizes = {name: read_manifest(folder / name).extra["model_bytes"] for name in ("stored", "compressed")}
    print(sizes)
    assert sizes["stored"] < sizes["compressed"]


def test_commands_say_what_they_wrote_and_where(folder):
    printed = json.loads((folder / "printed.json").read_text())
    writing = {line: shlex.split(line) for line in printed if line.startswith(("ernie-elastic", "extract_submodel"))}
    writing = {line: words[words.index("--out") + 1] for line, words in writing.items() if "--out" in words}
    silent = [line for line, out in writing.items() if not re.search(rf"(^|\s){re.escape(out)}\b", printed[line])]
    assert len(writing) > 15 and not silent
    sizes = {"picture.png": "48x48 pixels", "sound.wav": "s of sound at 16000 Hz", "report": "figures"}
    sizes |= {"submodel": "bytes of weights as bfloat16", "evaluation": "results.json"}
    for out, size in sizes.items():
        (said,) = [printed[line] for line, name in writing.items() if name == out]
        assert re.search(rf"wrote {re.escape(out)}\b.*{size}", said), said
    budget = next(said for line, said in printed.items() if "--budget" in line)
    assert "wrote submodel-fitting/pareto.json: the " in budget


def test_decompressed_files_are_identical(folder):
    source, restored = folder / "submodel", folder / "restored"
    names = sorted(str(p.relative_to(source)) for p in source.rglob("*") if p.is_file())
    assert names == sorted(str(p.relative_to(restored)) for p in restored.rglob("*") if p.is_file())
    assert all(sha256_file(source / name) == sha256_file(restored / name) for name in names)


def test_generated_files_are_what_they_say(folder):
    assert Image.open(folder / "picture.png").size == (48, 48)
    assert Image.open(folder / "video.gif").n_frames >= 1
    wave, rate = soundfile.read(folder / "sound.wav")
    assert rate == 16000 and len(wave) % 1280 == 0
    results = json.loads((folder / "evaluation/results.json").read_text())
    assert len(results["accuracy"]) == 7 and all(cell["n"] == 4 for cell in results["accuracy"].values())
    assert (folder / "report/index.html").stat().st_size > 10_000


def test_routing_statistics_cover_every_layer(folder):
    statistics = json.loads((folder / "report/statistics.json").read_text())
    assert statistics
    with np.load(folder / "report/trace.npz") as trace:
        assert trace["expert_ids"].shape[1:] == (6, 1) and int(trace["expert_ids"].max()) < 4


SPECS = [  # odd expert counts; the widths of the debug preset are no multiples of 64
    ["--experts", "3", "--topk", "1"],
    ["--experts", "7", "--depth", "5"],
    ["--experts", "5", "--topk", "1", "--depth", "4"],
]


@torch.inference_mode()
@pytest.mark.parametrize("flags", SPECS, ids=lambda flags: "".join(flags).replace("--", "-"))
def test_compressed_gives_the_bits_of_its_source(folder, flags, tmp_path):
    from ernie_elastic.compression import PackedEmbedding, PackedLinear
    from ernie_elastic.generation.loading import load_model
    from ernie_elastic.pipeline.demo.run import logits_bit_equal

    cut, small = tmp_path / "cut", tmp_path / "small"
    assert cli.run("extract_submodel", "extract", [str(folder / "runs/debug"), *flags, "--out", str(cut)]) == 0
    assert cli.main(["compress", str(cut), "--out", str(small)]) == 0
    assert logits_bit_equal(cut, small, folder / "runs/debug/packed")
    model = load_model(small)
    kinds = [type(module) for module in model.modules()]
    assert PackedLinear in kinds and PackedEmbedding in kinds
    dense = [n for n, p in model.named_parameters() if p.dim() == 3]
    assert dense == [], "experts stay packed in memory"


def error_line(capsys, *arguments: str, program: str = "ernie-elastic") -> str:
    capsys.readouterr()
    code = cli.main(list(arguments)) if program == "ernie-elastic" else cli.run(program, "extract", list(arguments))
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert code == 2, captured
    assert len(lines) == 1 and lines[0].startswith(program), captured.err
    return lines[0]


def test_the_tokenizers_that_commands_made_are_whole(folder):
    from ernie_elastic.tokenizers.audio.base import AudioTokenizer
    from ernie_elastic.tokenizers.visual.base import VisualTokenizer

    for name in ("neural/text", "neural/visual", "neural/audio", "neural/audio-2", "refiner"):
        health = json.loads((folder / name / "health.json").read_text())
        assert health and "<h2>Health</h2>" in (folder / name / "report.html").read_text()
        assert not (folder / name).with_name(f".{Path(name).name}.training").exists()
    assert VisualTokenizer.load(folder / "neural/visual").architecture == "conv"
    codec = AudioTokenizer.load(folder / "codec")
    assert codec.architecture == "mimi" and codec.num_levels == 2
    assert np.asarray(Image.open(folder / "large.png")).shape == (96, 96, 3)  # 48 pixels, twice as large


def test_wrong_input_is_one_line_and_leaves_nothing(folder, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    out = tmp_path / "out"
    cut = lambda *flags: error_line(capsys, *flags, "--out", str(out), program="extract_submodel")
    assert "--depth 0 must lie in 1..8" in cut("runs/debug", "--depth", "0")
    assert "--depth 9 must lie in 1..8" in cut("runs/debug", "--depth", "9")
    assert "--experts 1 is less than --topk 2" in cut("runs/debug", "--experts", "1")
    assert "--experts 99 must lie in 1..8" in cut("runs/debug", "--experts", "99")
    assert "--topk 3 must lie in 1..2" in cut("runs/debug", "--topk", "3")
    assert "invalid literal for int" in cut("runs/debug", "--depth", "six")
    assert "--no-such-flag" in cut("runs/debug", "--no-such-flag", "3")
    assert "nowhere is not a directory" in cut("nowhere")
    assert "is compressed" in cut("compressed") and "decompress" in cut("compressed")
    assert "holds no config.json" in cut("packed")
    assert "the smallest sub-model takes" in cut("runs/debug", "--budget", "10")
    assert "'no-command' is not a command" in error_line(capsys, "no-command")
    assert "decompress" in error_line(capsys, "compress", "compressed", "--out", str(out))
    assert "exists already" in error_line(capsys, "compress", "submodel", "--out", "compressed")
    assert "give --prompt" in error_line(capsys, "generate", "submodel")
    assert "needs --out" in error_line(capsys, "generate", "submodel", "--prompt", "x", "--to", "image")
    assert "cannot be read" in error_line(capsys, "generate", "submodel", "--image", "phrase.wav")
    drawn = ("generate", "submodel", "--prompt", "x", "--refine", "neural/visual")
    assert "leave it out" in error_line(capsys, *drawn)
    assert "is no refiner's" in error_line(capsys, *drawn, "--to", "image", "--out", str(tmp_path / "x.png"))
    assert "no audio heads" in error_line(
        capsys, "generate", "submodel-silent", "--prompt", "x", "--to", "audio", "--out", str(tmp_path / "x.wav")
    )
    assert "routing" in error_line(capsys, "routing", "submodel", "--data", "tokenizers/text", "--out", str(out))
    assert list(tmp_path.iterdir()) == [], "nothing half-written is left"


def test_damaged_directories_are_refused(folder, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, file, damage in (
        ("compressed", "model.safetensors", lambda data: data[: len(data) // 2]),
        ("compressed", "model.safetensors", lambda data: data[:-200] + bytes([data[-200] ^ 1]) + data[-199:]),
        ("submodel", "config.json", lambda data: data[:40]),
    ):
        shutil.rmtree("copy", ignore_errors=True)
        shutil.copytree(folder / name, "copy")
        weights = next(Path("copy").glob(file if file != "model.safetensors" else "*.safetensors"))
        if name == "compressed":
            weights = max(Path("copy").glob("*.safetensors"), key=lambda p: p.stat().st_size)
        weights.write_bytes(damage(weights.read_bytes()))
        line = error_line(capsys, "generate", "copy", "--prompt", "x")
        assert "copy" in line, line


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        # What safetensors makes of it on a file system that is really full.
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["os", "safetensors"],
)
def test_a_full_disk_is_said_and_leaves_nothing(folder, capsys, tmp_path, monkeypatch, error):
    from safetensors import torch as safetensors_torch

    def full(*arguments, **options):
        raise error

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    monkeypatch.setattr(safetensors_torch, "save_file", full)
    out = tmp_path / "out"
    line = error_line(capsys, str(folder / "submodel"), "--out", str(out), program="extract_submodel")
    assert "disk full while writing" in line and "free there" in line
    assert list(tmp_path.iterdir()) == []
