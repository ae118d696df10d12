"""`demo`: the whole pipeline on the embedded world; every stage is skipped when its output stands there already."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from ernie_elastic.compression import compress_directory, model_bytes
from ernie_elastic.compression.packed import set_kernel
from ernie_elastic.elastic.extract import Request, extract_submodel, parameter_counts
from ernie_elastic.elastic.importance import packed_rows
from ernie_elastic.errors import ErnieElasticError
from ernie_elastic.evaluation.media import write_results
from ernie_elastic.evaluation.speed import decode_tokens_per_s, resident_weight_bytes
from ernie_elastic.evaluation.tasks import EvaluationConfig, evaluate
from ernie_elastic.generation.loading import load_model, load_tokenizers
from ernie_elastic.kernels import zip_gemv
from ernie_elastic.model_directories import resolve_model_dir
from ernie_elastic.pipeline.demo.report import write_demo_report
from ernie_elastic.pipeline.pretrain import make_inputs
from ernie_elastic.pipeline.routing import run_routing
from ernie_elastic.presets import RunConfig, debug, demo
from ernie_elastic.stages import directory_hash, say, stage_output, write_json

EVALUATE_STAGE = "evaluate"


@dataclass(frozen=True)
class DemoSize:
    """How much a demo does: the run, and records per judged task."""

    run: RunConfig
    preset: str
    num_samples: int
    routing_rows: int


def demo_size(size: Literal["full", "smoke"], run_dir: Path | None, seed: int) -> DemoSize:
    """The demo's configuration at a size, with every seed set."""
    base = demo() if size == "full" else debug()
    run = dataclasses.replace(
        base,
        run_dir=run_dir or (base.run_dir if size == "full" else Path("runs/smoke")),
        tokenizers=dataclasses.replace(base.tokenizers, seed=seed),
        prepare=dataclasses.replace(base.prepare, seed=seed),
        training=dataclasses.replace(base.training, seed=seed),
    )
    return DemoSize(
        run, "demo" if size == "full" else "debug", 200 if size == "full" else 8, 64 if size == "full" else 16
    )


def run_demo(size: Literal["full", "smoke"], run_dir: Path | None, ranks: int, seed: int) -> Path:
    """Run every stage that is not done, then write summary.json and report.html; returns the run's directory."""
    sized = demo_size(size, run_dir, seed)
    root = sized.run.run_dir
    clock = _Clock(root / "seconds.json")
    clock.time("inputs", lambda: make_inputs(sized.run))
    clock.time("training", lambda: _train(sized, ranks))
    model_dir = resolve_model_dir(root)
    cuts = {
        "submodel-half": Request(
            experts=_half(sized.run.model.num_experts), topk=_half(sized.run.model.num_experts_per_tok)
        ),
        "submodel-shallow": Request(depth=sized.run.model.num_hidden_layers * 3 // 4),
    }
    for name, request in cuts.items():
        cut = partial(extract_submodel, model_dir, root / name, request, overwrite=True)
        clock.time(name, partial(_unless_made_from, root / name, model_dir, cut))
    half, compressed = root / "submodel-half", root / "compressed"
    squeeze = partial(compress_directory, half, compressed, overwrite=True)
    clock.time("compress", partial(_unless_made_from, compressed, half, squeeze))
    models = {
        "full": model_dir,
        "submodel-half": half,
        "submodel-shallow": root / "submodel-shallow",
        "compressed": compressed,
    }
    rows = [
        clock.time(f"evaluate {name}", partial(_evaluate, sized, name, directory)) for name, directory in models.items()
    ]
    rates = clock.time("decode speed", lambda: _decode_rates(models))
    rows = [{**row, "decode_tokens_per_s": round(rate, 1)} for row, rate in zip(rows, rates, strict=True)]
    equal = clock.time("bit equality", lambda: logits_bit_equal(half, compressed, root / "packed"))
    route = partial(run_routing, model_dir, root / "routing", root / "packed", sized.routing_rows, overwrite=True)
    clock.time("routing", partial(_unless_made_from, root / "routing", model_dir, route))
    write_json(root / "summary.json", {"rows": rows, "logits_bit_equal": equal, "seconds": clock.seconds})
    report = write_demo_report(root)
    _print_summary(root, rows, equal, clock.seconds, report)
    return root


class _Clock:
    """Seconds of every stage, kept over reruns: what is skipped keeps the time it once took, what was stopped and goes
    on counts both sessions."""

    def __init__(self, path: Path) -> None:
        self.path = path
        kept = json.loads(path.read_text()) if path.exists() else {}
        self.seconds: dict[str, float] = kept.get("seconds", {})
        self.unfinished: dict[str, float] = kept.get("unfinished", {})

    def time(self, name: str, work: Callable[[], Any]) -> Any:
        begun, done = time.perf_counter(), False
        try:
            result = work()
            done = True
        finally:
            took = time.perf_counter() - begun + self.unfinished.pop(name, 0.0)
            if done:
                self.seconds[name] = round(max(took, self.seconds.get(name, 0.0)), 1)
            else:
                self.unfinished[name] = round(took, 1)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, {"seconds": self.seconds, "unfinished": self.unfinished})
        return result


def _half(count: int) -> int:
    return max(1, count // 2)


def _unless_made_from(path: Path, parent: Path, make: Callable[[], Any]) -> None:
    """Make `path` unless it stands there as the child of exactly this parent."""
    manifest = path / "manifest.json"
    if manifest.exists():
        recorded = json.loads(manifest.read_text()).get("parent") or {}
        if recorded.get("sha256") == directory_hash(parent):
            say(f"{path} is there already")
            return
    make()


def _train(sized: DemoSize, ranks: int) -> None:
    """Training runs under torchrun with the same preset, as a user would start it."""
    run, training = sized.run, sized.run.training
    last = run.run_dir / "checkpoints" / f"step-{training.steps}" / "model" / "manifest.json"
    if last.exists():
        say(f"pretrain: {last.parent.parent} is there already")
        return
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc_per_node={ranks}",
        "--master_port=0",
        "--rdzv_backend=c10d",
        "--rdzv_endpoint=localhost:0",
        "-m",
        "ernie_elastic.cli",
        "pretrain",
        sized.preset,
        "--run-dir",
        str(run.run_dir),
        "--tokenizers.seed",
        str(run.tokenizers.seed),
        "--prepare.seed",
        str(run.prepare.seed),
        "--training.seed",
        str(training.seed),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    done = subprocess.run(command, env=environment, check=False)
    if done.returncode:
        raise ErnieElasticError(f"demo: training ended with exit code {done.returncode}; its message stands above")


def _evaluate(sized: DemoSize, name: str, directory: Path) -> dict[str, Any]:
    """The row of one model, from evaluation/NAME/row.json when it stands there for this very model."""
    out = sized.run.run_dir / "evaluation" / name
    row_path = out / "row.json"
    if row_path.exists():
        stored = json.loads(row_path.read_text())
        if stored["source"] == directory_hash(directory) and stored["num_samples"] == sized.num_samples:
            say(f"evaluate: {out} is there already")
            return stored["row"]
    tokenizers, model = load_tokenizers(directory), load_model(directory)
    results = evaluate(
        model, tokenizers, EvaluationConfig(num_samples=sized.num_samples, world=sized.run.prepare.world), name
    )
    total, active = parameter_counts_of(sized, name, model)
    out.parent.mkdir(parents=True, exist_ok=True)
    with stage_output(
        out, EVALUATE_STAGE, {"num_samples": sized.num_samples}, parent=directory, overwrite=True
    ) as temporary:
        table = write_results(results, temporary, name, tokenizers.audio.config.sample_rate)
        packed = f"zip_gemv {zip_gemv.available_backends()[0]}: decode for the scores, fused for the speed"
        kernel = packed if name == "compressed" else f"torch {str(model.dtype)[6:]}"
        row = {
            "model": name,
            "spec": model.config.full_spec().label(),
            "total_params": total,
            "active_params": active,
            "model_bytes": model_bytes(directory),
            "resident_weight_bytes": resident_weight_bytes(model),
            "kernel": kernel,
            "accuracy": table,
        }
        stored = {"row": row, "source": directory_hash(directory), "num_samples": sized.num_samples}
        write_json(temporary / "row.json", stored)
    return row


def _decode_rates(directories: dict[str, Path]) -> list[float]:
    """Text tokens per second of every model, measured in turns; the compressed one with its fused kernel."""
    models = {name: load_model(directory) for name, directory in directories.items()}
    set_kernel(models["compressed"], "fused")
    return decode_tokens_per_s(list(models.values()))


def parameter_counts_of(sized: DemoSize, name: str, model: Any) -> tuple[int, int]:
    """(total, active) parameters; a compressed model has those of the model that it was made from."""
    if name == "compressed":
        return parameter_counts(load_model(sized.run.run_dir / "submodel-half"))
    return parameter_counts(model)


@torch.inference_mode()
def logits_bit_equal(source: Path, compressed: Path, packed_dir: Path, num_rows: int = 8) -> bool:
    """True when both models, loaded anew with the loop back end, give the same bits for every logit of packed rows."""
    dense, packed = load_model(source, experts="eager"), load_model(compressed)
    for batch in packed_rows(packed_dir, dense, num_rows):
        ours, theirs = dense.forward_packed(batch), packed.forward_packed(batch)
        pairs = [
            (ours.text_logits_NV, theirs.text_logits_NV),
            (ours.bit_logits_ND, theirs.bit_logits_ND),
            (ours.hidden_BTH, theirs.hidden_BTH),
            *zip(ours.audio_logits, theirs.audio_logits, strict=True),
        ]
        if not all(torch.equal(a, b) for a, b in pairs):
            return False
    return True


def _print_summary(
    root: Path, rows: list[dict[str, Any]], equal: bool, seconds: dict[str, float], report: Path
) -> None:
    tasks = list(rows[0]["accuracy"])
    say("")
    say(f"{'':18}" + "".join(f"{row['model']:>18}" for row in rows))
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "spec": lambda row: str(row["spec"]),
        "parameters": lambda row: f"{row['total_params']:,}",
        "active": lambda row: f"{row['active_params']:,}",
        "model bytes": lambda row: f"{row['model_bytes']:,}",
        "resident bytes": lambda row: f"{row['resident_weight_bytes']:,}",
        "decode tokens/s": lambda row: f"{row['decode_tokens_per_s']:.0f}",
    }
    for name, show in columns.items():
        say(f"{name:18}" + "".join(f"{show(row):>18}" for row in rows))
    for task in tasks:
        cells = [row["accuracy"][task] for row in rows]
        say(
            f"{task:18}"
            + "".join(f"{cell['value']:>18.1%}" for cell in cells)
            + f"   chance {cells[0]['chance']:.1%}, n {cells[0]['n']}"
        )
    half, compressed = rows[1], rows[3]
    say("")
    say(
        f"compressed / its BF16 source: {compressed['model_bytes'] / half['model_bytes']:.3f} on disk, "
        f"{compressed['resident_weight_bytes'] / (2 * half['total_params']):.3f} resident; logits bit-equal: {equal}"
    )
    say(f"stages: {', '.join(f'{name} {value:.0f} s' for name, value in seconds.items())}")
    say(f"pictures, sounds and tables: {report}")
    say(f"routing: {root / 'routing' / 'index.html'}")
    say(f"numbers: {root / 'summary.json'}")
