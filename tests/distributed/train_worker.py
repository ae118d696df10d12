"""Run under torchrun (or alone): trains a tiny model on random documents and writes losses and a weight checksum.

usage: train_worker.py OUT ENGINE ZERO_STAGE STEPS [OPTIMIZER [SEQUENCE_PARALLEL [POISONED_STEP]]]

At the poisoned step one gradient of the last rank is NaN; weights before and after it are compared.
"""

import json
import math
import os
import sys
from pathlib import Path

import torch

from ernie_elastic.data.grouping import build_document
from ernie_elastic.data.packing import collate
from ernie_elastic.elastic.sampler import sample_spec
from ernie_elastic.elastic.space import ElasticConfig
from ernie_elastic.modeling.generation import layout_of
from ernie_elastic.training.balance import RoutingLedger, routers, update_bias
from ernie_elastic.training.configuration import TrainingConfig
from ernie_elastic.training.engine import make_engine
from ernie_elastic.training.ranks import all_reduce_sum, rank, shut_down, world_size
from tests.modeling.common import DOCUMENTS, RICH, random_parts, tiny_model

ROWS = 8
NAMES = list(DOCUMENTS)


def rows_of(step, config, start, stop):
    layout = layout_of(config)
    return [
        [build_document(random_parts(NAMES[(step + row) % len(NAMES)], 100 * step + row, config), layout)]
        for row in range(start, stop)
    ]


def main() -> None:
    out, engine_name, stage, steps = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    optimizer = sys.argv[5] if len(sys.argv) > 5 else "adamw"
    torch.set_num_threads(1)
    sequence = int(sys.argv[6]) if len(sys.argv) > 6 else 1
    poisoned = int(sys.argv[7]) if len(sys.argv) > 7 else -1
    model = tiny_model(initializer_range=0.05, **RICH)
    training = TrainingConfig(
        rows_per_step=ROWS,
        engine=engine_name,
        zero_stage=stage,
        optimizer=optimizer,
        sequence_parallel=sequence,
        learning_rate=1e-2,
        weight_decay=0.1,
        step_limit_s=60,
    )
    elastic = ElasticConfig(full_depth=0.3, full_width=0.3, full_sparsity=0.3)
    engine = make_engine(model, training)
    ledger = RoutingLedger(model.config.num_hidden_layers, model.config.num_experts)
    share, reader = ROWS * sequence // world_size(), rank() // sequence
    losses, labels, norms = [], [], []
    for step in range(steps):
        rows = rows_of(step, model.config, reader * share, (reader + 1) * share)
        even = -(-max(len(document) for row in rows for document in row) // 2) * 2
        spec = sample_spec(elastic, model.config, 0, step)
        before = {name: p.detach().clone() for name, p in engine.model.named_parameters()}
        hook = None
        if step == poisoned and rank() == world_size() - 1:
            hook = engine.model.model.norm.weight.register_hook(lambda grad: grad * float("nan"))
        results, norm = engine.train_step([collate(rows, even)], spec, 1e-2)
        if hook is not None:
            hook.remove()
        if step == poisoned:
            same = all(torch.equal(before[name], p) for name, p in engine.model.named_parameters())
            assert same and not math.isfinite(norm), f"the poisoned step was applied, norm {norm}"
            continue
        for result in results:
            ledger.add(result.routing, result.layers)
        update_bias(engine.model, ledger.finish_step(all_reduce_sum, False), spec, 1e-3)
        sums = sum(result.sums for result in results)
        counts = sum(result.counts for result in results)
        losses.append((sums / counts.clamp(min=1e-6)).tolist())
        labels.append(spec.label())
        norms.append(norm)
    weights = {name: float(p.detach().double().pow(2).sum()) for name, p in engine.model.named_parameters()}
    bias = [gate.e_score_correction_bias.tolist() for gate in routers(engine.model).values()]
    if rank() == 0:
        out.write_text(
            json.dumps({"losses": losses, "norms": norms, "specs": labels, "weights": weights, "bias": bias})
        )
    shut_down()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
