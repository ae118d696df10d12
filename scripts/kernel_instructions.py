"""Count what the GPU kernels execute per weight, without a GPU: `python scripts/kernel_instructions.py [--arch 90]`.

Every Triton kernel is compiled for each architecture and its machine code is read with the tools that come with
Triton. Counted is the main loop (the innermost one with matrix instructions; a kernel without one: all of it), divided
by the weights that a thread decodes in it. Beside the counts stands what a GPU of that architecture can execute per
weight while its memory delivers weights of that size at full speed, and the share of the memory bandwidth that the
counts therefore allow. It is a bound, not a prediction: it knows nothing of latency, banks or occupancy.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.pop("TRITON_INTERPRET", None)  # an interpreted kernel has no machine code; triton reads it when imported

import triton  # noqa: E402

from ernie_elastic import stages  # noqa: E402
from ernie_elastic.errors import ConfigError  # noqa: E402
from tests.kernels import compile_offline  # noqa: E402
from tests.kernels.compile_offline import Case  # noqa: E402

ARCHITECTURES = compile_offline.ARCHITECTURES
THREADS_OF_A_WARP = 32
# Lanes per multiprocessor and clock. Integer additions, shifts and logic run on 64 lanes, products on 64 of another
# pipe; both are charged to one pipe here, which is the cautious side. A multiprocessor issues 4 warps = 128 lanes.
INTEGER_LANES, ISSUE_LANES = 64, 128
KINDS = {
    "integer": "IADD LOP SHF SHL SHR PRMT ISETP SEL LEA IMNMX VIMNMX VIADD BMSK SGXT POPC FLO BREV IABS MOV P2R R2P "
    "PLOP3 VOTE I2I FSEL VABSDIFF BFI ISCADD",
    "multiply": "IMAD IMUL IDP",
    "float": "HADD HMUL HFMA FADD FMUL FFMA F2F I2F F2I FSETP HSETP MUFU FMNMX",
    "memory": "LD ST RED ATOM CCTL UBLKCP UTMA",
    "shuffle": "SHFL",
    "matrix": "HMMA HGMMA IMMA QGMMA OMMA UTCHMMA",
}
NAMES = {kind: tuple(names.split()) for kind, names in KINDS.items()}


def all_cases() -> list[Case]:
    """The kernels of the package that read weights."""
    return [case for case in compile_offline.cases() if case.weights_per_step]


@dataclass(frozen=True)
class Machine:
    """A GPU: its architecture, multiprocessors, usual clock in GHz and memory bandwidth in TB/s (makers' figures)."""

    name: str
    arch: int
    multiprocessors: int
    clock: float
    bandwidth: float

    def per_weight(self, lanes: int, bits: float) -> float:
        """Lane operations per weight of `bits` bits while the memory runs at full speed."""
        weights_per_second = self.bandwidth * 1e12 * 8 / bits
        return self.multiprocessors * lanes * self.clock * 1e9 / weights_per_second


MACHINES = (
    Machine("A100-80", 80, 108, 1.41, 2.039),
    Machine("L40S", 89, 142, 2.52, 0.864),
    Machine("RTX 4090", 89, 128, 2.52, 1.008),
    Machine("H100", 90, 132, 1.755, 3.35),
    Machine("H200", 90, 132, 1.755, 4.3),
    Machine("RTX 5090", 120, 170, 2.407, 1.792),
)


@dataclass(frozen=True)
class Count:
    """Instructions per weight of one kernel on one architecture; registers and spilled bytes of a thread."""

    kernel: str
    arch: int
    weights_per_thread: float
    per_weight: dict[str, float]
    ptx_integer: float
    registers: int
    spilled_bytes: int
    shared_bytes: int

    @property
    def integer(self) -> float:
        """Integer lane operations per weight, products included."""
        return self.per_weight["integer"] + self.per_weight["multiply"]

    @property
    def all(self) -> float:
        """Issue slots per weight."""
        return sum(self.per_weight.values())


def tool(name: str, *arguments: str) -> str:
    """Output of one of the tools that Triton brings. ConfigError when it is not there or fails."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.exists():
        raise ConfigError(f"{name} is not in {path.parent}; install a Triton wheel that brings it")
    done = subprocess.run([str(path), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"{name} failed: {done.stderr.strip()[-300:]}")
    return done.stdout


Line = tuple[str, str, str]  # label, opcode, what follows it; the label stands alone


def read_sass(text: str) -> list[Line]:
    """Labels and instructions of nvdisasm's output, in order. A uniform instruction keeps its leading U."""
    found: list[Line] = []
    for line in text.splitlines():
        label = re.match(r"\s*(\.L_\w+):", line)
        code = re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?);", line)
        if label:
            found.append((label[1], "", ""))
        elif code:
            found.append(("", code[1], code[2]))
    return found


def read_ptx(text: str) -> list[Line]:
    """Labels and instructions of PTX, in order."""
    found: list[Line] = []
    for line in text.splitlines():
        label = re.match(r"\s*(\$\w+):", line)
        code = re.match(r"\s*(?:\{\s*)?(?:@!?%\w+\s+)?([a-z][a-z0-9_.:]*)\s*(.*?);", line)
        if label:
            found.append((label[1], "", ""))
        elif code:
            found.append(("", code[1], code[2]))
    return found


def main_loop(lines: list[Line]) -> list[str]:
    """Opcodes of the innermost loop with matrix instructions; without one, of the whole kernel."""
    places = {label: k for k, (label, _, _) in enumerate(lines) if label}
    loops: list[tuple[int, int]] = []
    for k, (_, opcode, rest) in enumerate(lines):
        if opcode.upper().startswith("BRA"):
            target = re.search(r"(\.L_\w+|\$\w+)", rest)
            begin = places.get(target[1], k) if target else k
            if begin < k and any(is_matrix(op) for _, op, _ in lines[begin:k]):
                loops.append((begin, k))
    inner = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    begin, end = max(inner, key=lambda loop: loop[1] - loop[0], default=(0, len(lines) - 1))
    return [opcode for _, opcode, _ in lines[begin : end + 1] if opcode and not opcode.startswith("NOP")]


def is_matrix(opcode: str) -> bool:
    """Whether an opcode of SASS or PTX multiplies matrices."""
    return opcode.startswith(NAMES["matrix"]) or bool(re.match(r"(wgmma\.mma_async|mma)\b", opcode))


def classify(opcodes: Iterable[str]) -> Counter[str]:
    """How many SASS opcodes there are of each kind; uniform instructions cost an issue slot and are "other"."""
    found: Counter[str] = Counter()
    for opcode in opcodes:
        kind = next((kind for kind, names in NAMES.items() if opcode.startswith(names)), "other")
        found[kind] += 1
    return found


def ptx_integers(opcodes: Iterable[str]) -> int:
    """How many PTX opcodes are integer operations on a lane's registers."""
    operation = re.compile(r"(add|sub|mul|mad|shl|shr|and|or|xor|not|lop3|prmt|bfe|bfi|shf|selp|setp|min|max|popc)\b")
    number = re.compile(r"\.(?:[subl]?(?:16|32|64)|lo|hi|wide|pred)\b|prmt|selp|lop3|shf")
    return sum(bool(operation.match(op) and number.search(op)) and ".f" not in op for op in opcodes)


def count(case: Case, arch: int) -> Count:
    """Compile one kernel for one architecture and count. ConfigError when its loop cannot be told."""
    kernel = case.compile(arch)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(kernel.asm["cubin"])
        sass = main_loop(read_sass(tool("nvdisasm", "-c", str(file))))
        usage = tool("cuobjdump", "--dump-resource-usage", str(file))
    ptx = main_loop(read_ptx(kernel.asm["ptx"]))
    # The assembler may unroll the loop that the compiler wrote; the number of matrix instructions tells.
    turns = sum(map(is_matrix, sass)) / sum(map(is_matrix, ptx)) if any(map(is_matrix, ptx)) else 1.0
    if turns < 1 or turns != int(turns):
        raise ConfigError(f"{case.name} sm_{arch}: {turns} turns of PTX's loop in SASS's")
    weights = case.weights_per_step / (THREADS_OF_A_WARP * kernel.metadata.num_warps)
    kinds = classify(sass)
    figures = {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    return Count(
        case.name,
        arch,
        weights,
        {kind: kinds[kind] / weights / turns for kind in (*NAMES, "other")},
        ptx_integers(ptx) / weights,
        figures["REG"],
        figures["STACK"],
        kernel.metadata.shared,
    )


def allowed_share(found: Count, machine: Machine, bits: float) -> float:
    """Share of the memory bandwidth (0..1) at which the counted instructions keep up."""
    integer = machine.per_weight(INTEGER_LANES, bits) / found.integer if found.integer else 1.0
    return min(1.0, integer, machine.per_weight(ISSUE_LANES, bits) / found.all)


def table(counts: list[Count], bits: dict[str, float]) -> str:
    """Counts as aligned text, a line per kernel and GPU: per weight, the budget, and what it allows."""
    head = ["kernel", "arch", "w/thread", "integer", "ptx int", "memory", "all", "regs", "spill", "shared"]
    lines = [[*head, "GPU", "int budget", "issue budget", "bandwidth allowed"]]
    for found in counts:
        for machine in (machine for machine in MACHINES if machine.arch == found.arch):
            size = bits[found.kernel]
            figures = [found.integer, found.ptx_integer, found.per_weight["memory"], found.all]
            lines.append(
                [found.kernel, f"sm_{found.arch}", f"{found.weights_per_thread:g}", *(f"{x:.2f}" for x in figures)]
                + [str(found.registers), str(found.spilled_bytes), str(found.shared_bytes), machine.name]
                + [f"{machine.per_weight(lanes, size):.1f}" for lanes in (INTEGER_LANES, ISSUE_LANES)]
                + [f"{allowed_share(found, machine, size):.0%}"]
            )
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def run(kernels: list[str], architectures: list[int], json_path: Path | None) -> None:
    """Count, print the table, write the JSON. ConfigError for a kernel or an architecture that is not there."""
    cases = {case.name: case for case in all_cases()}
    unknown = sorted(set(kernels) - set(cases))
    if unknown:
        raise ConfigError(f"no kernel {', '.join(unknown)}; choose of {', '.join(cases)}")
    chosen = [cases[name] for name in kernels or cases]
    counts = [count(case, arch) for case in chosen for arch in architectures]
    print(f"Triton {triton.__version__}; all figures per weight, registers and bytes per thread, shared per block\n")
    print(table(counts, {case.name: case.bits_per_weight for case in chosen}))
    if json_path is not None:
        rows: list[dict[str, Any]] = [
            {**asdict(found), "integer": found.integer, "all": found.all}
            | {
                m.name: allowed_share(found, m, cases[found.kernel].bits_per_weight)
                for m in MACHINES
                if m.arch == found.arch
            }
            for found in counts
        ]
        stages.write_atomic(json_path, json.dumps({"triton": triton.__version__, "rows": rows}, indent=2) + "\n")
        print(f"\nwrote {json_path}")


def main() -> int:
    """Parse and run; 0, or 2 with one line on a user's error."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kernel", nargs="+", default=[], help="names of kernels (default: all)")
    parser.add_argument("--arch", nargs="+", type=int, default=list(ARCHITECTURES), choices=ARCHITECTURES)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts there")
    arguments = parser.parse_args()
    return stages.run_command("kernel_instructions", lambda: run(arguments.kernel, arguments.arch, arguments.json))


if __name__ == "__main__":
    raise SystemExit(main())
