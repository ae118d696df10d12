"""Run under a launcher (or alone): trains a tiny model on random documents and writes losses and all weights.

usage: train_worker.py OUT JOB, where JOB is JSON with the keys of `DEFAULTS`; OUT.json and OUT.pt are written.

Arguments that a launcher adds are ignored. At the poisoned step one gradient of the last rank is NaN; weights before
and after it are compared.
"""

import json
import math
import os
import sys
from pathlib import Path

import torch

from ernie_elastic.data.groups.grouping import build_document
from ernie_elastic.data.packed.packing import collate
from ernie_elastic.elastic.sampler import sample_spec
from ernie_elastic.elastic.space import ElasticConfig
from ernie_elastic.modeling.back_ends import choose_experts_back_end
from ernie_elastic.modeling.document_layout import layout_of
from ernie_elastic.training.balance import RoutingLedger, routers, update_bias
from ernie_elastic.training.checkpoints.checkpoint import TrainerState
from ernie_elastic.training.checkpoints.writer import CheckpointWriter
from ernie_elastic.training.configuration import TrainingConfig
from ernie_elastic.training.engines import deepspeed_engine as engine_deepspeed
from ernie_elastic.training.engines.choice import make_engine
from ernie_elastic.training.guards.skip import StepGuard
from ernie_elastic.training.losses import LossBalance, LossWeights, PosteriorWeights
from ernie_elastic.training.ranks import all_reduce_sum, rank, shut_down, world_size
from tests.modeling.common import DOCUMENTS, RICH, random_parts, tiny_model

ROWS = 8
NAMES = list(DOCUMENTS)
DEFAULTS: dict = {
    "training": {},  # of TrainingConfig
    "model": {},  # of the model's configuration
    "start": 0,
    "steps": 4,  # runs [start, steps)
    "poisoned": -1,
    "touch_unused": True,  # False: layers that a spec leaves out are not run at all, as plain DeepSpeed would have it
    "checkpointing": False,
    "load": "",  # folder of a state to go on from
    "save": "",  # folder that the state is written to
    "run_dir": "",  # folder of a run that gets a checkpoint at the end
    "lr": 1e-2,
}


def rows_of(step, config, start, stop):
    layout = layout_of(config)
    return [
        [build_document(random_parts(NAMES[(step + row) % len(NAMES)], 100 * step + row, config), layout)]
        for row in range(start, stop)
    ]


def partition_everything() -> None:
    """Stage 3 keeps tensors below a threshold whole; a tiny model would never be partitioned."""
    plain = engine_deepspeed.deepspeed_config

    def config(training, ranks):
        made = plain(training, ranks)
        if training.zero_stage == 3:
            made["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return made

    engine_deepspeed.deepspeed_config = config


class Trainer:
    """The part of the loop that engines see."""

    def __init__(self, job: dict) -> None:
        training = {"rows_per_step": ROWS, "learning_rate": 1e-2, "weight_decay": 0.1, "step_limit_s": 60}
        self.job, self.training = job, TrainingConfig(**{**training, **job["training"]})
        model = tiny_model(**{"initializer_range": 0.05, **RICH, **job["model"]})
        choose_experts_back_end(model, self.training.experts)
        if job["checkpointing"]:
            model.gradient_checkpointing_enable()
        if not job["touch_unused"]:
            model.model._touch_unused = lambda hidden, *_: hidden.new_zeros(())
        self.engine = make_engine(model, self.training)
        if job["load"]:
            self.engine.load_state(Path(job["load"]))
        self.config = model.config
        self.elastic = ElasticConfig(full_depth=0.3, full_width=0.3, full_sparsity=0.3)
        self.ledger = RoutingLedger(model.config.num_hidden_layers, model.config.num_experts)
        self.losses, self.labels, self.norms = [], [], []

    def step(self, step: int) -> None:
        sequence, micro = self.training.sequence_parallel, self.training.micro_batches
        share, reader = ROWS * sequence // world_size(), rank() // sequence
        rows = rows_of(step, self.config, reader * share, (reader + 1) * share)
        even = -(-max(len(document) for row in rows for document in row) // 2) * 2
        batches = [collate(rows[i * share // micro : (i + 1) * share // micro], even) for i in range(micro)]
        spec = sample_spec(self.elastic, self.config, 0, step)
        poisoned, hook = step == self.job["poisoned"], None
        before = self.engine.full_state_dict() if poisoned else {}
        before = {name: tensor.clone() for name, tensor in before.items()}
        if poisoned and rank() == world_size() - 1:
            hook = self.engine.model.model.norm.weight.register_hook(lambda grad: grad * float("nan"))
        results, norm = self.engine.train_step(batches, spec, self.job["lr"])
        if hook is not None:
            hook.remove()
        if poisoned:
            after = self.engine.full_state_dict()
            same = all(torch.equal(before[name], after[name]) for name in after)
            assert same and not math.isfinite(norm), f"the poisoned step was applied, norm {norm}"
            return
        for result in results:
            self.ledger.add(result.routing, result.layers)
        update_bias(self.engine.model, self.ledger.finish_step(all_reduce_sum, False), spec, 1e-3)
        sums = sum(result.sums for result in results)
        counts = sum(result.counts for result in results)
        self.losses.append((sums / counts.clamp(min=1e-6)).tolist())
        self.labels.append(spec.label())
        self.norms.append(norm)


def main() -> None:
    out, job = Path(sys.argv[1]), {**DEFAULTS, **json.loads(sys.argv[2])}
    assert set(job) == set(DEFAULTS), sorted(set(job) - set(DEFAULTS))
    torch.set_num_threads(1)
    partition_everything()
    trainer = Trainer(job)
    for step in range(job["start"], job["steps"]):
        trainer.step(step)
    if job["save"]:
        trainer.engine.save_state(Path(job["save"]))
    if job["run_dir"]:
        balance = LossBalance(LossWeights(), PosteriorWeights())
        state = TrainerState(trainer.ledger, balance, StepGuard(trainer.training.skip_limit))
        writer = CheckpointWriter(Path(job["run_dir"]), None, {}, keep=1)
        writer.save(job["steps"], trainer.engine, state)
        writer.wait()
    weights = trainer.engine.full_state_dict()
    bias = [gate.e_score_correction_bias.tolist() for gate in routers(trainer.engine.model).values()]
    if rank() == 0:
        torch.save(weights, out.with_suffix(".pt"))
        result = {"losses": trainer.losses, "norms": trainer.norms, "specs": trainer.labels, "bias": bias}
        out.with_suffix(".json").write_text(json.dumps({**result, "ranks": world_size()}))
    shut_down()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
