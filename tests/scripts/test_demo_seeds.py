"""The table over several runs of the demo: means, spreads, and runs that do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scripts.demo_seeds import read_summaries, table


def made_up_summary(more: float) -> dict[str, Any]:
    """Two models and two tasks, as summary.json holds them; `more` is added to every accuracy."""
    rows = [
        {
            "model": name,
            "decode_tokens_per_s": 100.0 + 1000 * more,
            "model_bytes": 5_000_000,
            "resident_weight_bytes": 7_000_000,
            "accuracy": {
                "text": {"value": base + more, "chance": 0.1, "n": 200},
                "text_to_image": {"value": base, "chance": 0.1, "n": 200},
            },
        }
        for name, base in (("full", 0.5), ("submodel-half", 0.25))
    ]
    return {"rows": rows, "logits_bit_equal": True, "seconds": {}}


def test_the_table_holds_mean_lowest_and_highest():
    lines = table([made_up_summary(0.0), made_up_summary(0.3)]).splitlines()
    assert lines[0] == "|  | full | submodel-half |"
    assert "| `text` | 65.0 (50.0 to 80.0) | 40.0 (25.0 to 55.0) |" in lines
    assert "| `text_to_image` | 50.0 (50.0 to 50.0) | 25.0 (25.0 to 25.0) |" in lines
    assert "| mean of the tasks | 57.5 (50.0 to 65.0) | 32.5 (25.0 to 40.0) |" in lines
    assert "| decode, text tokens/s | 250 (100 to 400) | 250 (100 to 400) |" in lines


def test_runs_that_cannot_be_compared_are_named(tmp_path: Path):
    for name, summary in (("a", made_up_summary(0.0)), ("b", {"rows": made_up_summary(0.0)["rows"][:1]})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(SystemExit, match="different models"):
        read_summaries([tmp_path / "a", tmp_path / "b"])
    with pytest.raises(SystemExit, match=r"c/summary\.json does not exist"):
        read_summaries([tmp_path / "c"])
