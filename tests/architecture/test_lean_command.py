"""What each command has imported when its work begins: its own needs, not what other commands need."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT

HEAVY = {
    "accelerate", "datasets", "deepspeed", "matplotlib", "pandas", "plotly", "scipy", "sklearn", "skimage", "torch",
    "transformers", "triton", "wandb",
}  # fmt: skip
# What Transformers' own model code imports is there before a command that loads a model can begin; more is our doing.
MODEL_CODE = "torch, transformers.modeling_utils"
NEVER = (HEAVY - {"torch", "transformers"}) | {
    "ernie_elastic.analysis.drawing", "ernie_elastic.tokenizer_training", "ernie_elastic.training", "torch._dynamo",
    "torch._inductor", "torch.distributed.tensor",
}  # fmt: skip
WITHOUT_TORCH = ("compress", "decompress", "info", "doctor")
WITH_MODEL = ("extract", "generate", "evaluate", "routing")

# Imports what is given, then forks a process for each command, which runs the command line until its work begins; one
# line of module names each. A command that never reaches its work, or fails, ends this with its code.
FORKS = """
import importlib, json, os, runpy, sys
until_work, folder, imports, cases = sys.argv[1:]
os.chdir(folder)
for name in filter(None, imports.split(", ")):
    importlib.import_module(name)
print(json.dumps(sorted(sys.modules)), flush=True)
for target, arguments in json.loads(cases):
    child = os.fork()
    if not child:
        sys.exit(runpy.run_path(until_work)["run_until"](target, arguments))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code:
        sys.exit(code)
"""
LIST_MODULES = """
import json, runpy, sys
sys.argv = ["ernie-elastic", sys.argv[1]]
try:
    runpy.run_module("ernie_elastic.cli", run_name="__main__")
except SystemExit as stop:
    assert not stop.code, stop.code
print(json.dumps(sorted(sys.modules)))
"""


@pytest.fixture(scope="module")
def startup() -> Any:
    """scripts/bench/startup.py: which function does each command's work, and inputs that lead there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        return importlib.import_module("bench.startup")


@pytest.fixture(scope="module")
def inputs(startup: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and the same compressed."""
    return startup.make_inputs(tmp_path_factory.mktemp("startup"))


def run_python(code: str, *arguments: str) -> list[list[str]]:
    """Lines of module names that a fresh interpreter prints."""
    words = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('["')]


def modules_when_work_begins(startup: Any, inputs: Path, imports: str, targets: dict[str, str]) -> dict[str, set[str]]:
    """For each command, the modules that it has imported beyond `imports` when it calls its target."""
    cases = [(target, startup.command(name, f"out-{name}")[3:]) for name, target in targets.items()]
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{FORKS}"
    before, *after = run_python(code, str(startup.UNTIL_WORK), str(inputs), imports, json.dumps(cases))
    assert len(after) == len(cases), "every command prints its modules"
    assert all("ernie_elastic.pipeline.commands" in names for names in after)
    return {name: set(names) - set(before) for name, names in zip(targets, after, strict=True)}


@pytest.fixture(scope="module")
def without_torch(startup: Any, inputs: Path) -> dict[str, set[str]]:
    return modules_when_work_begins(startup, inputs, "", {name: startup.WORK[name][0] for name in WITHOUT_TORCH})


@pytest.fixture(scope="module")
def with_model(startup: Any, inputs: Path) -> dict[str, set[str]]:
    return modules_when_work_begins(startup, inputs, MODEL_CODE, {name: startup.WORK[name][0] for name in WITH_MODEL})


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_import_nothing_heavy(option: str) -> None:
    (modules,) = run_python(LIST_MODULES, option)
    assert "ernie_elastic" in modules and not set(modules) & (HEAVY | {"numpy", "tyro"})


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_command_begins_its_work_without_torch(without_torch: dict[str, set[str]], name: str) -> None:
    assert not without_torch[name] & HEAVY


@pytest.mark.parametrize("name", WITH_MODEL)
def test_command_with_a_loaded_model_has_imported_no_more_than_it_needs(
    with_model: dict[str, set[str]], name: str
) -> None:
    assert "ernie_elastic.generation.loading" in with_model[name], "the list is that of a command which loaded a model"
    assert not with_model[name] & NEVER


def test_doctor_looks_at_the_machine_with_torch_alone(startup: Any, inputs: Path) -> None:
    modules = modules_when_work_begins(
        startup, inputs, "torch", {"doctor": "ernie_elastic.pipeline.doctor:format_rows"}
    )
    assert "ernie_elastic.kernels.zip_gemv" in modules["doctor"] and not modules["doctor"] & HEAVY
