"""Which implementation a call takes: native (C++, float32 on the CPU) or torch (everywhere else).

Letters: N tokens, H hidden, E experts, I width.
"""

from __future__ import annotations

import functools
import logging
from types import ModuleType
from typing import Literal

from torch import Tensor

from ernie_elastic.errors import ConfigError
from ernie_elastic.kernels.sorted_experts import cpu_impl, torch_impl

Backend = Literal["auto", "native", "torch"]
logger = logging.getLogger(__name__)


def available_backends() -> tuple[str, ...]:
    """The back ends that can run here: ("torch",) or ("native", "torch")."""
    return ("native", "torch") if cpu_impl.load().library is not None else ("torch",)


def backend_reason() -> str:
    """One line: which back end `auto` takes for float32 on the CPU, and why."""
    return f"sorted_experts: auto = {available_backends()[0]} ({cpu_impl.load().reason})"


@functools.cache
def _auto_is_native() -> bool:
    """What `auto` means for float32 on the CPU; resolved and logged once a process."""
    logger.info(backend_reason())
    return available_backends()[0] == "native"


def implementation(backend: str, hidden_NH: Tensor, gate_up_E2IH: Tensor, down_EHI: Tensor) -> ModuleType:
    """cpu_impl or torch_impl for hidden [N, H] and the projections.

    Raises ConfigError for an unknown back end or one that cannot run these tensors.
    """
    if backend == "torch":
        return torch_impl
    can_run = cpu_impl.fits(hidden_NH, gate_up_E2IH, down_EHI)
    if backend == "auto":
        return cpu_impl if can_run and _auto_is_native() else torch_impl
    if backend != "native":
        raise ConfigError(f"sorted_experts: backend {backend!r} is not known; choose auto, native or torch")
    if not can_run:
        raise ConfigError("sorted_experts: backend 'native' runs contiguous float32 on cpu; choose torch")
    if "native" not in available_backends():
        raise ConfigError(f"sorted_experts: backend 'native' cannot run here: {cpu_impl.load().reason}; choose torch")
    return cpu_impl
