"""Importing the room imports neither torch nor Transformers; compressed directories load whatever import came first."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import ernie_elastic.compression
from ernie_elastic.compression import registration
from tests.compression.conftest import Pair
from tests.compression.test_config import run

Pairs = Callable[[str], Pair]
IDS = "torch.arange(3, 14)[None]"
NOTHING_HEAVY = "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), sorted(sys.modules)\n"
ORDERS = {
    "ours": f"import ernie_elastic.compression\n{NOTHING_HEAVY}",
    "theirs, ours": "import transformers\nimport ernie_elastic.compression\n",
    "ours, looking for theirs": "import ernie_elastic.compression, importlib.util\n"
    f"assert importlib.util.find_spec('transformers').loader.get_filename()\n{NOTHING_HEAVY}",
    "ours, theirs in a thread": "import ernie_elastic.compression, importlib, threading as t\n"
    "thread = t.Thread(target=importlib.import_module, args=('transformers',))\nthread.start(), thread.join()\n",
    "a name that needs both": "from ernie_elastic.compression import PackedLinear\n",
    "the quantizer": "import ernie_elastic.compression.quantizer\n",
    "the configuration": "import ernie_elastic.compression.config\n",
}
LOAD = f"""
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({{path!r}}, dtype=torch.float32)
torch.save(model({IDS}).logits.detach(), 'logits')
from ernie_elastic.compression import PackedLinear
print('PACKED', any(type(module) is PackedLinear for module in model.modules()))
"""


SAMPLED = ("ours", "theirs, ours", "a name that needs both")  # each takes a fresh interpreter and all its imports


@pytest.mark.parametrize(
    "order", [pytest.param(name, marks=() if name in SAMPLED else pytest.mark.slow) for name in ORDERS]
)
def test_a_compressed_directory_loads_after_imports_in_any_order(pairs: Pairs, tmp_path: Path, order: str) -> None:
    done = run("import sys\n" + ORDERS[order] + LOAD.format(path=str(pairs("llama").compressed)), tmp_path)
    assert done.returncode == 0 and "PACKED True" in done.stdout, done.stderr[-2000:]
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits"), pairs("llama").dense()(torch.arange(3, 14)[None]).logits)


def test_every_public_name_is_there() -> None:
    names = ernie_elastic.compression.__all__
    assert sorted(name for names in ernie_elastic.compression._FILES.values() for name in names) == names
    assert set(names) <= set(dir(ernie_elastic.compression))
    assert all(getattr(ernie_elastic.compression, name).__name__ == name for name in names)
    with pytest.raises(AttributeError, match="no attribute 'zip'"):
        _ = ernie_elastic.compression.zip


@pytest.fixture
def pretended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A hook that waits for the module `pretended_library`; the list gets an item for every registration."""
    done: list[str] = []
    (tmp_path / "pretended_library.py").write_text("from pretended_part import PART\nWHOLE = PART\n")
    (tmp_path / "pretended_part.py").write_text("PART = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registration, "TRANSFORMERS", "pretended_library")
    monkeypatch.setattr(registration, "register", lambda: done.append(str(sys.modules["pretended_library"].WHOLE)))
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    yield done
    for name in ("pretended_library", "pretended_part"):
        sys.modules.pop(name, None)


def hooks() -> int:
    return sum(isinstance(finder, registration._Hook) for finder in sys.meta_path)


def test_the_hook_registers_once_after_the_import_and_goes(pretended: list[str]) -> None:
    registration.register_with_transformers()
    spec = importlib.util.find_spec("pretended_library")
    assert spec is not None and spec.loader.get_source("pretended_library").startswith("from")  # type: ignore[union-attr]
    assert pretended == [] and hooks() == 1
    threads = [threading.Thread(target=importlib.import_module, args=("pretended_library",)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert pretended == ["1"] and hooks() == 0
    module = sys.modules["pretended_library"]
    assert type(module.__loader__) is type(module.__spec__.loader) is importlib.machinery.SourceFileLoader  # type: ignore[union-attr]
    importlib.reload(module)
    assert pretended == ["1"]


def test_the_hook_registers_at_once_when_the_library_is_there(pretended: list[str]) -> None:
    importlib.import_module("pretended_library")
    registration.register_with_transformers()
    assert pretended == ["1"] and hooks() == 0


def test_the_hook_waits_for_a_library_that_cannot_be_imported_yet(pretended: list[str], tmp_path: Path) -> None:
    registration.register_with_transformers()
    part = (tmp_path / "pretended_part.py").rename(tmp_path / "away.py")
    for _ in range(2):
        with pytest.raises(ImportError, match="pretended_part"):
            importlib.import_module("pretended_library")
    assert pretended == [] and hooks() == 1
    part.rename(tmp_path / "pretended_part.py")
    importlib.invalidate_caches()
    importlib.import_module("pretended_library")
    assert pretended == ["1"] and hooks() == 0


def test_a_registration_that_fails_stops_the_import_and_is_tried_again(
    pretended: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    registration.register_with_transformers()
    with monkeypatch.context() as broken:
        broken.setattr(registration, "register", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            importlib.import_module("pretended_library")
    importlib.import_module("pretended_library")
    assert pretended == ["1"] and hooks() == 0
