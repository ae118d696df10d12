"""`routing`: run a model over packed rows, record which experts every token chose, and write the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ernie_elastic.analysis.trace import RoutingTrace, TraceHeader, save_trace
from ernie_elastic.elastic.importance import packed_rows
from ernie_elastic.errors import ConfigError
from ernie_elastic.generation.loading import load_model
from ernie_elastic.model_directories import resolve_model_dir
from ernie_elastic.modeling import ErnieElasticForCausalLM
from ernie_elastic.schema import TASKS
from ernie_elastic.stages import MANIFEST_NAME, progress, say


@torch.inference_mode()
def trace_packed(
    model: ErnieElasticForCausalLM, packed_dir: Path, num_rows: int, name: str, expert_limit: int = 65536
) -> RoutingTrace:
    """Teacher-forced routing of `num_rows` packed rows: ids [T, L, K] of every position that is not padding."""
    config = model.config
    if config.num_experts_per_tok_per_layer is not None:
        raise ConfigError(
            f"routing: layers of {name} use {config.num_experts_per_tok_per_layer} experts per token, a trace holds "
            "one number for all; cut a model with one of them by `extract_submodel --topk K` and look at that"
        )
    ids, tasks = [], []
    for batch in progress(packed_rows(packed_dir, model, num_rows), desc="routing", unit="batch"):
        output = model.forward_packed(batch.to(model.device))
        task_N = batch.task_BT.reshape(-1).numpy()
        valid_N = task_N >= 0
        layers = [decision.experts_NK.cpu().numpy()[valid_N] for decision in output.routing]
        ids.append(np.stack(layers, axis=1))
        tasks.append(task_N[valid_N])
    if config.num_experts > expert_limit:
        raise ConfigError(f"routing: {config.num_experts} experts do not fit the trace's {expert_limit}")
    header = TraceHeader(
        model=name,
        spec=config.full_spec().label(),
        num_experts=config.num_experts,
        top_k=config.num_experts_per_tok,
        layers=tuple(range(config.num_hidden_layers)),
        source=f"{num_rows} packed rows of {packed_dir}, teacher-forced",
    )
    dtype = np.uint8 if config.num_experts <= 256 else np.uint16
    return RoutingTrace(np.concatenate(ids).astype(dtype), np.concatenate(tasks).astype(np.int8), TASKS, header)


def run_routing(
    source: Path | None, out: Path, data: Path | None, num_rows: int, overwrite: bool = False
) -> dict[str, Any]:
    """Write the routing report of the model of `source`; returns what `analysis.report.write_report` returns.

    data: packed shards (default: `packed` of the run that the model came from). Raises ConfigError without any.
    """
    directory = resolve_model_dir(source)
    packed = data or find_packed(directory)
    model = load_model(directory)
    trace = trace_packed(
        model, packed, num_rows, directory.name if directory.name != "model" else str(directory.parent)
    )
    from ernie_elastic.analysis.report import write_report  # matplotlib, which only drawing needs

    written = write_report(trace, out, f"Routing of {directory}", parent=directory, overwrite=overwrite)
    save_trace(out / "trace.npz", trace)
    say(
        f"routing: {len(trace.task)} tokens; wrote {out / 'index.html'} with {len(written['figures'])} figures, "
        "statistics.json and trace.npz"
    )
    return written


def find_packed(directory: Path) -> Path:
    """The packed data of the run that a model directory came from, following parents; ConfigError when not found."""
    seen: list[Path] = []
    current: Path | None = directory
    while current is not None and current not in seen:
        seen.append(current)
        for base in (current, *current.absolute().parents[:3]):
            if (base / "packed" / MANIFEST_NAME).exists():
                return base / "packed"
        manifest = current / MANIFEST_NAME
        parent = json.loads(manifest.read_text()).get("parent") if manifest.exists() else None
        current = Path(parent["path"]) if parent else None
    raise ConfigError(f"routing: no packed data beside {directory}; pass --data DIR (made by prepare-data)")
