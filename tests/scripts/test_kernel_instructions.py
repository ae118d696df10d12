"""kernel_instructions: the loop that it counts, the kinds of instructions, the budgets, and one kernel as a whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

pytest.importorskip("triton")
SCRIPT = ROOT / "scripts" / "kernel_instructions.py"
# Two loops: an outer one and, in it, the one with the matrix instructions; then a loop without them.
SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;
.L_x_1:
        /*0020*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/                   LOP3.LUT R4, R4, 0x80, RZ, 0xc0, !PT ;
        /*0040*/                   IMAD.WIDE R6, R4, 0x4, R2 ;
        /*0050*/                   UIADD3 UR4, UR4, 0x1, URZ ;
        /*0060*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0070*/                   NOP;
        /*0080*/               @P1 BRA `(.L_x_1) ;
        /*0090*/               @P2 BRA `(.L_x_0) ;
.L_x_2:
        /*00a0*/                   IADD3 R2, R2, 0x1, RZ ;
        /*00b0*/                   IADD3 R2, R2, 0x1, RZ ;
        /*00c0*/                   BRA `(.L_x_2);
"""
PTX = """
$L__BB0_2:
    ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd1];
    @%p1 prmt.b32 %r5, %r1, %r2, 0x5410;
    and.b32 %r6, %r5, 127;
    setp.lt.s32 %p2, %r6, 3;
    add.rn.f32 %f1, %f2, %f3;
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1}, {%r1}, {%r2}, {%f1};
    @%p3 bra $L__BB0_2;
"""
# Run in a process of its own: the module needs Triton without its interpreter.
PROBE = """
import json, sys
sys.path.insert(0, "scripts")
import kernel_instructions as k
sass, ptx = sys.stdin.read().split("=====")
inner = k.main_loop(k.read_sass(sass))
loop = k.main_loop(k.read_ptx(ptx))
without = k.main_loop(k.read_sass(sass.replace("HMMA", "LOP3")))
budget = {m.name: [m.per_weight(lanes, 11.34) for lanes in (64, 128)] for m in k.MACHINES}
count = k.Count("x", 90, 8, {"integer": 4.0, "multiply": 6.0, "memory": 1.0}, 0, 0, 0, 0)
fast = k.Count("x", 90, 8, {"integer": 1.0, "multiply": 0.0, "memory": 1.0}, 0, 0, 0, 0)
h200 = next(m for m in k.MACHINES if m.name == "H200")
shares = [k.allowed_share(c, h200, 11.34) for c in (count, fast)]
print(json.dumps([inner, dict(k.classify(inner)), k.ptx_integers(loop), len(without), budget, shares]))
"""


def test_loop_kinds_and_budgets() -> None:
    variables = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", PROBE], input=f"{SASS}====={PTX}", cwd=ROOT, env=variables,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    inner, kinds, integers, without, budget, shares = json.loads(done.stdout)
    assert [opcode.partition(".")[0] for opcode in inner] == ["LDG", "LOP3", "IMAD", "UIADD3", "HMMA", "BRA"]
    assert kinds == {"memory": 1, "integer": 1, "multiply": 1, "matrix": 1, "other": 2}
    assert integers == 3 and without == 12
    for name, expected in {"H200": 4.9, "H100": 6.3, "A100-80": 6.8, "RTX 5090": 20.7, "RTX 4090": 29.0}.items():
        assert budget[name][0] == pytest.approx(expected, abs=0.06) and budget[name][1] == 2 * budget[name][0]
    assert shares == [pytest.approx(0.489, abs=0.002), 1.0]


def test_one_kernel_is_compiled_and_counted(tmp_path: Path) -> None:
    file = tmp_path / "counts.json"
    command = [sys.executable, str(SCRIPT), "--kernel", "tbe_decode", "--arch", "90", "--json", str(file)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(file.read_text())["rows"]
    assert (row["kernel"], row["arch"]) == ("tbe_decode", 90)
    assert 0 < row["integer"] < row["all"] and 16 <= row["registers"] <= 255 and row["spilled_bytes"] >= 0
    assert 0 < row["H200"] <= row["H100"] <= 1
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("tbe_decode")]
    assert [line[10] for line in lines] == ["H100", "H200"] and lines[0][3] == f"{row['integer']:.2f}"


def test_an_unknown_kernel_is_one_line() -> None:
    command = [sys.executable, str(SCRIPT), "--kernel", "no_such"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("kernel_instructions: error: no kernel no_such; choose of tbe_dec")
