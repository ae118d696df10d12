"""Which implementation a call takes: native (C++, float32 on the CPU), grouped (grouped products and Triton, BF16 on a
GPU) or torch (everywhere else).

Letters: N tokens, H hidden, E experts, I width.
"""

from __future__ import annotations

import functools
import logging
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from ernie_elastic.errors import ConfigError
from ernie_elastic.kernels.sorted_experts import cpu_impl, grouped_impl, torch_impl
from ernie_elastic.kernels.triton_backend import triton_problem

Backend = Literal["auto", "native", "grouped", "torch"]
logger = logging.getLogger(__name__)


def available_backends() -> tuple[str, ...]:
    """The back ends that can run here, of "native", "grouped" and "torch"; the last one always can."""
    native = cpu_impl.load().library is not None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    grouped = triton_problem(device) is None
    return (*(("native",) if native else ()), *(("grouped",) if grouped else ()), "torch")


def backend_reason() -> str:
    """One line: which back end `auto` takes for float32 on the CPU, and why."""
    chosen = "torch" if cpu_impl.load().library is None else "native"
    return f"sorted_experts: auto = {chosen} ({cpu_impl.load().reason})"


@functools.cache
def _auto_is_native() -> bool:
    """What `auto` means for float32 on the CPU; resolved and logged once a process."""
    logger.info(backend_reason())
    return cpu_impl.load().library is not None


@functools.cache
def _log_gpu_choice(chosen: str, reason: str) -> None:
    logger.info("sorted_experts: auto = %s on cuda (%s)", chosen, reason)


def _auto(hidden_NH: Tensor, gate_up_E2IH: Tensor, down_EHI: Tensor) -> ModuleType:
    if cpu_impl.fits(hidden_NH, gate_up_E2IH, down_EHI):
        return cpu_impl if _auto_is_native() else torch_impl
    if not hidden_NH.is_cuda:  # interpreted kernels are for tests
        return torch_impl
    problem = grouped_impl.problem(hidden_NH, gate_up_E2IH, down_EHI)
    _log_gpu_choice("torch" if problem else "grouped", problem or "BF16 on a CUDA device")
    return torch_impl if problem else _grouped(hidden_NH)


def _grouped(hidden_NH: Tensor) -> ModuleType:
    """grouped_impl, but for no tokens: a grouped product refuses empty tensors."""
    return grouped_impl if hidden_NH.shape[0] else torch_impl


def implementation(backend: str, hidden_NH: Tensor, gate_up_E2IH: Tensor, down_EHI: Tensor) -> ModuleType:
    """cpu_impl, grouped_impl or torch_impl for hidden [N, H] and the projections.

    Raises ConfigError for an unknown back end or one that cannot run these tensors.
    """
    tensors = (hidden_NH, gate_up_E2IH, down_EHI)
    if backend == "auto":
        return _auto(*tensors)
    if backend == "torch":
        return torch_impl
    if backend == "grouped":
        if problem := grouped_impl.problem(*tensors):
            raise ConfigError(f"sorted_experts: backend 'grouped' cannot run: {problem}; choose auto or torch")
        return _grouped(hidden_NH)
    if backend != "native":
        raise ConfigError(f"sorted_experts: backend {backend!r} is not known; choose auto, native, grouped or torch")
    if not cpu_impl.fits(*tensors):
        raise ConfigError("sorted_experts: backend 'native' runs contiguous float32 on cpu; choose torch")
    if cpu_impl.load().library is None:
        raise ConfigError(f"sorted_experts: backend 'native' cannot run here: {cpu_impl.load().reason}; choose torch")
    return cpu_impl
