"""No two files of the package import each other in a circle, and any of them may be the first one imported.

Every import counts, those under TYPE_CHECKING and inside functions too. A package's face (`__init__.py`) is no room: it
hands names on and is left out of the circles.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import PACKAGE, ROOT


def imported(tree: ast.AST, module: str, known: set[str]) -> set[str]:
    """The modules among `known` that a file's syntax tree imports; relative names are those of `module`."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base for alias in node.names}
    return found & known - {module}


def circles(package: Path) -> list[list[str]]:
    """The sets of files of a package that reach each other by imports: sorted dotted names, a list for each set."""
    root = package.parent
    files = {
        ".".join(path.relative_to(root).with_suffix("").parts): path
        for path in package.rglob("*.py")
        if path.name != "__init__.py"
    }
    known = set(files)
    edges = {name: imported(ast.parse(path.read_text(encoding="utf-8")), name, known) for name, path in files.items()}
    reached = {name: _reached(name, edges) for name in files}
    together = {name: sorted(other for other in reached[name] if name in reached[other]) for name in files}
    return [list(part) for part in sorted({tuple(part) for part in together.values() if part})]


def _reached(start: str, edges: dict[str, set[str]]) -> set[str]:
    """What `start` imports, and what that imports in turn; itself only by a circle."""
    seen: set[str] = set()
    left = list(edges[start])
    while left:
        name = left.pop()
        if name not in seen:
            seen.add(name)
            left += edges[name]
    return seen


def test_no_files_import_each_other_in_a_circle() -> None:
    found = circles(PACKAGE)
    assert not found, "\n".join("circle: " + ", ".join(part) for part in found)


PLANTED = {
    "plain": "from house import b\n",
    "dotted": "import house.b\n",
    "from the module": "from house.b import x\n",
    "relative": "from .b import x\n",
    "relative module": "from . import b\n",
    "for types alone": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from house.b import x\n",
    "inside a function": "def f():\n    from house.b import x\n",
}


@pytest.mark.parametrize("line", PLANTED.values(), ids=PLANTED.keys())
def test_a_planted_circle_is_found_and_named(tmp_path: Path, line: str) -> None:
    package = tmp_path / "house"
    package.mkdir()
    (package / "__init__.py").write_text("from house import a, b\n")
    (package / "a.py").write_text(line)
    (package / "b.py").write_text("from house.c import y\nx = 1\n")
    (package / "c.py").write_text("y = 1\n")
    assert circles(package) == []
    (package / "c.py").write_text("import house.a\ny = 1\n")
    assert circles(package) == [["house.a", "house.b", "house.c"]]


FIRST = """
import importlib, json, os, sys

def in_a_fork(work):
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            said = work()
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(write, json.dumps(said).encode())
        os._exit(0)
    os.close(write)
    said = json.loads(os.fdopen(read).read())
    os.waitpid(child, 0)
    return said

def others():
    importlib.import_module("ernie_elastic.modeling")
    return [name for name in sys.modules if name.partition(".")[0] not in ("ernie_elastic", "__main__")]

for name in in_a_fork(others):  # what all files need of other packages is imported once, before the forks
    importlib.import_module(name)
assert "ernie_elastic" not in sys.modules
for name in sys.argv[1:]:
    said = in_a_fork(lambda: importlib.import_module(name).__name__)
    print(name if said == name else f"{name}: {said}")
"""


def test_any_file_of_the_model_may_be_the_first_one_imported() -> None:
    """The face of modeling imports from generation, which stands above: no file of the two may need to come second."""
    paths = [path for room in ("modeling", "generation") for path in sorted((PACKAGE / room).glob("*.py"))]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]
    done = subprocess.run([sys.executable, "-c", FIRST, *names], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.stdout.split("\n")[:-1] == names, done.stdout + done.stderr[-2000:]
