"""Run the command line up to its work, then end: `until_work.py MODULE:FUNCTION COMMAND [options]`.

FUNCTION is what does the command's work. In its place stands one that prints the names of all imported modules, as JSON
on one line, and ends the process at once. `startup.py` times this, tests/architecture reads the names. Exit code 3: the
command ended without having called FUNCTION.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

NEVER_CALLED = 3


def stop(*arguments: Any, **options: Any) -> NoReturn:
    """Print what is imported and end without any clean-up, which is no part of starting."""
    print(json.dumps(sorted(sys.modules)), flush=True)
    os._exit(0)


def run_until(target: str, arguments: list[str]) -> int:
    """Run `ernie-elastic ARGUMENTS` until it calls `target`, MODULE:FUNCTION; comes back only if it never does."""
    name, _, function = target.partition(":")
    original = getattr(importlib.import_module(name), function)
    from ernie_elastic import cli

    for module in [module for key, module in sys.modules.items() if key.startswith("ernie_elastic")]:
        for attribute in [key for key, value in vars(module).items() if value is original]:
            setattr(module, attribute, stop)
    code = cli.main(arguments)
    print(f"until_work: {arguments[0]} ended with {code} and never called {target}", file=sys.stderr)
    return NEVER_CALLED


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # this folder's files have everyday names
    sys.exit(run_until(sys.argv[1], sys.argv[2:]))
