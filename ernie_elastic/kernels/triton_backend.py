"""Which tensors Triton kernels can run on, decided in one place without importing triton before it is needed.

Contract: `auto` takes triton for CUDA tensors only (the interpreter is for tests); the choice and its reason are
logged once per operation and device type.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
from collections.abc import Callable
from typing import Any

import torch

from ernie_elastic.errors import ConfigError

logger = logging.getLogger(__name__)


def interpreting() -> bool:
    """True when Triton kernels that are imported from now on are interpreted on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "") in ("1", "true", "on", "yes")


def triton_problem(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on tensors of `device`; None when they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cuda" or (device.type == "cpu" and interpreting()):
        return None
    return f"the tensors are on {device.type}, triton needs cuda (or TRITON_INTERPRET=1, for tests)"


@functools.cache
def _log_choice(operation: str, device_type: str, choice: str, reason: str) -> None:
    logger.info("%s: auto = %s on %s (%s)", operation, choice, device_type, reason)


def use_triton(backend: str, operation: str, device: torch.device) -> bool:
    """Whether `operation` runs its Triton kernel. ConfigError for an unknown back end or one that cannot run."""
    if backend not in ("auto", "triton", "reference"):
        raise ConfigError(f"{operation}: backend {backend!r} is not known; choose auto, triton or reference")
    problem = triton_problem(device)
    if backend == "triton" and problem is not None:
        raise ConfigError(f"{operation}: backend 'triton' cannot run: {problem}; choose reference")
    if backend == "auto":
        chosen = problem is None and device.type == "cuda"
        reason = "a CUDA device" if chosen else problem or "interpreted kernels are for tests"
        _log_choice(operation, device.type, "triton" if chosen else "reference", reason)
        return chosen
    return backend == "triton"


def launches_kernels(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Make a function run with the device of its first argument (a tensor of any shape, or packed weights) as the
    current one: Triton launches on the current device, wherever the arguments lie."""

    @functools.wraps(function)
    def on_the_device(first: Any, *rest: Any, **named: Any) -> torch.Tensor:
        device = first.device if isinstance(first, torch.Tensor) else first.low.device
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            return function(first, *rest, **named)

    return on_the_device
