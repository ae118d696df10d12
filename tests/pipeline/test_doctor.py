"""`ernie-elastic doctor` answers for every part, never crashes, and tells a machine that lacks something what to do."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ernie_elastic.pipeline import doctor as module
from ernie_elastic.pipeline.doctor import Row, doctor, format_rows, print_doctor

NAMES = [
    "python",
    "torch",
    "CPU",
    "memory",
    "disk",
    "compiler",
    "GPU",
    "Triton",
    "packed CPU kernel",
    "DeepSpeed",
    "wandb",
]


def by_name(rows: list[Row]) -> dict[str, Row]:
    """Rows under their names."""
    return {row.name: row for row in rows}


def test_every_part_has_a_row_with_words() -> None:
    rows = doctor()
    assert [row.name for row in rows[: len(NAMES)]] == NAMES
    assert [row.name for row in rows[len(NAMES) :]] == [
        "-> make demo",
        "-> ZeRO training",
        "-> compressed models",
        "-> GPU kernels",
    ]
    assert all(row.value and row.meaning for row in rows)


def test_rows_agree_with_this_machine(tmp_path: Path) -> None:
    rows = by_name(doctor(tmp_path / "not" / "there" / "yet"))
    assert rows["python"].ok and torch.__version__ in rows["torch"].value
    assert rows["GPU"].ok == torch.cuda.is_available()
    assert rows["DeepSpeed"].ok == (importlib.util.find_spec("deepspeed") is not None)
    assert rows["disk"].ok and str(tmp_path) in rows["disk"].value
    total, free = module.memory_bytes()
    assert 0 < free <= total


def test_a_probe_that_fails_becomes_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("driver\nlost")

    monkeypatch.setattr(torch.cuda, "is_available", broken)
    rows = by_name(doctor())
    assert not rows["GPU"].ok and rows["GPU"].meaning == "RuntimeError: driver lost"
    assert not rows["-> GPU kernels"].ok and rows["-> make demo"].ok


def test_what_is_not_installed_is_named_with_its_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    absent = ("deepspeed", "wandb", "triton")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in absent else real(name, *a))
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    rows = by_name(doctor())
    assert not any(rows[name].ok for name in ("DeepSpeed", "wandb", "Triton", "compiler", "-> ZeRO training"))
    assert "pip install deepspeed" in rows["DeepSpeed"].meaning and "not needed" in rows["compiler"].meaning
    assert rows["-> make demo"].ok


def test_a_full_disk_stops_the_demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    rows = by_name(doctor(tmp_path))
    assert not rows["disk"].ok and not rows["-> make demo"].ok and "disk" in rows["-> make demo"].meaning


def test_container_limits_count(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "/proc/meminfo": "MemTotal: 16000000 kB\nMemAvailable: 9000000 kB\n",
        "/sys/fs/cgroup/memory.max": "4000000000\n",
        "/sys/fs/cgroup/memory.current": "1000000000\n",
        "/sys/fs/cgroup/cpu.max": "100000 100000\n",
    }
    monkeypatch.setattr(module, "_read", lambda path: files.get(path, ""))
    assert module.memory_bytes() == (4_000_000_000, 3_000_000_000)
    assert module.usable_cores() == 1


def test_table_fits_its_width(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [Row("short", True, "v", "m"), Row("a longer name", False, "x " * 60, "reason " * 30)]
    lines = format_rows(rows, 72)
    assert max(map(len, lines)) <= 72
    assert lines[0].startswith("ok  short") and any(line.startswith("no  a longer name") for line in lines)
    assert print_doctor() and "-> make demo" in capsys.readouterr().out
