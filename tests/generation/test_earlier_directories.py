"""Directories that an earlier package wrote (commit f91cf6c) load, with the classes where they stand today.

`tests/golden/directories` holds a small model in BF16 and its compressed twin, shim files included.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from ernie_elastic.compression import decompress_directory
from ernie_elastic.modeling import ErnieElasticForCausalLM
from tests.support import ROOT

DIRECTORIES = ROOT / "tests" / "golden" / "directories"
TRUSTED = """
import sys
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
print("LOADED", type(model).__name__, type(model).__module__)
"""


def logits_of(directory: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    assert isinstance(model, ErnieElasticForCausalLM)
    for name in ("grouped_mm", "eager"):  # the decorator that Transformers looks for is in another file
        model.set_experts_implementation(name)
        assert model.config._experts_implementation == name
    with torch.inference_mode():
        return model(torch.arange(10, 60)[None]).logits


def test_the_compressed_twin_has_the_logits_of_its_source() -> None:
    model, compressed = logits_of(DIRECTORIES / "model"), logits_of(DIRECTORIES / "compressed")
    assert model.std() > 0.01 and torch.equal(model, compressed)


def test_the_files_come_back(tmp_path: Path) -> None:
    decompress_directory(DIRECTORIES / "compressed", tmp_path / "back")
    for path in sorted((DIRECTORIES / "model").iterdir()):
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("name", ["model", "compressed"])
def test_the_shim_files_find_the_classes_in_a_process_that_imports_nothing_of_ours(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", TRUSTED, str(DIRECTORIES / name)],
        cwd=ROOT,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert "LOADED ErnieElasticForCausalLM ernie_elastic.generation.causal_lm" in done.stdout, done.stderr[-2000:]
