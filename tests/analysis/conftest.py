"""A synthetic routing with known structure: groups of tasks that prefer groups of experts."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import pytest

from ernie_elastic.analysis.trace import RoutingTrace, TraceHeader

SEVEN_TASKS = (
    "text",
    "image_understanding",
    "video_understanding",
    "image_generation",
    "video_generation",
    "audio_understanding",
    "audio_generation",
)
# Share of each task's preference that goes to each of four expert families, and how sharp it is.
FAMILY = np.array(
    [
        [0.6, 0.1, 0.1, 0.2],
        [0.1, 0.9, 0.0, 0.0],
        [0.1, 0.9, 0.0, 0.0],
        [0.0, 0.1, 0.9, 0.0],
        [0.0, 0.0, 1.0, 0.0],
        [0.3, 0.1, 0.0, 0.6],
        [0.2, 0.0, 0.1, 0.7],
    ]
)
SHARPNESS = np.array([1.0, 2.0, 2.0, 4.0, 4.0, 3.0, 3.5])


def synthetic_trace(
    experts: int = 16,
    top_k: int = 2,
    layers: int = 8,
    tokens: int = 200,
    seed: int = 0,
    weights: bool = False,
    names: tuple[str, ...] = SEVEN_TASKS,
) -> RoutingTrace:
    """Top-k of Gumbel noise plus task preferences: `tokens` of each task, shuffled, some padding at the end."""
    rng = np.random.default_rng(seed)
    task = np.repeat(np.arange(len(names)), tokens)
    rng.shuffle(task)
    task = np.concatenate([task, np.full(5, -1)]).astype(np.int8)
    family = np.arange(experts) % 4
    bias_LME = np.stack(
        [
            FAMILY[: len(names)][:, family] * SHARPNESS[: len(names), None]
            + 0.5 * rng.standard_normal((len(names), experts))
            for _ in range(layers)
        ]
    )
    scores_TLE = bias_LME[:, task].transpose(1, 0, 2) + rng.gumbel(size=(len(task), layers, experts))
    ids = np.argsort(-scores_TLE, axis=-1)[..., :top_k].astype(np.uint8 if experts <= 256 else np.uint16)
    header = TraceHeader("synthetic", f"d{layers}-e{experts}-k{top_k}", experts, top_k, tuple(range(layers)), "a test")
    return RoutingTrace(
        ids,
        task,
        names,
        header,
        phase=(np.arange(len(task)) % 2).astype(np.uint8),
        weights=rng.random(ids.shape).astype(np.float16) if weights else None,
    )


@pytest.fixture(scope="session")
def make_trace() -> Callable[..., RoutingTrace]:
    return synthetic_trace


@pytest.fixture(autouse=True)
def no_runtime_warnings():
    """Dividing by zero tokens must be handled, not warned about."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield
