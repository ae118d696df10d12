"""The pre-training loop: one elastic spec per step, all modalities in one run, metrics, checkpoints, resume."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ernie_elastic.data.loader import PackedLoader
from ernie_elastic.data.order import rows_of_step
from ernie_elastic.data.prepare import STAGE as PACKED_STAGE
from ernie_elastic.data.shards import PackedCorpus
from ernie_elastic.data.tokenise import Tokenizers
from ernie_elastic.elastic.sampler import sample_spec
from ernie_elastic.elastic.space import ElasticConfig, check_space
from ernie_elastic.errors import CheckpointError, ConfigError
from ernie_elastic.modeling import ErnieElasticConfig, ErnieElasticForCausalLM
from ernie_elastic.modeling.generation import layout_of
from ernie_elastic.modeling.loading import choose_experts_back_end
from ernie_elastic.modeling.losses import LOSSES
from ernie_elastic.schema import SubModelSpec
from ernie_elastic.stages import fingerprint, progress, read_manifest, say, to_jsonable, write_json
from ernie_elastic.training.balance import RoutingLedger, load_max_over_mean, routers, update_bias
from ernie_elastic.training.checkpoint import TrainerState, latest_checkpoint, load_checkpoint
from ernie_elastic.training.checkpoint_writer import CheckpointWriter
from ernie_elastic.training.configuration import TrainingConfig
from ernie_elastic.training.engine import Engine, MicroResult, make_engine, seed_everything
from ernie_elastic.training.guard import StepGuard
from ernie_elastic.training.losses import LossBalance
from ernie_elastic.training.metrics import MetricsWriter
from ernie_elastic.training.ranks import all_reduce_sum, barrier, rank, shut_down, world_size
from ernie_elastic.training.watch import RankWatch

log = logging.getLogger(__name__)
RUN_FILE = "run.json"


def pretrain(
    run_dir: Path,
    model_config: Callable[[Tokenizers], ErnieElasticConfig],
    training: TrainingConfig,
    elastic: ElasticConfig,
    tokenizers_dir: Path,
    packed_dir: Path,
    preset: str = "custom",
) -> Path:
    """Train (or go on with) the run in `run_dir`; every rank calls it. Returns the last checkpoint.

    model_config makes the model's config of the tokenizers. A run that exists resumes when its configuration is the
    same, up to the number of steps; otherwise ConfigError names the difference.
    """
    tokenizers = Tokenizers.load(tokenizers_dir)
    packed = read_manifest(packed_dir, (PACKED_STAGE,))
    config = model_config(tokenizers)
    check_space(config)
    resolved = {
        "preset": preset,
        "model": config.to_dict(),
        "training": training,
        "elastic": elastic,
        "packed": packed.fingerprint,
    }
    _check_same_run(run_dir, resolved)
    seed_everything(training.seed)
    model = ErnieElasticForCausalLM(config)
    choose_experts_back_end(model, training.experts)
    if training.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    watch = RankWatch(training.rank_limit_s)
    try:
        engine = make_engine(model, training)
        watch.start()
        checkpoint = _Run(run_dir, engine, training, elastic, tokenizers, packed_dir, resolved, watch).train(
            packed.config
        )
    except BaseException as error:
        # No barrier here: the other ranks are elsewhere, and a barrier would pair with one of theirs.
        failure = watch.fail(error)
        if failure is error:
            raise
        raise failure from error
    shut_down(watch.stop)
    return checkpoint


def _check_same_run(run_dir: Path, resolved: dict[str, Any]) -> None:
    path = run_dir / RUN_FILE
    new = _comparable(to_jsonable(resolved))
    if path.exists():
        import json

        old = _comparable(json.loads(path.read_text()))
        changed = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
        if changed:
            key = changed[0]
            raise ConfigError(
                f"{run_dir} was started with {key} = {old.get(key)!r}, now {new.get(key)!r}; choose another --run-dir, "
                "or remove the old run"
            )
    elif rank() == 0:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_json(path, {**resolved, "fingerprint": fingerprint(resolved)})


def _comparable(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flat dotted keys of what must not change between start and resume."""
    free = {
        "fingerprint",
        "training.steps",
        "training.checkpoint_every",
        "training.stop_after",
        "training.keep_checkpoints",
        "training.skip_limit",
        "training.log_every",
        "training.wandb",
        "training.step_limit_s",
        "training.rank_limit_s",
        "training.async_checkpoint",
        "model.transformers_version",
    }
    flat: dict[str, Any] = {}
    for key, item in value.items():
        name = f"{prefix}{key}"
        if name in free:
            continue
        if isinstance(item, dict):
            flat.update(_comparable(item, f"{name}."))
        else:
            flat[name] = item
    return flat


class _Run:
    """One run on one rank."""

    def __init__(
        self,
        run_dir: Path,
        engine: Engine,
        training: TrainingConfig,
        elastic: ElasticConfig,
        tokenizers: Tokenizers,
        packed_dir: Path,
        resolved: dict[str, Any],
        watch: RankWatch,
    ) -> None:
        self.run_dir, self.engine, self.training, self.elastic = run_dir, engine, training, elastic
        self.tokenizers, self.packed_dir, self.resolved, self.watch = tokenizers, packed_dir, resolved, watch
        self.config = engine.model.config
        self.ledger = RoutingLedger(self.config.num_hidden_layers, self.config.num_experts)
        self.balance = LossBalance(training.loss_weights, training.posterior)
        self.guard, self.num_rows = StepGuard(training.skip_limit), 0
        self.state = TrainerState(self.ledger, self.balance, self.guard)
        self.stall_s = 0.0
        self.checkpoints = CheckpointWriter(
            run_dir, tokenizers, resolved, training.keep_checkpoints, training.async_checkpoint
        )

    def train(self, packed_config: dict[str, Any]) -> Path:
        start, checkpoint = 0, latest_checkpoint(self.run_dir)
        if checkpoint is not None:
            start = load_checkpoint(checkpoint, self.engine, self.state)
            say(f"pretrain: going on from {checkpoint}")
        if start >= self.training.steps and checkpoint is not None:
            say(f"pretrain: {checkpoint} has all {self.training.steps} steps; nothing to do")
            return checkpoint
        self._print_setup()
        corpus = PackedCorpus(self.packed_dir)
        self.num_rows = corpus.num_rows
        loader = PackedLoader(
            corpus,
            layout_of(self.config),
            self.training.rows_per_step,
            int(packed_config["row_length"]),
            self.training.seed,
            self.training.augmentation,
            rank() // self.training.sequence_parallel,
            world_size() // self.training.sequence_parallel,
            self.training.micro_batches,
            self.training.active_bits,
        )
        writer = self._writer(start)
        if writer is not None:
            self.checkpoints.before_publishing = writer.sync
        stop = self.training.steps
        if self.training.stop_after:
            stop = min(stop, start + self.training.stop_after)
        try:
            with progress(total=self.training.steps, desc="pretrain", unit="step", initial=start) as bar:
                for step, batches in loader.steps(start, stop):
                    record = self.step(step, batches)
                    if writer is not None:
                        writer.write(record)
                    bar.set_postfix_str(_short(record), refresh=False)
                    bar.update()
                    done, every = step + 1, self.training.checkpoint_every
                    if done == stop or (every and done % every == 0):
                        checkpoint = self._save(done)
            self.checkpoints.wait()
        except BaseException:
            self.checkpoints.settle()
            raise
        finally:
            if writer is not None:
                writer.close()
        if checkpoint is None:
            raise CheckpointError(f"{self.run_dir}: no checkpoint was written in {self.training.steps} steps")
        say(f"pretrain: wrote {checkpoint}")
        return checkpoint

    def _writer(self, start: int) -> MetricsWriter | None:
        if rank() != 0:
            return None
        return MetricsWriter(self.run_dir / "metrics.jsonl", start, self.training.wandb, self.run_dir.name)

    def _save(self, step: int) -> Path:
        begun = time.perf_counter()
        self.watch.note(f"the checkpoint of step {step}")
        self.config.visual_active_bits = self.training.active_bits(step - 1)
        path = self.checkpoints.save(step, self.engine, self.state)
        self.stall_s = time.perf_counter() - begun
        return path

    def step(self, step: int, batches: list[Any]) -> dict[str, Any]:
        """One optimizer step and its record."""
        begun = time.perf_counter()
        self.watch.note(f"step {step}")
        spec = sample_spec(self.elastic, self.config, self.training.seed, step, self.training.steps)
        lr = self.training.learning_rate * self.training.schedule.factor(step, self.training.steps)
        weights = self.balance.vector()
        results, norm = self.engine.train_step(batches, spec, lr, weights)
        if not self.guard.applied(step, norm, self._rows_of):
            log.warning("step %d is skipped: its loss or gradient is not finite (%d so far)", step, self.guard.skipped)
            seconds = time.perf_counter() - begun
            return {
                "step": step,
                "skipped": True,
                "losses": {},
                "lr": lr,
                "spec": _spec_record(spec),
                "seconds": seconds,
            }
        for result in results:
            self.ledger.add(result.routing, result.layers)
        counts = self.ledger.finish_step(all_reduce_sum, spec == self.config.full_spec())
        update_bias(self.engine.model, counts, spec, self.training.bias_speed)
        here = sum(batch.num_positions for batch in batches) / self.training.sequence_parallel
        positions, failed = all_reduce_sum(torch.tensor([here, float(self.checkpoints.failed())])).tolist()
        if failed:
            self.checkpoints.wait()  # raises, on all ranks
        losses = _mean_losses(results)
        self.balance.observe(losses)
        record = self._record(step, spec, lr, norm, counts, positions, time.perf_counter() - begun)
        weighted = {name: losses[name] * float(weights[i]) for i, name in enumerate(LOSSES) if name in losses}
        return {"step": step, "loss": sum(weighted.values()), "losses": losses, "weighted_losses": weighted, **record}

    def _record(
        self,
        step: int,
        spec: SubModelSpec,
        lr: float,
        norm: float,
        counts: torch.Tensor,
        positions: float,
        seconds: float,
    ) -> dict[str, Any]:
        bias = torch.stack([gate.e_score_correction_bias for gate in routers(self.engine.model).values()])
        return {
            "lr": lr,
            "grad_norm": norm,
            "tokens_per_s": positions / seconds,
            "positions": int(positions),
            "seconds": seconds,
            "load_max_over_mean": load_max_over_mean(counts, spec),
            "dead_experts": int((counts[list(spec.layers)] == 0).sum()) if spec == self.config.full_spec() else None,
            "bias_range": float(bias.max() - bias.min()),
            "skipped_steps": self.guard.skipped,
            "spec": _spec_record(spec),
        }

    def _rows_of(self, step: int) -> list[int]:
        """The packed rows that all ranks read at a step."""
        draws = rows_of_step(self.training.seed, step, self.training.rows_per_step, self.num_rows)
        return [row for row, _ in draws]

    def _print_setup(self) -> None:
        parameters = sum(p.numel() for p in self.engine.model.parameters())
        elastic = self.elastic
        shares = f"{elastic.full_depth:.0%}/{elastic.full_width:.0%}/{elastic.full_sparsity:.0%}"
        say(
            f"pretrain: {self.run_dir} | engine {self.training.engine}, ZeRO {self.training.zero_stage}, "
            f"{self.training.optimizer}, {world_size()} rank(s) on {self.engine.device}, fp32 | "
            f"{parameters:,} parameters, {self.config.num_hidden_layers} layers, {self.config.num_experts} experts, "
            f"top-{self.config.num_experts_per_tok} | attention {self.config._attn_implementation}, experts "
            f"{self.config._experts_implementation} | elastic "
            + (
                f"full on {shares} of the steps (depth/width/sparsity) from step "
                f"{elastic.start_share * self.training.steps:.0f} on, layers {elastic.layer_policy}"
                if elastic.enabled
                else "off"
            )
        )


def _mean_losses(results: list[MicroResult]) -> dict[str, float]:
    """Mean loss of each kind that had targets, over all ranks and micro-batches."""
    sums = torch.stack([result.sums for result in results]).sum(0)
    counts = torch.stack([result.counts for result in results]).sum(0)
    return {name: float(sums[i] / counts[i]) for i, name in enumerate(LOSSES) if float(counts[i]) > 0}


def _spec_record(spec: SubModelSpec) -> dict[str, Any]:
    return {
        "label": spec.label(),
        "num_layers": len(spec.layers),
        "num_experts": spec.num_experts,
        "top_k": spec.top_k,
        "layers": list(spec.layers),
    }


def _short(record: dict[str, Any]) -> str:
    if record.get("skipped"):
        return f"step {record['step']} skipped: not finite"
    losses = " ".join(f"{name} {value:.3f}" for name, value in record["losses"].items())
    return f"{losses} | {record['spec']['label']} | {record['tokens_per_s']:.0f} tok/s"


__all__ = ["barrier", "pretrain"]
