"""`--budget`: measure sub-models on packed data and take the best one that fits. ours: the report has no search."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ernie_elastic.elastic.extract import Request, extract_submodel, load_source, make_spec
from ernie_elastic.elastic.importance import measured_mass, packed_rows, stored_mass
from ernie_elastic.elastic.space import droppable_layers, evenly_spaced
from ernie_elastic.errors import ConfigError
from ernie_elastic.modeling import ErnieElasticForCausalLM
from ernie_elastic.modeling.losses import LOSSES, MODALITIES, modality_sums
from ernie_elastic.schema import PackedBatch, SubModelSpec
from ernie_elastic.stages import progress, say, write_json

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Point:
    """One measured sub-model: its spec, BF16 weight bytes and mean loss over the modalities."""

    spec: SubModelSpec
    weight_bytes: int
    loss: float


def parse_bytes(text: str) -> int:
    """Bytes of texts such as 4GiB, 900MB or 123456; ConfigError otherwise."""
    match = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in UNITS:
        raise ConfigError(f"--budget {text!r} is no size; write it like 4GiB, 900MB or 123456")
    return int(float(match[1]) * UNITS[match[2].upper()])


def spec_bytes(model: ErnieElasticForCausalLM, spec: SubModelSpec) -> int:
    """BF16 bytes of the weights that `spec` keeps."""
    total = 0
    for name, parameter in model.named_parameters():
        if not name.startswith("model.layers."):
            total += parameter.numel()
            continue
        number, rest = name.removeprefix("model.layers.").split(".", 1)
        if int(number) in spec.layers:
            sliced = rest.startswith(("mlp.experts.", "mlp.gate."))
            kept = len(spec.experts_per_layer[spec.layers.index(int(number))])
            total += parameter.numel() * kept // model.config.num_experts if sliced else parameter.numel()
    return 2 * total


def candidates(model: ErnieElasticForCausalLM, mass_LE: torch.Tensor, request: Request) -> list[SubModelSpec]:
    """A grid over depth and experts at the request's top-k."""
    config = model.config
    topk = request.topk or config.num_experts_per_tok
    smallest = config.num_hidden_layers - len(droppable_layers(config))
    depths = evenly_spaced(range(max(1, smallest), config.num_hidden_layers + 1), 4)
    experts = sorted({max(topk, config.num_experts * share // 4) for share in (1, 2, 3, 4)})
    return [
        make_spec(model, mass_LE, dataclasses.replace(request, depth=depth, experts=count))
        for depth in depths
        for count in experts
    ]


@torch.inference_mode()
def mean_loss(model: ErnieElasticForCausalLM, batches: list[PackedBatch], spec: SubModelSpec | None) -> float:
    """Mean over the modalities that occur of each one's mean loss."""
    sums, counts = torch.zeros(len(LOSSES), dtype=torch.float64), torch.zeros(len(LOSSES), dtype=torch.float64)
    for batch in batches:
        batch = batch.to(model.device)
        part, weight = modality_sums(model.forward_packed(batch, submodel=spec), batch)
        sums, counts = sums + part.double().cpu(), counts + weight.double().cpu()
    sums, counts = sums[: len(MODALITIES)], counts[: len(MODALITIES)]
    return float((sums / counts)[counts > 0].mean())


def extract_within_budget(
    source: Path | str | None, out: Path, budget: str, request: Request, data: Path | None, dtype: str, overwrite: bool
) -> dict[str, Any]:
    """Extract the measured best sub-model whose BF16 weights fit `budget`; writes pareto.json beside the weights.

    data: packed shards to measure on (default: `packed` of the run). Raises ConfigError when nothing fits.
    """
    limit = parse_bytes(budget)
    directory, model = load_source(source)
    packed = data or directory.parents[2] / "packed"
    if not packed.is_dir():
        raise ConfigError(f"--budget measures losses and needs data, but {packed} is not there; pass --data DIR")
    mass_LE = stored_mass(directory) if data is None else measured_mass(model, packed)
    specs = candidates(model, mass_LE, request)
    smallest = min(spec_bytes(model, spec) for spec in specs)
    fitting = [spec for spec in specs if spec_bytes(model, spec) <= limit]
    if not fitting:
        raise ConfigError(f"--budget {budget} is {limit} bytes; the smallest sub-model takes {smallest}")
    batches = packed_rows(packed, model, 32)
    points = [
        Point(spec, spec_bytes(model, spec), mean_loss(model, batches, spec))
        for spec in progress(specs, desc="budget search", unit="spec")
    ]
    best = min((point for point in points if point.weight_bytes <= limit), key=lambda point: point.loss)
    front = pareto(points)
    for point in front:
        mark = " <- chosen" if point == best else ""
        say(f"{point.spec.label():16}{point.weight_bytes:>14,} bytes  loss {point.loss:.4f}{mark}")
    table = extract_submodel(source, out, request, data, dtype, overwrite, spec=best.spec)
    write_json(
        out / "pareto.json",
        [
            {"spec": p.spec.to_json(), "label": p.spec.label(), "weight_bytes": p.weight_bytes, "loss": p.loss}
            for p in front
        ],
    )
    say(f"extract_submodel: wrote {out / 'pareto.json'}: the {len(front)} best of {len(points)} measured sub-models")
    return table


def pareto(points: list[Point]) -> list[Point]:
    """The points that no other one beats in both bytes and loss, by bytes."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.weight_bytes, p.loss)):
        if not front or point.loss < front[-1].loss:
            front.append(point)
    return front
