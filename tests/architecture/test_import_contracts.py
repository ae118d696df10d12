"""The import contracts of pyproject.toml hold, and they catch what they are there for."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.support import PACKAGE, ROOT

LINT_IMPORTS = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as main; main()", "--no-cache"]


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run import-linter on the package and the pyproject.toml that lie in `folder`."""
    environment = dict(os.environ, PYTHONPATH=str(folder), COLUMNS="200")
    return subprocess.run(LINT_IMPORTS, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def scaffold(folder: Path, files: dict[str, str]) -> Path:
    """A package with every room and wing of the layers contracts, all empty but for `files`."""
    text = (ROOT / "pyproject.toml").read_text()
    (folder / "pyproject.toml").write_text(text)
    package = folder / "ernie_elastic"
    for contract in tomllib.loads(text)["tool"]["importlinter"]["contracts"]:
        for container in contract.get("containers", ()):
            for room in [name.strip() for layer in contract["layers"] for name in layer.split("|")]:
                (folder / container.replace(".", "/") / room).mkdir(parents=True, exist_ok=True)
    for room in [package, *(path for path in package.rglob("*") if path.is_dir())]:
        (room / "__init__.py").touch()
    for name, content in files.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(content)
    return folder


def test_the_package_keeps_every_import_contract() -> None:
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_contracts_allow_what_the_design_allows(tmp_path: Path) -> None:
    allowed = {
        "training/engines/deepspeed_engine.py": "import deepspeed\n",
        "kernels/zip_gemm/triton_impl.py": "import triton\nimport triton.language as tl\n",
        "kernels/zip_gemm/__init__.py": "from . import triton_impl\n",
        "compression/codec.py": "import ernie_elastic.kernels.zip_gemm\n",
        "cli/run.py": "import ernie_elastic.pipeline\n",
        "modeling/__init__.py": "from ernie_elastic.generation.causal_lm import x\n",
        "generation/causal_lm/__init__.py": "x = 1\n",
        "data/prepare/stage.py": "import ernie_elastic.data.packed\n",
    }
    done = lint_imports(scaffold(tmp_path, allowed))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("data/packed/loader.py", "import ernie_elastic.training\n"),
        ("data/media/decoding.py", "import ernie_elastic.data.sources\n"),
        ("data/attic.py", ""),
        ("tokenizers/audio/base.py", "import ernie_elastic.tokenizers.visual\n"),
        ("tokenizer_training/losses/audio.py", "import ernie_elastic.tokenizer_training.audio\n"),
        ("training/engines/base.py", "import ernie_elastic.training.checkpoints\n"),
        ("pipeline/demo/run.py", "import ernie_elastic.pipeline.study\n"),
        ("modeling/model.py", "from ernie_elastic.elastic import sampler\n"),
        ("modeling/model.py", "import ernie_elastic.generation.causal_lm\n"),
        ("analysis/report.py", "import ernie_elastic.data\n"),
        ("compression/codec.py", "import ernie_elastic.modeling\n"),
        ("training/losses.py", "import deepspeed\n"),
        ("modeling/router.py", "import triton.language as tl\n"),
        ("attic/__init__.py", ""),
    ],
)
def test_contracts_catch_a_planted_import(tmp_path: Path, name: str, content: str) -> None:
    done = lint_imports(scaffold(tmp_path, {name: content, "elastic/sampler.py": ""}))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "BROKEN" in done.stdout or "Could not run" in done.stdout, done.stdout


@pytest.mark.parametrize("room", ["compression", "analysis"])
def test_rooms_for_any_model_do_not_name_ours(room: str) -> None:
    """Imports inside functions and strings given to import_module count too, which import-linter cannot see."""
    forbidden = ("ernie_elastic.modeling", "ernie_elastic.generation", "ernie_elastic.elastic")
    for path in sorted((PACKAGE / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names: list[str] = []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module or ''}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value:
                names = [node.value]
            bad = [name for name in names if name.startswith(forbidden)]
            assert not bad, f"{path.relative_to(ROOT)}:{node.lineno} names {bad[0]}"  # type: ignore[attr-defined]
