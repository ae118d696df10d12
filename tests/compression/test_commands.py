"""The commands that compress, from the command line to their last line: without torch, and saying what they made."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from tests.support import ROOT

HEAVY = {"torch", "transformers", "deepspeed", "datasets", "triton", "matplotlib", "wandb"}
LIST_MODULES = """
import json, runpy, sys
sys.argv[0] = "ernie-elastic"
try:
    runpy.run_module("ernie_elastic.cli", run_name="__main__")
except SystemExit as stop:
    assert not stop.code, stop.code
print("MODULES " + json.dumps(sorted(name for name in sys.modules if "." not in name)))
"""


def run_command(folder: Path, *arguments: str) -> tuple[list[str], list[str]]:
    """Lines on standard output of a command run in `folder`, and the top-level modules that it imported."""
    command = [sys.executable, "-c", LIST_MODULES, *arguments]
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    said, modules = done.stdout.rsplit("MODULES ", 1)
    return said.splitlines(), json.loads(modules)


def test_compressing_starts_without_torch_and_says_what_it_made(tmp_path: Path) -> None:
    words = np.random.default_rng(0).standard_normal((64, 65), dtype=np.float32).view(np.uint32) >> 16
    tensors = {"w": words, "norm": words[0], "noise": np.random.default_rng(1).integers(0, 65536, (32, 32))}
    header, at = {"half": {"dtype": "F16", "shape": [2], "data_offsets": [0, 4]}}, 4
    for name, values in tensors.items():
        header[name] = {"dtype": "BF16", "shape": list(values.shape), "data_offsets": [at, at + 2 * values.size]}
        at += 2 * values.size
    text = json.dumps(header).encode()
    data = b"".join(values.astype("<u2").tobytes() for values in tensors.values())
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    content = len(text).to_bytes(8, "little") + text + bytes(4) + data
    (tmp_path / "model" / "model.safetensors").write_bytes(content)

    said, modules = run_command(tmp_path, "compress", "model", "--out", "out")
    assert not set(modules) & HEAVY
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert said[0].startswith("out: 1 of 4 tensors compressed")
    assert f"{len(content):,} -> {size:,} bytes" in said[1] and size < len(content)
    assert said[2].startswith("compressed weights: 16 -> 1")
    assert said[3] == (
        "left as they are: 1 F16 (only BF16 is compressed), 1 BF16 (under 2 dimensions or 512 weights), "
        "1 BF16 (a stream would not be smaller)"
    )
    said, modules = run_command(tmp_path, "info", "out")
    assert not set(modules) & HEAVY
    assert said[-1].startswith("total: 4 tensors, 5,251 weights") and "1 compressed at 1" in said[-1]
    assert len(said) == 6 and any(line.startswith("noise") and " stored " in line for line in said)
    said, modules = run_command(tmp_path, "decompress", "out", "--out", "back")
    assert not set(modules) & HEAVY
    assert said[0].startswith("back: 2 files restored") and "1 stream by checksum, 2 restored files" in said[1]
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == content
