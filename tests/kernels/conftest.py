"""Kernel tests run on CUDA where there is a device, interpreted on the CPU elsewhere."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel module is imported: the decorator reads it


@pytest.fixture
def all_patterns() -> torch.Tensor:
    """All 65,536 BF16 words in numeric order, [65536]."""
    return torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)


@pytest.fixture
def device() -> torch.device:
    """Where Triton kernels run; skips the test when they cannot."""
    from ernie_elastic.kernels.triton_backend import triton_problem

    chosen = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    problem = triton_problem(chosen)
    if problem is not None:
        pytest.skip(problem)
    return chosen
