"""scripts/real_inputs.py: what it finds is real, whole and readable; a missing part is named."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ernie_elastic.data.media.decoding import read_audio, read_image
from tests.support import ROOT


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("real_inputs")


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="needs the program espeak-ng")
def test_the_inputs_appear_whole_and_can_be_read(
    script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("skimage")
    script.write(tmp_path / "inputs", 3)
    assert [path.name for path in tmp_path.iterdir()] == ["inputs"]
    pictures = [read_image(path) for path in sorted((tmp_path / "inputs" / "photographs").iterdir())]
    assert len(pictures) >= 15 and all(min(picture.shape[:2]) >= 150 for picture in pictures)
    sounds = [read_audio(path, 16000) for path in sorted((tmp_path / "inputs" / "speech").iterdir())]
    assert len(sounds) == 3 and all(len(wave) > 8000 and np.abs(wave).max() > 0.05 for wave in sounds)
    texts = [path.read_text(encoding="utf-8") for path in (tmp_path / "inputs" / "text").iterdir()]
    assert len(texts) > 50 and all(len(text) >= script.MIN_TEXT for text in texts)
    assert "3 speech" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="inputs exists already"):
        script.write(tmp_path / "inputs", 3)


def test_a_missing_program_is_named_and_nothing_is_left(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "photographs", lambda: iter(()))
    monkeypatch.setattr(script.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match="speech needs espeak-ng; install it"):
        script.write(tmp_path / "inputs", 3)
    assert not list(tmp_path.iterdir())


def test_sentences_can_be_read_aloud(script: Any) -> None:
    lines = script.sentences()
    assert len(lines) > 200 and lines == sorted(set(lines))
    assert all(3 <= len(line.split()) <= 24 and line[-1] in ".!?" for line in lines)
