"""The commands that README.md and docs/ show, and their signatures, so that tests can hold the two together.

A signature is what a smoke run must cover: the program, its subcommand and the flags, without their values:
`ernie-elastic compress --out`. `tests/pipeline` runs EXECUTED at smoke size; `tests/architecture` checks that every
documented signature is in it.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support import ROOT

PROGRAMS = ("ernie-elastic", "extract_submodel", "torchrun", "python", "make")
TARGET = re.compile(r"^([a-z][\w-]*):", re.MULTILINE)
# Make's targets run whole test suites or the whole demo: .ci/run is what executes these.
EXECUTED_BY_CI = ("make setup", "make check", "make test", "make demo")

# Each line is run, as written, by tests/pipeline in a folder that holds a smoke-size run. Add a line here when a
# document shows a command or a flag that is not covered yet.
EXECUTED: tuple[str, ...] = (
    "ernie-elastic --help",
    "ernie-elastic --version",
    "ernie-elastic doctor",
    "ernie-elastic train-tokenizer text --out tokenizers/text --size smoke",
    "ernie-elastic train-tokenizer visual --out tokenizers/visual --size smoke",
    "ernie-elastic train-tokenizer audio --out tokenizers/audio --size smoke",
    "ernie-elastic prepare-data --tokenizers tokenizers --out packed --num-records 300",
    "torchrun --nproc_per_node=2 scripts/pretrain.py debug --training.steps 16 --training.stop-after 10",
    "torchrun --nproc_per_node=2 scripts/pretrain.py debug --training.steps 16",
    "torchrun --nproc_per_node=2 scripts/pretrain.py debug --training.steps 16 --run-dir runs/whole "
    "--tokenizers-dir runs/debug/tokenizers --packed-dir runs/debug/packed",
    "extract_submodel runs/debug --depth 6 --experts 4 --topk 1 --out submodel",
    "extract_submodel --experts 5 --topk 2 --data runs/debug/packed --out submodel-measured",
    "extract_submodel runs/debug --budget 350KiB --out submodel-fitting",
    "extract_submodel runs/debug --drop-modality audio --depth 3 --out submodel-silent",
    "ernie-elastic compress submodel --out compressed",
    "ernie-elastic compress submodel --out stored --for storage",
    "ernie-elastic info compressed",
    "ernie-elastic decompress compressed --out restored",
    'ernie-elastic generate compressed --prompt "a large red circle in the centre" --to image --out picture.png',
    'ernie-elastic generate compressed --image picture.png --prompt "what shape is it ?"',
    "ernie-elastic generate compressed --image picture.png",
    'ernie-elastic generate submodel --prompt "a small blue square moves left" --to video --out video.gif',
    "ernie-elastic generate submodel --video strip.png",
    'ernie-elastic generate runs/debug --prompt "play c e g" --to audio --out sound.wav',
    "ernie-elastic generate runs/debug --audio phrase.wav",
    "ernie-elastic evaluate compressed --out evaluation --num-samples 4",
    "ernie-elastic routing compressed --data runs/debug/packed --out report",
    "python scripts/real_inputs.py inputs --parts photographs text",
    "ernie-elastic train-tokenizer text --data inputs/text --out neural/text --training.vocab-size 600",
    "ernie-elastic train-tokenizer visual --data inputs/photographs --out neural/visual --held-out-share 0.25 "
    "--model.image-size 32 --model.stride 8 --model.num-bits 6 --model.bit-series 3 6 --model.width 4 --model.stem 4 "
    "--model.multipliers 1 2 --training.steps 3 --training.batch-size 5 --training.learning-rate 2e-3",
    "ernie-elastic train-tokenizer audio --data world --out neural/audio --model.sample-rate 16000 "
    "--model.strides 2 4 4 5 8 --model.width 4 --model.max-width 16 --model.codebook-size 8 --model.num-levels 2 "
    "--model.decay 0.9 --training.steps 3 --training.batch-size 4 --training.crop-seconds 0.32 "
    "--training.learning-rate 1e-3 --training.guide-weight 3 --training.commitment-weight 0.1",
    "torchrun --nproc_per_node=2 scripts/train_tokenizer.py audio --data world --out neural/audio-2 "
    "--model.sample-rate 16000 --model.strides 2 4 4 5 8 --model.width 2 --training.steps 2",
    "ernie-elastic train-tokenizer refiner --data inputs/photographs --out refiner --held-out-share 0.25 "
    "--health-items 1 --training.steps 2",
    "ernie-elastic train-tokenizer refiner --data world --out refiner-world --training.tokenizer tokenizers/visual "
    "--training.crop 96 --health-size 96 --health-items 2 --training.steps 2 "
    "--training.degradation.undegraded-share 1",
    'ernie-elastic generate runs/debug --prompt "a red circle" --to image --out large.png --refine refiner',
    "ernie-elastic import-codec mimi --out codec --num-levels 2",
    "ernie-elastic prepare-data --tokenizers tokenizers --out packed-dropout --num-records 40 --text-dropout 0.1",
    "ernie-elastic prepare-data --tokenizers tokenizers --data inputs/photographs --out packed-photographs "
    "--row-length 1024",
    "ernie-elastic prepare-data --tokenizers tokenizers --data inputs/text --out packed-text --row-length 1024",
    "torchrun --nproc_per_node=2 scripts/pretrain.py debug --run-dir runs/mixture --tokenizers-dir tokenizers "
    "--data.sources packed-text 2 packed-photographs 1 --data.changes 0.5 1 4 --training.steps 4",
    "python scripts/demo_seeds.py runs/demo runs/demo-1 runs/demo-2",
    "ernie-elastic study elastic --size smoke --out study --seeds 1 --workers 1 --steps 4 "
    "--arms fixed sparsity --tokenizers tokenizers",
    "python scripts/bench/run.py --list",
    "python scripts/bench/run.py codec --quick --json codec.json",
    "python scripts/kernel_instructions.py --kernel zip_gemm_b16 --arch 90",
)


@dataclass(frozen=True)
class DocumentedCommand:
    """One command line of a fenced bash block: where it stands and its words."""

    file: str
    line: int
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {shlex.join(self.words)}"


def documents() -> list[Path]:
    """README.md, CONTRIBUTING.md and the pages of docs/."""
    return [
        path
        for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]
        if path.exists()
    ]


def bash_lines(text: str) -> Iterator[tuple[int, str]]:
    """(line number, command line) of every fenced bash/sh/shell block, continuation lines joined."""
    inside, pending, start = False, "", 0
    for number, line in enumerate(text.splitlines(), 1):
        fence = re.match(r"\s*(`{3,}|~{3,})\s*(\w*)", line)
        if fence:
            inside, pending = (not inside) and fence.group(2) in ("bash", "sh", "shell", "console"), ""
        elif inside:
            start = start if pending else number
            pending += line.strip().removeprefix("$ ")
            if pending.endswith("\\"):
                pending = pending[:-1]
            else:
                yield start, pending
                pending = ""


def commands_of(text: str, file: str) -> list[DocumentedCommand]:
    """The commands of one document that start with one of PROGRAMS; variables set before them are left out.

    `a && b` and `a | b` count as two commands, `# ...` is a comment, `python` counts when it runs a file of scripts/.
    """
    found = []
    for number, line in bash_lines(text):
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
        lexer.whitespace_split, lexer.commenters = True, "#"
        words: list[str] = []
        for word in [*lexer, ";"]:
            if not set(word) <= set("&|;"):
                words.append(word)
                continue
            while words and re.fullmatch(r"[A-Z_][A-Z0-9_]*=.*", words[0]):
                words = words[1:]
            program = Path(words[0]).name if words else ""
            program = "python" if program in ("python3", "python3.11") else program
            if program in PROGRAMS and (program != "python" or any(w.startswith("scripts/") for w in words)):
                found.append(DocumentedCommand(file, number, (program, *words[1:])))
            words = []
    return found


def documented_commands() -> list[DocumentedCommand]:
    """Every command that the documents show."""
    return [
        c for path in documents() for c in commands_of(path.read_text(encoding="utf-8"), str(path.relative_to(ROOT)))
    ]


def program_and_arguments(words: tuple[str, ...]) -> tuple[tuple[str, ...], list[str]]:
    """Split words into what is started and what it is given.

    ("torchrun", "--nproc_per_node=2", "scripts/pretrain.py", "demo", "--x") gives (("scripts/pretrain.py",),
    ["demo", "--x"]); ("ernie-elastic", "compress", "x") gives (("ernie-elastic", "compress"), ["x"]).
    """
    if words[0] in ("torchrun", "python"):
        at = next((i for i, word in enumerate(words) if word.startswith("scripts/")), None)
        if at is None:
            raise ValueError(f"{shlex.join(words)}: no file of scripts/ in it")
        return (words[at],), list(words[at + 1 :])
    if words[0] == "ernie-elastic" and len(words) > 1 and not words[1].startswith("-"):
        return words[:2], list(words[2:])
    return words[:1], list(words[1:])


def flags_of(arguments: list[str]) -> list[str]:
    """The long and short flags among the arguments, without values."""
    return [word.split("=", 1)[0] for word in arguments if re.match(r"--?[A-Za-z]", word)]


def signature(words: tuple[str, ...]) -> str:
    """`program subcommand --flags`, flags sorted, values left out. For make: the target alone."""
    started, arguments = program_and_arguments(words)
    if words[0] == "make":
        targets = [word for word in arguments if "=" not in word and not word.startswith("-")]
        return " ".join(["make", *targets])
    return " ".join([*started, *sorted(set(flags_of(arguments)))])


def make_targets() -> set[str]:
    """Targets that the Makefile defines."""
    return set(TARGET.findall((ROOT / "Makefile").read_text()))
