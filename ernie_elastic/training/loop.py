"""The pre-training loop: one elastic spec per step, all modalities in one run, metrics, checkpoints, resume."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ernie_elastic.data.packed.loader import PackedLoader
from ernie_elastic.data.packed.mixture import MixtureConfig, PackedMixture, open_packed
from ernie_elastic.data.packed.shards import PackedCorpus
from ernie_elastic.data.prepare.tokenise import Tokenizers
from ernie_elastic.data.prepare.tokenizer_service import tokenizers_hash
from ernie_elastic.elastic.sampler import sample_specs
from ernie_elastic.elastic.space import ElasticConfig, check_space
from ernie_elastic.errors import TrainingError
from ernie_elastic.modeling import ErnieElasticConfig, ErnieElasticForCausalLM
from ernie_elastic.modeling.back_ends import choose_attention, choose_experts_back_end
from ernie_elastic.modeling.document_layout import layout_of
from ernie_elastic.modeling.losses import LOSSES
from ernie_elastic.modeling.positions import set_rope_base
from ernie_elastic.stages import progress, say
from ernie_elastic.training.accumulation import one_or_all
from ernie_elastic.training.balance import RoutingLedger, update_bias
from ernie_elastic.training.checkpoints.checkpoint import TrainerState, latest_checkpoint, load_checkpoint
from ernie_elastic.training.checkpoints.same_run import check_same_run, only_process
from ernie_elastic.training.checkpoints.writer import CheckpointWriter
from ernie_elastic.training.configuration import TrainingConfig
from ernie_elastic.training.curriculum import Curriculum, StepPlan
from ernie_elastic.training.engines.choice import Engine, make_engine, seed_everything
from ernie_elastic.training.feed import Feed
from ernie_elastic.training.flops import StepFlops, device_peak
from ernie_elastic.training.guards.skip import StepGuard
from ernie_elastic.training.guards.spikes import Rollback, Rollbacks, SpikeWatch
from ernie_elastic.training.guards.watch import RankWatch
from ernie_elastic.training.losses import LossBalance
from ernie_elastic.training.metrics import MetricsWriter
from ernie_elastic.training.ranks import all_reduce_sum, barrier, rank, shut_down, world_size
from ernie_elastic.training.record import (
    Clock,
    SpeedRecord,
    line_of,
    mean_losses,
    routing_record,
    setup_line,
    spec_record,
)

log = logging.getLogger(__name__)


def pretrain(
    run_dir: Path,
    model_config: Callable[[Tokenizers], ErnieElasticConfig],
    training: TrainingConfig,
    elastic: ElasticConfig,
    tokenizers_dir: Path,
    data: MixtureConfig,
    preset: str = "custom",
) -> Path:
    """Train (or go on with) the run in `run_dir`; every rank calls it. Returns the last checkpoint.

    model_config makes the model's config of the tokenizers. A run that exists resumes when its configuration is the
    same, up to the number of steps; otherwise ConfigError names the difference.
    """
    tokenizers = Tokenizers.load(tokenizers_dir)
    config = model_config(tokenizers)
    check_space(config)
    corpus, row_length, packed = open_packed(data, training.steps, tokenizers_hash(tokenizers_dir), layout_of(config))
    resolved = {
        "preset": preset,
        "model": config.to_dict(),
        "training": training,
        "elastic": elastic,
        "packed": [manifest.fingerprint for manifest in packed],
        "weights": [[weight for _, weight in data.sources], data.changes],
    }
    with only_process(run_dir, training.rank_limit_s * 4 / 3):
        check_same_run(run_dir, resolved)
        seed_everything(training.seed)
        model = ErnieElasticForCausalLM(config)
        choose_experts_back_end(model, training.experts)
        choose_attention(model, training.attention)
        if training.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        watch = RankWatch(training.rank_limit_s)
        try:
            engine = make_engine(model, training)
            watch.start()
            run = _Run(run_dir, engine, training, elastic, tokenizers, corpus, resolved, watch, row_length)
            checkpoint = run.train()
        except BaseException as error:
            # No barrier here: the other ranks are elsewhere, and a barrier would pair with one of theirs.
            failure = watch.fail(error)
            if world_size() == 1:
                shut_down()
            if failure is error:
                raise
            raise failure from error
        shut_down(watch.stop)
        return checkpoint


class _Run:
    """One run on one rank."""

    def __init__(
        self,
        run_dir: Path,
        engine: Engine,
        training: TrainingConfig,
        elastic: ElasticConfig,
        tokenizers: Tokenizers,
        corpus: PackedCorpus | PackedMixture,
        resolved: dict[str, Any],
        watch: RankWatch,
        row_length: int,
    ) -> None:
        self.run_dir, self.engine, self.training, self.elastic = run_dir, engine, training, elastic
        self.tokenizers, self.resolved = tokenizers, resolved
        self.watch, self.row_length = watch, row_length
        self.config, self.full = engine.model.config, engine.model.config.full_spec()
        self.ledger = RoutingLedger(self.config.num_hidden_layers, self.config.num_experts)
        self.balance = LossBalance(training.loss_weights, training.posterior)
        self.guard, self.spikes = StepGuard(training.skip_limit), SpikeWatch(training.spikes)
        self.state = TrainerState(self.ledger, self.balance, self.guard, self.spikes)
        self.rollbacks = Rollbacks(run_dir, training.spikes)
        self.curriculum = Curriculum(training.stages, training.steps, training.rows_per_step * row_length)
        mixed = bool(training.stages) and isinstance(corpus, PackedMixture)
        self.corpus = corpus.counted_by(self.curriculum.first_unit) if mixed else corpus  # type: ignore[union-attr]
        self.stall_s, self.peak = 0.0, device_peak(engine.device)
        self.speed = SpeedRecord(StepFlops(self.config, row_length), self.peak, training.steps)
        self.checkpoints = CheckpointWriter(
            run_dir, tokenizers, resolved, training.keep_checkpoints, training.async_checkpoint
        )

    def train(self) -> Path:
        start, checkpoint = 0, latest_checkpoint(self.run_dir)
        if checkpoint is not None:
            start = load_checkpoint(checkpoint, self.engine, self.state)
            say(f"pretrain: going on from {checkpoint}")
        if start >= self.training.steps and checkpoint is not None:
            say(f"pretrain: {checkpoint} has all {self.training.steps} steps; nothing to do")
            return checkpoint
        say(setup_line(self.run_dir, self.engine, self.training, self.elastic, self.peak))
        writer = self._writer(start)
        stop = self.training.steps
        if self.training.stop_after:
            stop = min(stop, start + self.training.stop_after)
        try:
            with progress(total=self.training.steps, desc="pretrain", unit="step", initial=start) as bar:
                while start < stop:
                    start = self._session(start, stop, writer, bar)
            self.checkpoints.wait()
        except BaseException:
            self.checkpoints.settle()
            raise
        finally:
            if writer is not None:
                writer.close()
        checkpoint = self.run_dir / "checkpoints" / f"step-{stop}"
        say(f"pretrain: wrote {checkpoint}")
        return checkpoint

    def _session(self, start: int, stop: int, writer: MetricsWriter | None, bar: Any) -> int:
        """Steps from `start` until `stop` or a rollback; returns the step to go on with."""
        every, log_every = self.training.checkpoint_every, self.training.log_every
        for step, batches, waited in Feed(self._loader(), self._units_of).steps(start, stop):
            record = self.step(step, batches, waited)
            if self.spikes.is_spike(record["losses"]):
                return self._roll_back(step, record, writer, bar)
            if writer is not None:
                writer.write(record)
                if log_every and (step % log_every == 0 or step + 1 == stop):
                    line = line_of(record, self.training.steps)
                    bar.write(line, file=sys.stdout) if sys.stderr.isatty() else say(line)
            bar.update()
            if step + 1 == stop or (every and (step + 1) % every == 0):
                self._save(step + 1)
        return stop

    def _loader(self) -> PackedLoader:
        training = self.training
        return PackedLoader(
            self.corpus,
            layout_of(self.config),
            training.rows_per_step,
            self.row_length,
            training.seed,
            training.augmentation,
            rank() // training.sequence_parallel,
            world_size() // training.sequence_parallel,
            training.micro_batches,
            training.active_bits,
        )

    def _plan(self, step: int) -> StepPlan:
        """What holds at a step: of its stage, or of the one configuration of a run without stages."""
        if self.training.stages:
            return self.curriculum.at(step)
        factor = self.training.schedule.factor(step, self.training.steps)
        return StepPlan("", range(step, step + 1), factor)

    def _units_of(self, step: int) -> range:
        units, shift = self._plan(step).units, self.rollbacks.shift(step)
        return range(units.start + shift, units.stop + shift)

    def _roll_back(self, step: int, record: dict[str, Any], writer: MetricsWriter | None, bar: Any) -> int:
        """Load the last checkpoint before a spike that ended at `step`, leave out the data since; returns its step."""
        self.checkpoints.wait()
        self.rollbacks.check(step)
        begin = step + 1 - self.training.spikes.steps
        checkpoint = latest_checkpoint(self.run_dir, at_most=begin)
        if checkpoint is None:
            raise TrainingError(
                f"training: the loss rose to more than {self.training.spikes.factor:g} times its median in steps "
                f"{begin} to {step}, and no checkpoint is older; pass a smaller --training.checkpoint-every"
            )
        back = load_checkpoint(checkpoint, self.engine, self.state)
        self.ledger.clear()
        skipped = self._units_of(step).stop - self._units_of(back).start
        # In this order: a kill in between meets the same spike again, and comes here again.
        self.checkpoints.go_back(back)
        self.rollbacks.add(Rollback(back, step, skipped), write=rank() == 0)
        barrier()
        note = {
            "step": back, "event": "rollback", "spike_step": step, "spike_losses": record["losses"],
            "skipped_rows": skipped * self.training.rows_per_step,
        }  # fmt: skip
        say(f"pretrain: a loss spike up to step {step}: back to {checkpoint}, {note['skipped_rows']} rows are left out")
        if writer is not None:
            writer.go_back(back)
            writer.write(note)
        bar.update(back - step)
        return back

    def _writer(self, start: int) -> MetricsWriter | None:
        if rank() != 0:
            return None
        training = self.training
        path = self.run_dir / "metrics.jsonl"
        writer = MetricsWriter(path, start, training.wandb, self.run_dir.name, training.tensorboard)
        self.checkpoints.before_publishing = writer.sync
        return writer

    def _save(self, step: int) -> None:
        begun = time.perf_counter()
        self.watch.note(f"the checkpoint of step {step}")
        self.config.visual_active_bits = self.training.active_bits(step - 1)
        self.checkpoints.save(step, self.engine, self.state)
        self.stall_s = time.perf_counter() - begun

    def step(self, step: int, batches: list[Any], waited: float = 0.0) -> dict[str, Any]:
        """One optimizer step and its record. waited: seconds that it waited for its data."""
        begun, training, plan = time.perf_counter(), self.training, self._plan(step)
        self.watch.note(f"step {step}")
        specs = sample_specs(self.elastic, self.config, training.seed, step, training.steps, len(batches))
        lr = training.learning_rate * plan.lr_factor
        weights = self.balance.vector()
        if plan.mtp_weight is not None:
            weights[LOSSES.index("mtp")] = plan.mtp_weight
        if plan.rope_theta is not None:
            set_rope_base(self.engine.model, plan.rope_theta)
        results, norm = self.engine.train_step(batches, one_or_all(specs), lr, weights)
        record: dict[str, Any] = {"step": step, "lr": lr, "spec": spec_record(specs, self.full)}
        if plan.stage:
            record |= {"stage": plan.stage, "units": len(plan.units)}
        if not self.guard.applied(step, norm, self._rows_of):
            log.warning("step %d is skipped: its loss or gradient is not finite (%d so far)", step, self.guard.skipped)
            return {**record, "skipped": True, "losses": {}, "seconds": time.perf_counter() - begun}
        for result, spec in zip(results, specs, strict=True):
            self.ledger.add(result.routing, result.layers, spec == self.full)
        counts = self.ledger.finish_step(all_reduce_sum, any(spec == self.full for spec in specs))
        speed = training.bias_speed if plan.bias_speed is None else plan.bias_speed
        update_bias(self.engine.model, counts, specs, speed)
        positions = self._positions(batches)
        losses = mean_losses(results)
        self.balance.observe(losses)
        weighted = {name: losses[name] * float(weights[i]) for i, name in enumerate(LOSSES) if name in losses}
        clock = Clock(time.perf_counter() - begun, waited, self.stall_s)
        self.stall_s = 0.0
        return {
            **record,
            "loss": sum(weighted.values()),
            "losses": losses,
            "weighted_losses": weighted,
            "grad_norm": norm,
            **routing_record(self.engine.model, counts, specs, self.full),
            "skipped_steps": self.guard.skipped,
            **self.speed.of(step, positions, specs, clock),
        }

    def _positions(self, batches: list[Any]) -> float:
        """Positions of a step over all ranks; the exchange also tells whether a rank could not write its checkpoint."""
        here = sum(batch.num_positions for batch in batches) / self.training.sequence_parallel
        positions, failed = all_reduce_sum(torch.tensor([here, float(self.checkpoints.failed())])).tolist()
        if failed:
            self.checkpoints.wait()  # raises, on all ranks
        return float(positions)

    def _rows_of(self, step: int) -> list[int]:
        """The packed rows that all ranks read at a step."""
        training, corpus = self.training, self.corpus
        return [
            row
            for unit in self._units_of(step)
            for row, _ in corpus.rows_of_step(training.seed, unit, training.rows_per_step)
        ]


__all__ = ["barrier", "pretrain"]
