"""Seconds until a command begins its work, and of whole commands on a tiny model, beside bare imports.

A command is started as a user starts it, in a fresh process; `until_work.py` ends it where its work would begin, when a
model that it needs is loaded. Peers: Python that imports torch, or torch and Transformers' model code, and ends.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from bench.common import Row, interleave
from ernie_elastic.data.prepare.tokenise import Tokenizers
from ernie_elastic.elastic.extract import save_model
from ernie_elastic.elastic.importance import MASS_FILE
from ernie_elastic.modeling import ErnieElasticForCausalLM
from ernie_elastic.presets import DEMO_CODE, DEMO_MODEL
from ernie_elastic.tokenizers.audio.spectral import SpectralAudioTokenizer, SpectralAudioTokenizerConfig
from ernie_elastic.tokenizers.text.tokenizer import TextTokenizer
from ernie_elastic.tokenizers.visual.patch import PatchVisualTokenizer

PEERS = ("torch", "transformers")
IMPORTS = {"torch": "import torch", "transformers": "import torch, transformers.modeling_utils"}
ROOT = Path(__file__).resolve().parents[2]
UNTIL_WORK = Path(__file__).resolve().with_name("until_work.py")

# What does each command's work, and options that reach it in the folder that `make_inputs` filled.
WORK = {
    "compress": ("ernie_elastic.compression.directory:compress_directory", "model --out {out}"),
    "decompress": ("ernie_elastic.compression.restore:decompress_directory", "packed --out {out}"),
    "info": ("ernie_elastic.compression.restore:directory_info", "packed"),
    "extract": ("ernie_elastic.elastic.extract:extract_model", "model --experts 1 --topk 1 --out {out}"),
    "generate": ("ernie_elastic.generation.answer:answer", "model --prompt red --max-new-tokens 4"),
    "evaluate": ("ernie_elastic.evaluation.tasks:evaluate", "model --out {out}"),
    "routing": ("ernie_elastic.pipeline.routing:trace_packed", "model --data rows --out {out}"),
    "doctor": ("ernie_elastic.pipeline.doctor:doctor", ""),
}
WHOLE = ("compress", "decompress", "info", "extract", "generate", "doctor")


def make_inputs(folder: Path) -> Path:
    """Fill `folder` with model/, about 128 kB of BF16 weights with tokenizers, and packed/, the same compressed."""
    from ernie_elastic.compression.directory import compress_directory

    torch.manual_seed(0)
    words = "a red circle above a blue square in the centre of the picture"
    audio = SpectralAudioTokenizer(SpectralAudioTokenizerConfig(num_components=8))
    visual = PatchVisualTokenizer(dataclasses.replace(DEMO_CODE, width=8))
    tokenizers = Tokenizers(TextTokenizer.train([words] * 20, 330), visual, audio)
    sizes = dataclasses.replace(
        DEMO_MODEL,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        moe_intermediate_size=16,
        num_experts=2,
        understanding_width=16,
        audio_input="codes",
    )
    model = ErnieElasticForCausalLM(sizes.to_config(tokenizers))
    directory = folder / "model"
    save_model(model, directory)
    tokenizers.save(directory / "tokenizers")
    mass_LE = torch.ones(sizes.num_hidden_layers, sizes.num_experts, dtype=torch.float64)
    save_file({"mass_LE": mass_LE}, directory / MASS_FILE)
    compress_directory(directory, folder / "packed")
    return folder


def command(name: str, out: str, whole: bool = False) -> list[str]:
    """The words of a process that runs a command of WORK, whole or until its work begins, in a folder of inputs."""
    target, options = WORK[name]
    start = ["-m", "ernie_elastic.cli"] if whole else [str(UNTIL_WORK), target]
    return [sys.executable, *start, name, *options.format(out=out).split()]


def process(words: list[str], folder: Path) -> str:
    """Run a process in `folder` with this checkout's package; its standard output. RuntimeError when it fails."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(words, cwd=folder, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


def run(quick: bool) -> list[Row]:
    """A row for each command until its work begins, one for each whole command. quick: one round, none to warm up."""
    with tempfile.TemporaryDirectory() as name:
        folder = make_inputs(Path(name))
        cases = [(command_name, False) for command_name in WORK] + [(command_name, True) for command_name in WHOLE]

        def started(command_name: str, whole: bool) -> Callable[[int], str]:
            return lambda turn: process(command(command_name, f"out-{turn}", whole), folder)

        def imported(line: str) -> Callable[[int], str]:
            return lambda turn: process([sys.executable, "-c", line], folder)

        variants = {peer: imported(line) for peer, line in IMPORTS.items()}
        variants |= {label(*case): started(*case) for case in cases}
        seconds = interleave(variants, *((1, 0) if quick else (5, 1)))
    theirs = {peer: seconds[peer] for peer in PEERS}
    return [Row(label(*case), seconds[label(*case)], theirs, "s", higher_is_better=False) for case in cases]


def label(name: str, whole: bool) -> str:
    """The case of a row."""
    return f"{name}, whole" if whole else f"{name}, work begins"
