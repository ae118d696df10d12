"""The processes of one training: which one this is, sums over all, and the device that it works on."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

Value = TypeVar("Value")


def rank() -> int:
    """Rank of this process; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def device() -> torch.device:
    """The accelerator of this process, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over ranks of a tensor of any shape, in place; the tensor itself without a process group."""
    if dist.is_available() and dist.is_initialized():
        if tensor.device.type == "cpu" and dist.get_backend() == "nccl":  # NCCL takes what lies on its GPU alone
            tensor.copy_(all_reduce_sum(tensor.to(device())))
        else:
            dist.all_reduce(tensor)
    return tensor


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()


def from_rank0(make: Callable[[], Value]) -> Value:
    """What `make` returns on rank 0, on every rank; an error that it raises there is raised on all."""
    if not (dist.is_available() and dist.is_initialized()):
        return make()
    answer: list[Any] = [None, None]
    if rank() == 0:
        try:
            answer[0] = make()
        except Exception as error:
            answer[1] = error
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def start_group(limit_s: float) -> None:
    """Join the launcher's processes; nothing without a launcher, or when they are joined already.

    limit_s: seconds after which a rank that waits for another gives up.
    """
    if world_size() > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(seconds=limit_s))


def shut_down(when_all_are_done: Callable[[], None] = lambda: None) -> None:
    """Leave together: without the barrier one rank may end first and the launcher reports a failure."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        when_all_are_done()
        dist.destroy_process_group()


@contextlib.contextmanager
def group(limit_s: float = 600.0) -> Iterator[None]:
    """`start_group`, and `shut_down` when the block ends without an error."""
    start_group(limit_s)
    yield
    shut_down()


@torch.no_grad()
def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Mean of the gradients over ranks, in one exchange; a parameter without a gradient counts as zero.

    Nothing happens in a single process. Every rank must pass the same parameters.
    """
    if world_size() == 1:
        return
    owned = list(parameters)
    for parameter in owned:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in owned if parameter.grad is not None]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    all_reduce_sum(flat).div_(world_size())
    start = 0
    for gradient in gradients:
        gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
        start += gradient.numel()
