"""The DeepSpeed engine, the only module of the package that imports it."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from typing_extensions import override

from ernie_elastic.errors import CheckpointError, ConfigError
from ernie_elastic.modeling import ErnieElasticForCausalLM
from ernie_elastic.modeling.sequence_parallel import SequenceShard
from ernie_elastic.schema import PackedBatch
from ernie_elastic.training.accumulation import Specs, accumulate_over, specs_of
from ernie_elastic.training.configuration import TrainingConfig
from ernie_elastic.training.engines.base import Engine, LossModule, MicroResult
from ernie_elastic.training.engines.deepspeed_json import deepspeed_config, own_clipping
from ernie_elastic.training.engines.expert_parallel import ExpertParallel
from ernie_elastic.training.engines.optimizers import make_optimizer, parameter_groups, set_learning_rate
from ernie_elastic.training.engines.state import saved_ranks, write_table
from ernie_elastic.training.ranks import barrier, device, rank, world_size

STATE_TAG = "state"
BUFFER_FILE = "buffers.pt"


class DeepSpeedEngine(Engine):
    """DeepSpeed under ZeRO 0 to 3, with the experts on all ranks or split over them (`ExpertParallel`)."""

    def __init__(self, model: ErnieElasticForCausalLM, training: TrainingConfig) -> None:
        deepspeed = _import_deepspeed()
        ranks = world_size()
        config = deepspeed_config(training, ranks)
        if not dist.is_initialized():
            _default_launcher_environment()
            backend = "nccl" if torch.cuda.is_available() else "gloo"
            deepspeed.init_distributed(
                dist_backend=backend, timeout=timedelta(seconds=training.step_limit_s), verbose=False
            )
        self._num_parameters = sum(p.numel() for p in model.parameters())
        self.experts = ExpertParallel(model, training, device()) if training.expert_parallel > 1 else None
        expert_shard = self.experts.shard if self.experts is not None else None
        shard, power = sequence_shard(training.sequence_parallel), training.loss_weights.text_length_power
        module = LossModule(model, ranks, shard, power, expert_shard)
        optimizer = _make_cpu_adam(model, training) if training.optimizer == "cpu_adam" else None
        optimizer = optimizer or make_optimizer(model, training)
        self.engine, self.optimizer, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
        self.engine.train()
        self.device, self.model, self.training = self.engine.device, model, training
        if self.experts is not None and self.engine.zero_optimization():
            _add_to_norm(self.engine.optimizer, self.experts)

    @override
    def train_step(
        self, batches: list[PackedBatch], spec: Specs, lr: float, weights: torch.Tensor | None = None
    ) -> tuple[list[MicroResult], float]:
        results = []
        weights = self.training.loss_weights.vector() if weights is None else weights
        set_learning_rate(self.engine.optimizer.param_groups, lr)
        norm, parts = 0.0, specs_of(spec, len(batches))
        accumulate_over(self.engine, len(batches))
        for number, batch in enumerate(batches, start=1):
            self.engine.set_gradient_accumulation_boundary(number == len(batches))
            loss, result = self.engine(batch.to(self.device), parts[number - 1], weights)
            self.engine.backward(loss)
            if self.experts is not None:
                self.experts.collect()
            if number == len(batches) and not self.engine.zero_optimization():
                norm = self._stage_0_norm()
            # The other stages leave such a step out themselves.
            unfit = number == len(batches) and not math.isfinite(norm)
            with _without_step(self.engine.optimizer) if unfit else contextlib.nullcontext():
                self.engine.step()
            results.append(result)
        norm = norm if norm else float(self.engine.get_global_grad_norm() or 0.0)
        if self.experts is not None:
            if math.isfinite(norm):
                self.experts.step(lr, norm, self.training.gradient_clip)
            self.experts.clear()
        return results, norm

    def _stage_0_norm(self) -> float:
        """Stage 0 clips in step() and keeps no norm; its gradients are averaged over the ranks by now."""
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.experts is not None:
            norm = self.experts.total_norm(norm)
        if own_clipping(self.training) and self.training.gradient_clip and torch.isfinite(norm):
            nn.utils.clip_grads_with_norm_(parameters, self.training.gradient_clip, norm)
        return float(norm)

    @override
    def save_state(self, directory: Path) -> None:
        self.engine.save_checkpoint(str(directory), tag=STATE_TAG)
        barrier()
        write_table(directory, self.training)
        if rank() == 0:
            torch.save(dict(self.model.named_buffers()), directory / BUFFER_FILE)
        if self.experts is not None:
            self.experts.save(directory)
        barrier()

    @override
    def load_state(self, directory: Path) -> None:
        ranks = saved_ranks(directory, self.training)
        if ranks == world_size() or not self.engine.zero_optimization():  # stage 0 shards nothing
            self._load(directory)
        else:
            with _universal(directory, self.engine), _own_options(self.optimizer.optimizer):
                self._load(_universal_folder(directory))
        # DeepSpeed's universal form has parameters alone.
        buffers = torch.load(directory / BUFFER_FILE, map_location=self.device, weights_only=True)
        _set_buffers(self.model, buffers, self.device)
        if self.experts is not None:
            self.experts.load(directory)

    def _load(self, directory: Path) -> None:
        path, _ = self.engine.load_checkpoint(str(directory), tag=STATE_TAG)
        if path is None:
            raise CheckpointError(f"DeepSpeed could not read {directory / STATE_TAG}; resume from another step")

    @override
    def full_state_dict(self) -> dict[str, torch.Tensor]:
        from deepspeed import zero

        state: dict[str, torch.Tensor] = {}
        copies: dict[int, torch.Tensor] = {}  # tied tensors stay one; every rank gathers equally often
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if id(tensor) not in copies:
                with zero.GatheredParameters([tensor], enabled=hasattr(tensor, "ds_id")):
                    copies[id(tensor)] = tensor.detach().to("cpu", copy=True) if rank() == 0 else tensor
            state[name] = copies[id(tensor)]
        if self.experts is not None:
            state.update(self.experts.whole())
        return state if rank() == 0 else {}

    @override
    def num_parameters(self) -> int:
        return self._num_parameters


def _set_buffers(model: nn.Module, buffers: dict[str, torch.Tensor], where: torch.device) -> None:
    """Put every buffer back with its own dtype."""
    for name, buffer in buffers.items():
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._buffers[leaf] = buffer.to(where)


def _add_to_norm(optimizer: Any, experts: ExpertParallel) -> None:
    """Let ZeRO clip by, and judge a step by, the norm of the whole model: the experts' is added to its own."""
    dense_norm = optimizer.scaled_global_norm

    def whole_norm(*arguments: Any, **options: Any) -> torch.Tensor:
        dense = torch.as_tensor(dense_norm(*arguments, **options))
        total = experts.total_norm(dense)
        return dense if dense < 0 else total  # below 0: ZeRO's word for a norm that is no number

    optimizer.scaled_global_norm = whole_norm


@contextlib.contextmanager
def _without_step(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """DeepSpeed's step counts and clears gradients as ever; the optimizer does nothing, not even weight decay."""
    step = optimizer.step
    optimizer.step = lambda *_, **__: None  # type: ignore[method-assign, assignment]
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad.zero_()
    try:
        yield
    finally:
        optimizer.step = step  # type: ignore[method-assign]


def _universal_folder(directory: Path) -> Path:
    """Where the universal form of a state is kept while it is read: beside its step, hidden."""
    step = directory.parent
    return step.parent / f".{step.name}.universal.tmp"


@contextlib.contextmanager
def _universal(directory: Path, engine: Any) -> Iterator[None]:
    """Rank 0 converts the state to DeepSpeed's universal form; inside the block the engine reads that form."""
    target = _universal_folder(directory)
    failure: list[str | None] = [None]
    if rank() == 0:
        shutil.rmtree(target, ignore_errors=True)
        # A process of its own: the converter forks workers, which must not inherit this process group.
        command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
        command += ["--input_folder", str(directory / STATE_TAG), "--output_folder", str(target / STATE_TAG)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            failure[0] = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
    if dist.is_initialized():
        dist.broadcast_object_list(failure, 0)
    if failure[0] is not None:
        raise CheckpointError(
            f"{directory}: DeepSpeed could not convert it to its universal form ({failure[0]}); resume on the number "
            "of ranks that wrote it"
        )
    engine._config.load_universal_checkpoint = True
    try:
        yield
    finally:
        engine._config.load_universal_checkpoint = False
        barrier()
        if rank() == 0:
            shutil.rmtree(target, ignore_errors=True)


@contextlib.contextmanager
def _own_options(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Keep each group's options and each tensor's step count its own while the universal form is read.

    Stage 3 gives every group the first one's options, weight decay too, and all tensors one shared step counter, which
    a step then raises once per tensor (DeepSpeed 0.19.8).
    """
    options = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    yield
    for group, own in zip(optimizer.param_groups, options, strict=True):
        group.update(own)
    for state in optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()


def _make_cpu_adam(model: nn.Module, training: TrainingConfig) -> torch.optim.Optimizer:
    """DeepSpeed's AdamW in C++, compiled at its first use. Raises ConfigError when that cannot be done."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    try:
        return DeepSpeedCPUAdam(
            parameter_groups(model, training),
            lr=training.learning_rate,
            betas=(training.beta1, training.beta2),
            adamw_mode=True,
        )
    except Exception as error:  # its builder raises what the compiler, ninja or the loader raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"training: DeepSpeed's CPU Adam is compiled at its first use, by a C++ compiler (g++) and ninja on PATH, "
            f"and this failed ({reason}); install them, or pass --training.optimizer adamw"
        ) from error


def sequence_shard(size: int) -> SequenceShard | None:
    """This rank's place in its group of `size` neighbouring ranks, exchanging through DeepSpeed-Ulysses' all-to-all;
    None for a size of 1. Every rank makes every group, as torch.distributed wants it."""
    if size == 1:
        return None
    from deepspeed.sequence.layer import _SeqAllToAll

    groups = [dist.new_group(list(range(start, start + size))) for start in range(0, world_size(), size)]
    group = groups[rank() // size]

    def all_to_all(x: torch.Tensor, scatter: int, gather: int) -> torch.Tensor:
        return _SeqAllToAll.apply(group, x, scatter, gather, 0)

    return SequenceShard(rank() % size, size, all_to_all)


def _default_launcher_environment() -> None:
    """Without a launcher: one process, on a port that is free, so that two runs on a machine do not meet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name, value in (
        ("RANK", "0"),
        ("LOCAL_RANK", "0"),
        ("WORLD_SIZE", "1"),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", str(port)),
    ):
        os.environ.setdefault(name, value)


def _import_deepspeed() -> Any:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError as error:
        raise ConfigError(
            f"training: DeepSpeed cannot be imported ({error}); install it or pass --training.engine torch"
        ) from error
    # Its shared-memory all-reduce is compiled at start (36 s, needs a compiler); gloo serves a CPU as well.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
