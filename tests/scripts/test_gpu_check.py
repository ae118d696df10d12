"""gpu_check without a GPU: what it runs, leaves out, reports and survives; a stand-in takes the GPU's place."""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests.support import ROOT

FACTS = {"gpu": "Test GPU 9000", "commit": "abc", "torch": "2.11"}


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> Any:
    """scripts/gpu_check.py as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.setattr(sys, "path", list(sys.path))  # the script prepends to it
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "scripts" / "gpu_check.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_check", module)  # dataclasses look it up
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "BENCHMARKS", ("zip_gemm", "zip_moe"))  # those that the tests plant
    return module


def test_every_benchmark_of_a_gpu_is_run() -> None:
    tree = ast.parse((ROOT / "scripts" / "gpu_check.py").read_text())
    named = next(ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign)
                 and getattr(node.targets[0], "id", "") == "BENCHMARKS")  # fmt: skip
    need_gpu = {path.stem for path in (ROOT / "scripts" / "bench").glob("*.py") if "gpu.run_all(" in path.read_text()}
    assert set(named) == need_gpu and len(named) == len(need_gpu) >= 3


def row(case: str, ours: float = 2.0) -> Any:
    """A row against one peer that reaches 1."""
    from bench.common import Row

    return Row(case, ours, {"peer": 1.0}, "GB/s", higher_is_better=True)


def plant(monkeypatch: pytest.MonkeyPatch, name: str, tasks: list[Any]) -> None:
    """Let `bench.<name>` be a benchmark with these tasks."""
    module = ModuleType(f"bench.{name}")
    module.tasks = lambda quick: tasks  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, f"bench.{name}", module)


def task(name: str, seconds: float, *rows: Any, done: list[str] | None = None, error: str = "") -> Any:
    """A task that gives rows, or fails."""

    def work() -> list[Any]:
        if done is not None:
            done.append(name)
        if error:
            raise RuntimeError(error)
        return list(rows)

    return SimpleNamespace(name=name, seconds=seconds, work=work)


def test_no_row_starts_without_time_and_benchmarks_take_turns(
    check: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done: list[str] = []
    plant(
        monkeypatch, "zip_gemm", [task("a", 1, row("a"), done=done), task("b", 900, done=done), task("c", 1, done=done)]
    )
    plant(monkeypatch, "zip_moe", [task("d", 1, row("d"), done=done), task("e", 1, done=done)])
    found, saved = check.Found(), []
    check.measure(found, True, check.Clock(1.0), lambda: saved.append(len(found.rows)))
    assert done == ["a", "d", "e", "c"] and saved == [1, 2, 2, 2]
    assert [(name, item.case) for name, item in found.rows] == [("zip_gemm", "a"), ("zip_moe", "d")]
    assert found.skipped == ["zip_gemm, b: takes about 900 s, 60 s are left"] or "59 s are left" in found.skipped[0]
    assert "gpu_check: left out: zip_gemm, b" in capsys.readouterr().err


def test_a_failing_row_is_reported_and_the_others_are_measured(check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, "zip_gemm", [task("bad", 1, error="the bits differ\nmore"), task("good", 1, row("good"))])
    plant(monkeypatch, "zip_moe", [])
    found = check.Found()
    check.measure(found, True, check.Clock(1.0), lambda: None)
    assert found.problems == ["zip_gemm, bad: RuntimeError: the bits differ"]
    assert [item.case for _, item in found.rows] == ["good"]


def test_report_says_hardware_failures_and_losses(check: Any, tmp_path: Path) -> None:
    found = check.Found(tests="3 failed", problems=["kernel tests: x"], skipped=["row y: no time"])
    found.rows = [("zip_gemm", row("wins")), ("zip_moe", row("loses", 0.8))]
    path = check.write_report(tmp_path / "new", found, FACTS)
    text, data = path.read_text(), json.loads(path.with_suffix(".json").read_text())
    assert path.name.startswith("gpu-test-gpu-9000-20") and sorted(p.name for p in path.parent.iterdir()) == [
        path.with_suffix(".json").name, path.name
    ]  # fmt: skip
    for part in (
        "- torch: 2.11",
        "- kernel tests on this GPU: 3 failed",
        "## Failed",
        "- row y: no time",
        "## zip_moe",
    ):
        assert part in text
    assert text.endswith("## Where ours loses\n\n- zip_moe, loses: 0.80x of peer\n")
    assert data["losses"] == ["zip_moe, loses: 0.80x of peer"] and data["commit"] == "abc"
    assert [item["benchmark"] for item in data["rows"]] == ["zip_gemm", "zip_moe"] and data["rows"][1]["ratio"] == {
        "peer": 0.8
    }


def test_tests_that_fail_hang_or_cannot_run_are_told_apart(check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def fake(command: list[str], **rest: Any) -> Any:
        commands.append(command)
        assert "TRITON_INTERPRET" not in rest["env"] and rest["env"]["CUDA_VISIBLE_DEVICES"] == "1"
        rest["stdout"].write("FAILED tests/kernels/test_x.py::test_y - boom\n= 1 failed in 2s =\n")
        rest["stdout"].flush()
        if outcome == "hang":
            raise check.subprocess.TimeoutExpired(command, rest["timeout"])
        return SimpleNamespace(returncode=outcome)

    monkeypatch.setattr(check.subprocess, "run", fake)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    results = {}
    outcome: Any
    for outcome in (0, 1, "hang"):
        results[outcome] = check.Found()
        check.run_tests(results[outcome], "cuda:1", outcome == 0, 50.0)
    assert (results[0].tests, results[0].problems) == ("1 failed in 2s", [])
    assert results[1].problems == ["kernel tests: 1 failed in 2s: tests/kernels/test_x.py::test_y"]
    assert results["hang"].tests == "stopped after 50 s" and "stopped after 50 s" in results["hang"].problems[0]
    assert "tests/kernels/test_zip_gemm.py" in commands[0] and "tests/kernels" in commands[1]
    assert "tests/compression/test_packed.py" in commands[1] and "tests/compression/test_packed.py" not in commands[0]
    monkeypatch.setattr(check, "MODEL_TESTS", {"tests/a.py": ("no_such_module",), "tests/b.py": ()})
    outcome = 0
    found = check.Found()
    check.run_tests(found, "cuda:1", False, 50.0)
    assert found.skipped == ["tests/a.py: no_such_module not installed"] and commands[-1][-1] == "tests/b.py"
    monkeypatch.setattr(check, "NEEDED_BY_TESTS", ("no_such_module",))
    found = check.Found()
    check.run_tests(found, "cuda", True, 50.0)
    assert found.skipped == ["kernel tests: no_such_module not installed"] and len(commands) == 4
    monkeypatch.setattr(check, "NEEDED_BY_BENCHMARKS", ("no_such_module",))
    check.measure(found, True, check.Clock(1.0), lambda: None)
    assert found.skipped[-1] == "benchmarks: no_such_module not installed"
    monkeypatch.setattr(check, "NEEDED_BY_BENCHMARKS", ())
    monkeypatch.setattr(check, "NEEDED_BY", {"zip_gemm": ("no_such_module",)})
    plant(monkeypatch, "zip_gemm", [task("a", 1, row("a"))])
    plant(monkeypatch, "zip_moe", [task("b", 1, row("b"))])
    check.measure(found, True, check.Clock(1.0), lambda: None)
    assert found.skipped[-1] == "zip_gemm: no_such_module not installed"
    assert [name for name, _ in found.rows] == ["zip_moe"]


def test_the_whole_run_ends_with_the_right_code(check: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plant(monkeypatch, "zip_gemm", [task("a", 1, row("a"))])
    plant(monkeypatch, "zip_moe", [])
    monkeypatch.setattr(check, "use_device", lambda name: "Test GPU")
    monkeypatch.setattr(check, "describe", lambda name: {"gpu": name, "commit": "abc"})
    given: list[tuple[bool, float]] = []

    def tests(found: Any, device: str, quick: bool, seconds: float) -> None:
        given.append((quick, seconds))
        if not quick:
            found.fail("kernel tests: broken")

    monkeypatch.setattr(check, "run_tests", tests)
    for flags, code in ((["--quick"], 0), ([], 1)):
        monkeypatch.setattr(sys, "argv", ["gpu_check.py", *flags, "--out", str(tmp_path)])
        assert check.main() == code
    assert [quick for quick, _ in given] == [True, False] and given[0][1] < 0.5 * 170 and given[1][1] < 0.5 * 530
    assert len(list(tmp_path.glob("gpu-test-gpu-*"))) == 2
