"""The `ernie-elastic` command: one subcommand per stage. Imports of torch wait until a subcommand runs.

Exit codes: 0 done, 2 a user's error (one line says what, where, both values and the fix), 130 Ctrl-C.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

# subcommand: (function in pipeline.commands, what it does)
COMMANDS = {
    "demo": ("demo", "the whole pipeline on the embedded world, ending with a table and a report"),
    "train-tokenizer": ("train_tokenizer", "train the text, visual or audio tokenizer, or the refiner"),
    "import-codec": ("import_codec", "make an audio tokenizer of a Mimi, EnCodec or DAC directory"),
    "prepare-data": ("prepare_data", "records to packed, tokenised shards"),
    "pretrain": ("pretrain", "train a preset (under torchrun: scripts/pretrain.py)"),
    "extract": ("extract", "cut a smaller model out of an elastic one"),
    "compress": ("compress", "compress a Hugging Face directory without loss"),
    "decompress": ("decompress", "restore the identical files"),
    "info": ("info", "what a compressed directory holds, per tensor"),
    "generate": ("generate", "text, an image, a video or a sound from a prompt"),
    "evaluate": ("evaluate", "score a model on held-out records"),
    "study": ("study", "what elastic training costs and gives: runs side by side, tables, a figure"),
    "routing": ("routing", "how experts are routed: figures, page, statistics"),
    "doctor": ("doctor", "what this machine can run, and why not"),
}


def usage() -> str:
    """The text of `ernie-elastic --help`."""
    lines = [f"  {name:16} {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: ernie-elastic COMMAND [options]",
            "",
            "Train one elastic multimodal mixture of experts, cut smaller ones out of it, compress them without loss.",
            "",
            *lines,
            "",
            "Options of a command: ernie-elastic COMMAND --help",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    if arguments[0] == "--version":
        from ernie_elastic import __version__

        print(__version__)
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        print(f"ernie-elastic: error: {name!r} is not a command; choose one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    return run(f"ernie-elastic {name}", COMMANDS[name][0], rest)


def extract_submodel() -> int:
    """Entry point of the `extract_submodel` script: the same as `ernie-elastic extract`."""
    return run("extract_submodel", "extract", sys.argv[1:])


def run(prog: str, function: str, arguments: Sequence[str]) -> int:
    """Parse the arguments of a command's function, then call it; returns the exit code."""
    from ernie_elastic.stages import run_command

    commands = importlib.import_module("ernie_elastic.pipeline.commands")
    return run_command(prog, lambda: parse(prog, getattr(commands, function), arguments)())


def parse(prog: str, function: Callable[..., Any], arguments: Sequence[str]) -> Callable[[], Any]:
    """The call that the arguments mean, not yet made. Raises ConfigError, in one line, for arguments that do not parse;
    `--help` prints and ends the process with 0. A function may bring a parser of its own as its attribute `parse`.
    """
    import tyro

    @functools.wraps(function)
    def deferred(*args: Any, **kwargs: Any) -> Callable[[], Any]:
        return lambda: function(*args, **kwargs)

    own = getattr(function, "parse", None)
    caught = io.StringIO()
    try:
        with contextlib.redirect_stderr(caught):
            if own is not None:
                return own(prog, list(arguments))
            return tyro.cli(deferred, prog=prog, args=list(arguments))
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise _complaint(prog, caught.getvalue()) from None


def _complaint(prog: str, box: str) -> Exception:
    from ernie_elastic.errors import ConfigError

    said = box.split("Argument helptext:")[0].split("For full helptext")[0]
    said = " ".join(re.sub(r"[^\x20-\x7e]", " ", re.sub(r"\x1b\[[0-9;]*m", "", said)).split())
    return ConfigError(f"{said or 'these arguments do not parse'} (all options: {prog} --help)")


if __name__ == "__main__":
    sys.exit(main())
