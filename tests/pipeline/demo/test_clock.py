"""Seconds of the demo's stages over sessions that were stopped."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from ernie_elastic.pipeline.demo.run import _Clock


def _stop(seconds: float) -> None:
    time.sleep(seconds)
    raise KeyboardInterrupt


def test_a_stopped_stage_counts_both_sessions_and_a_skipped_one_its_first(tmp_path: Path) -> None:
    path = tmp_path / "seconds.json"
    with pytest.raises(KeyboardInterrupt):
        _Clock(path).time("training", lambda: _stop(0.3))
    stored = json.loads(path.read_text())
    assert stored["seconds"] == {} and stored["unfinished"]["training"] >= 0.3
    second = _Clock(path)
    second.time("training", lambda: time.sleep(0.2))
    assert second.seconds["training"] >= 0.5 and second.unfinished == {}
    third = _Clock(path)
    third.time("training", lambda: None)
    assert third.seconds["training"] == second.seconds["training"], "a stage that is there already keeps its time"
