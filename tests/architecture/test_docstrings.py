"""Every public module, class and function of the package says what it does, and what shapes its tensors have."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import PACKAGE, ROOT

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
# A shape is written as `name_BTH`, as `[B, T, H]`, or in words.
SHAPE = re.compile(r"_[A-Z][A-Z0-9]*\b|\[[^\]]*\]|\bscalar\b|\bshape\b|\bsame\b")
FILES = sorted(PACKAGE.rglob("*.py"))


def documented_methods(tree: ast.Module) -> dict[str, set[str]]:
    """For each class of a module, its methods with a docstring."""
    return {
        node.name: {item.name for item in node.body if isinstance(item, ast.FunctionDef) and ast.get_docstring(item)}
        for node in tree.body
        if isinstance(node, ast.ClassDef)
    }


def public_nodes(tree: ast.Module) -> Iterator[tuple[str, Documented]]:
    """The module, its public classes and functions, and the public methods of those classes.

    Methods that a base class of the same module declares and documents are left out.
    """
    declared = documented_methods(tree)
    yield "module", tree
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            yield node.name, node
            if isinstance(node, ast.ClassDef):
                inherited = {name for base in node.bases for name in declared.get(ast.unparse(base), ())}
                for item in node.body:
                    is_method = isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef)
                    if is_method and not item.name.startswith("_") and item.name not in inherited:
                        yield f"{node.name}.{item.name}", item


def inherits_its_docstring(node: Documented) -> bool:
    """Methods marked @override, and property setters, are documented where they are declared."""
    names = [ast.unparse(item) for item in getattr(node, "decorator_list", [])]
    return any(name in ("override", "typing.override", "overload") or name.endswith(".setter") for name in names)


def handles_tensors(node: Documented) -> bool:
    """True when an argument or the result is annotated as a tensor."""
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return False
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    annotations = [item.annotation for item in arguments] + [node.returns]
    return any(item is not None and re.search(r"\bTensor\b", ast.unparse(item)) for item in annotations)


def complaints(source: str) -> list[str]:
    """What is missing in one module, a line each."""
    found = []
    for name, node in public_nodes(ast.parse(source)):
        if inherits_its_docstring(node):
            continue
        text = ast.get_docstring(node)
        line = getattr(node, "lineno", 1)
        if not text:
            found.append(f"line {line}: {name} has no docstring")
        elif handles_tensors(node) and not SHAPE.search(text):
            # A suffix in the signature is a shape too; the file's legend explains the letters.
            signature = ast.unparse(node.args)  # type: ignore[union-attr]
            if not SHAPE.search(re.sub(r"Tensor|list|tuple|dict|\[|\]", "", signature)):
                found.append(f"line {line}: {name} handles tensors, its docstring gives no shape")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_public_names_are_documented(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    found = complaints(source) if source.strip() else []
    assert not found, "\n".join(f"{path.relative_to(ROOT)} {line}" for line in found)


def test_the_check_finds_what_is_missing() -> None:
    source = '''"""Doc."""
def bare(): ...
def tensor(x: torch.Tensor):
    """Doubles x."""
def shaped(x_TH: torch.Tensor):
    """Doubles x."""
class Thing:
    """A thing."""
    def method(self): ...
    def _private(self): ...
class Base:
    """A base."""
    def run(self):
        """Runs."""
class Child(Base):
    """Runs otherwise."""
    def run(self): ...
    def walk(self): ...
'''
    assert [line.split(": ")[1].split()[0] for line in complaints(source)] == [
        "bare",
        "tensor",
        "Thing.method",
        "Child.walk",
    ]
