"""Every command that README.md, CONTRIBUTING.md or docs/ shows exists, knows its flags, and is run by a test.

The registry of commands that are run is `tests.support.commands.EXECUTED`; a test in tests/pipeline runs each of its
lines at smoke size, so a documented command that nothing runs fails here.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
import subprocess
import sys

import pytest

from ernie_elastic import cli
from ernie_elastic.errors import ConfigError
from tests.support import ROOT
from tests.support.commands import (
    EXECUTED,
    EXECUTED_BY_CI,
    DocumentedCommand,
    commands_of,
    documented_commands,
    flags_of,
    make_targets,
    program_and_arguments,
    signature,
)

COMMANDS = documented_commands()
# What a program runs in ernie_elastic.pipeline.commands; the subcommands of `ernie-elastic` are listed in its cli.
ENTRIES = {
    "extract_submodel": "extract",
    "scripts/pretrain.py": "pretrain",
    "scripts/train_tokenizer.py": "train_tokenizer",
}


def parse_problems(program: str, function: str, arguments: list[str]) -> list[str]:
    """Parse arguments as the command would, without running it: a line when they do not parse."""
    commands = importlib.import_module("ernie_elastic.pipeline.commands")
    try:
        cli.parse(program, getattr(commands, function), arguments)
    except ConfigError as error:
        return [str(error)]
    except SystemExit as stop:  # --help
        return [f"ends with {stop.code}"] if stop.code else []
    return []


@functools.cache
def help_flags(script: str) -> frozenset[str]:
    """Flags in the text that `python <script> --help` prints; it must end with exit code 0."""
    environment = dict(os.environ, PYTHONPATH=str(ROOT), COLUMNS="200", NO_COLOR="1")
    command = [sys.executable, script, "--help"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{script} --help ends with {done.returncode}: {done.stderr[-500:]}"
    return frozenset(re.findall(r"(?<![\w-])--?[A-Za-z][\w.-]*", done.stdout))


def problems(command: DocumentedCommand) -> list[str]:
    """What is wrong with one documented command, a line each."""
    started, arguments = program_and_arguments(command.words)
    program = started[0]
    if program == "make":
        return [
            f"no target {t!r} in the Makefile" for t in signature(command.words).split()[1:] if t not in make_targets()
        ]
    if program.startswith("scripts/") and not (ROOT / program).is_file():
        return [f"{program} does not exist"]
    if program in ENTRIES:
        return parse_problems(program, ENTRIES[program], arguments)
    if program == "ernie-elastic":
        if len(started) == 1:
            return [f"unknown flag {flag}" for flag in flags_of(arguments) if flag not in ("--help", "-h", "--version")]
        if started[1] not in cli.COMMANDS:
            return [f"no command {started[1]!r} in ernie-elastic"]
        return parse_problems(" ".join(started), cli.COMMANDS[started[1]][0], arguments)
    return [f"unknown flag {flag}" for flag in flags_of(arguments) if flag not in help_flags(program)]


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_documented_command_exists_with_its_flags(command: DocumentedCommand) -> None:
    found = problems(command)
    assert not found, f"{command}: {'; '.join(found)}"


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_documented_command_is_run_by_a_test(command: DocumentedCommand) -> None:
    executed = {signature(c.words) for line in EXECUTED for c in commands_of(f"```bash\n{line}\n```", "EXECUTED")}
    if command.words[0] == "make":
        executed |= set(EXECUTED_BY_CI) | {"make test-all", "make format", "make clean", "make"}
    program = command.words[0]
    assert signature(command.words) in executed, (
        f"{command}: nothing runs {signature(command.words)!r}; add a {program} line to tests.support.commands.EXECUTED"
    )


def test_ci_runs_the_make_targets_that_count_as_run() -> None:
    text = (ROOT / ".ci" / "run").read_text()
    assert not [target for target in EXECUTED_BY_CI if not re.search(rf"{target}\b", text)]


def test_commands_are_found_in_fenced_bash_blocks_only() -> None:
    text = """Type `ernie-elastic nothing` or
```bash
make demo        # a comment
OMP_NUM_THREADS=1 torchrun --nproc_per_node=2 scripts/pretrain.py demo --training.steps 400
ernie-elastic generate compressed --prompt "a red circle" \\
    --to image --out=out.png && extract_submodel runs/demo --depth 6
ls runs; python scripts/bench/run.py --list
python -c 'print(1)'
```
```python
ernie-elastic no
```
"""
    found = commands_of(text, "x.md")
    assert [signature(c.words) for c in found] == [
        "make demo",
        "scripts/pretrain.py --training.steps",
        "ernie-elastic generate --out --prompt --to",
        "extract_submodel --depth",
        "scripts/bench/run.py --list",
    ]
    assert found[2].line == 5 and "a red circle" in found[2].words


@pytest.mark.parametrize(
    ("line", "fine"),
    [
        ("make coffee", False),
        ("make demo DEMO=smoke", True),
        ("python scripts/absent.py --x", False),
        ("ernie-elastic absent", False),
        ("ernie-elastic doctor", True),
        ("ernie-elastic doctor --no-such-flag", False),
        ("ernie-elastic --version", True),
        ("extract_submodel runs/demo --depth 6 --experts 8 --topk 1 --out submodel", True),
        ("extract_submodel runs/demo --depth six", False),
        ("torchrun --nproc_per_node=2 scripts/pretrain.py demo --training.steps 400", True),
        ("torchrun --nproc_per_node=2 scripts/pretrain.py demo --training.stepz 400", False),
    ],
)
def test_commands_that_cannot_run_are_problems(line: str, fine: bool) -> None:
    found = problems(commands_of(f"```bash\n{line}\n```", "x.md")[0])
    assert (not found) == fine, found
