"""Run a benchmark: `python scripts/bench/run.py NAME [--quick] [--json FILE]`; `--list` names them.

Prints a table (in brackets: ours relative to the peer, above 1 is better) and, with --json, writes
{"name", "hardware", "commit", "rows": [{"case", "ours", "theirs", "unit", "ratio"}]}. `common.py` says how to add one.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
# The folder itself must not be on the path: its files have everyday names. The package may be run without installing.
sys.path[:] = [str(HERE.parents[1]), str(HERE.parent)] + [
    entry for entry in sys.path if Path(entry or ".").resolve() != HERE
]

from bench import common  # noqa: E402
from ernie_elastic import stages  # noqa: E402
from ernie_elastic.errors import ConfigError  # noqa: E402

NOT_BENCHMARKS = {"__init__", "common", "gpu", "neural_tokenizers", "run", "training_runs", "until_work"}


def names() -> dict[str, str]:
    """Every benchmark and the first line of its docstring."""
    files = sorted(path for path in HERE.glob("*.py") if path.stem not in NOT_BENCHMARKS)
    return {path.stem: (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0] for path in files}


def run(name: str, quick: bool, json_path: Path | None, weights: Path | None = None) -> None:
    """Run one benchmark, print its table, write its JSON. ConfigError for a name that is not there.

    weights: a model directory to measure in place of seeded weights, for the benchmarks that take one.
    """
    known = names()
    if name not in known:
        raise ConfigError(f"benchmark {name!r} is not known; choose {', '.join(known)}")
    if json_path is not None and not json_path.parent.is_dir():
        raise ConfigError(f"--json {json_path}: {json_path.parent} is not a directory; make it first")
    benchmark = importlib.import_module(f"bench.{name}").run
    if weights is not None and "weights" not in inspect.signature(benchmark).parameters:
        raise ConfigError(f"benchmark {name!r} makes its own weights; leave out --weights")
    rows: list[common.Row] = benchmark(quick) if weights is None else benchmark(quick, weights=weights)
    found = common.report(name, rows)
    print(f"{name}: {known[name]}\n{found['hardware']}, commit {found['commit']}\n")
    print(common.table(rows))
    if json_path is not None:
        stages.write_json(json_path, found)
        print(f"\nwrote {json_path}")


def main() -> int:
    """Parse and run; 0, or 2 with one line on a user's error."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("name", nargs="?", help="which benchmark; see --list")
    parser.add_argument("--list", action="store_true", help="name the benchmarks")
    parser.add_argument("--quick", action="store_true", help="fewer cases and repeats, seconds instead of a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--weights", type=Path, metavar="DIR", help="a model directory to measure (codec)")
    arguments = parser.parse_args()
    if arguments.list:
        for name, line in names().items():
            print(f"{name:16} {line}")
        return 0
    if arguments.name is None:
        parser.error("name a benchmark, or ask for --list")
    return stages.run_command("bench", lambda: run(arguments.name, arguments.quick, arguments.json, arguments.weights))


if __name__ == "__main__":
    raise SystemExit(main())
