"""What every file of the checkout keeps: its length, and no trace of the machine that it was written on."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.support import ROOT, project_files

MAX_LINES = 400
# Spelled in pieces, so that this file does not match itself.
FORBIDDEN = {
    "a path of one machine": r"(?<![\w.~/-])/(?:wor" + r"k|roo" + r"t|hom" + r"e|User" + r"s|op" + r"t)/\w",
    "a package index of one machine": r"file://"
    + r"/|pythonhos"
    + r"ted\.org|find-lin"
    + r"ks|extra-index-url\s+(?:https?|file):",
    "a document that is not in this repository": r"\b(?:sha" + r"red/|spe" + r"c/)\w+\.(?:md|txt)|\bdesi" + r"gn\.md",
    "a private address": r"\b(?:10|192\.168|172\.(?:1[6-9]|2\d|3[01]))\.\d+\.\d+(?:\.\d+)?:\d{2,5}\b",
    "a secret": r"\b(?:hf_[A-Za-z]{30,}|gh[pousr]_\w{30,}|sk-\w{30,}|AKIA[0-9A-Z]{16})\b",
}
TEXT = (".py", ".md", ".toml", ".txt", ".html", ".css", ".js", ".cpp", ".json", ".sh", ".yml", ".yaml", "")


def find_forbidden(text: str) -> list[str]:
    """One line per match of a forbidden pattern."""
    return [
        f"line {text.count(chr(10), 0, match.start()) + 1}: {what}: {match.group(0)!r}"
        for what, pattern in FORBIDDEN.items()
        for match in re.finditer(pattern, text)
    ]


def test_no_file_names_one_machine_or_a_missing_document() -> None:
    found: list[str] = []
    for path in project_files(*TEXT):
        found += [f"{path.relative_to(ROOT)} {hit}" for hit in find_forbidden(path.read_text(encoding="utf-8"))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "text",
    [
        "see /wor" + "k/x",
        "'/hom" + "e/me/data'",
        "pip --find-lin" + "ks x",
        "(sha" + "red/notes.md)",
        "10.0." + "0.7:8080",
    ],
)
def test_forbidden_patterns_match_what_they_are_for(text: str) -> None:
    assert find_forbidden(text)


@pytest.mark.parametrize(
    "text", ["https://example.org/home/page", "runs/demo", "my-work/x", "docs/formats.md", "3.10.1"]
)
def test_forbidden_patterns_let_ordinary_text_pass(text: str) -> None:
    assert not find_forbidden(text)


@pytest.mark.parametrize("path", project_files(".py"), ids=lambda path: str(path.relative_to(ROOT)))
def test_python_file_is_short_and_says_what_it_is(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    lines = text.count("\n")
    assert lines <= MAX_LINES, f"{lines} lines, at most {MAX_LINES}; split it"
    if text.strip():
        assert ast.get_docstring(ast.parse(text)), "no module docstring"
