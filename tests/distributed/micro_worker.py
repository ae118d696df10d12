"""Run under torchrun (or alone): steps of 1, 3, 2 and 4 micro-batches, each with a sub-model of its own.

usage: micro_worker.py OUT ENGINE ZERO_STAGE
"""

import json
import os
import sys
from pathlib import Path

import torch

from ernie_elastic.data.packed.packing import collate
from ernie_elastic.elastic.sampler import sample_specs
from ernie_elastic.elastic.space import ElasticConfig
from ernie_elastic.training.accumulation import one_or_all
from ernie_elastic.training.balance import RoutingLedger, routers, update_bias
from ernie_elastic.training.configuration import TrainingConfig
from ernie_elastic.training.engines.choice import make_engine
from ernie_elastic.training.ranks import all_reduce_sum, rank, shut_down, world_size
from tests.distributed.train_worker import rows_of
from tests.modeling.common import RICH, tiny_model
from tests.support.steady import Margins, without_noise_steps

ROWS, COUNTS = 2, (1, 3, 2, 4, 1)


def main() -> None:
    out, engine_name, stage = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    torch.set_num_threads(1)
    model = tiny_model(initializer_range=0.05, **RICH)
    training = TrainingConfig(
        rows_per_step=ROWS, engine=engine_name, zero_stage=stage, learning_rate=1e-2, weight_decay=0.1, step_limit_s=60
    )
    elastic = ElasticConfig(full_depth=0.3, full_width=0.3, full_sparsity=0.3, per_micro_batch=True)
    engine = make_engine(model, training)
    without_noise_steps(engine)
    margins = Margins(engine.model)
    ledger = RoutingLedger(model.config.num_hidden_layers, model.config.num_experts)
    share = ROWS // world_size()
    losses, norms, labels, unit = [], [], [], 0
    for step, count in enumerate(COUNTS):
        batches = []
        for _ in range(count):
            batches.append(collate(rows_of(unit, model.config, rank() * share, (rank() + 1) * share), 256))
            unit += 1
        specs = sample_specs(elastic, model.config, 0, step, 0, count)
        results, norm = engine.train_step(batches, one_or_all(specs), 1e-2)
        for result, spec in zip(results, specs, strict=True):
            assert set(result.layers) <= set(spec.layers) and result.routing[0].experts_NK.shape[1] == spec.top_k
            ledger.add(result.routing, result.layers, spec == model.config.full_spec())
        update_bias(engine.model, ledger.finish_step(all_reduce_sum, False), specs, 1e-3)
        losses.append([(r.sums / r.counts.clamp(min=1e-6)).tolist() for r in results])
        norms.append(norm)
        labels.append([spec.label() for spec in specs])
    weights = {name: p.detach().double().tolist() for name, p in engine.model.named_parameters()}
    bias = [gate.e_score_correction_bias.tolist() for gate in routers(engine.model).values()]
    if rank() == 0:
        flat = [value for step in losses for value in step]
        flat_labels = [label for step in labels for label in step]
        result = {"losses": flat, "norms": norms, "specs": flat_labels, "weights": weights, "bias": bias}
        out.write_text(json.dumps({**result, "margin": margins.smallest}))
    shut_down()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
