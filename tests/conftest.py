"""What holds for every test: seeds, one torch thread, no hub access, and how much stress is asked for.

`make test` runs sampled counts and leaves `slow` tests out. `--full` or STRESS=full (`make test-all`) runs everything:
more Hypothesis examples, larger `stress` counts, `slow` tests included. Tests marked `gpu` are skipped without a CUDA
device; the same files run with real dtypes where there is one.
"""

from __future__ import annotations

import os
import platform
import random
from pathlib import Path

# Both must be set before the package, transformers or triton are imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton's decorator reads it when a kernel module is imported

SEED = 0
FULL_MULTIPLIER = 20

hypothesis.settings.register_profile("sampled", max_examples=20, deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.register_profile("full", max_examples=400, deadline=None, derandomize=True, print_blob=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--full` is the flag form of STRESS=full."""
    parser.addoption("--full", action="store_true", default=False, help="full counts and slow tests (STRESS=full)")


def is_full(config: pytest.Config) -> bool:
    """True when full counts were asked for, by flag or by STRESS=full. STRESS may hold "full", "sampled" or nothing."""
    stress = os.environ.get("STRESS", "")
    if stress not in ("", "sampled", "full"):
        raise pytest.UsageError(f"STRESS is {stress!r}; it may be 'full', 'sampled' or unset")
    return bool(config.getoption("--full")) or stress == "full"


def pytest_configure(config: pytest.Config) -> None:
    """Choose the Hypothesis profile and keep torch to one thread per test process."""
    hypothesis.settings.load_profile("full" if is_full(config) else "sampled")
    torch.set_num_threads(1)


# What `make test CPU=...` sets, and what else caps the instructions of torch and its libraries.
CPU_SETTINGS = ("ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR", "ONEDNN_MAX_CPU_ISA", "ERNIE_ELASTIC_CPU")


def pytest_report_header() -> str:
    """The processor, what torch uses of it, and the settings that make it imitate another one."""
    imitated = [f"{name}={os.environ[name]}" for name in CPU_SETTINGS if os.environ.get(name)]
    capability = torch.backends.cpu.get_cpu_capability()
    header = f"processor: {processor_name()}, {os.cpu_count()} cores, torch runs {capability}"
    return f"{header}; imitating: {' '.join(imitated)}" if imitated else header


def processor_name() -> str:
    """The name that Linux knows, or whatever the platform says."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave slow tests out of a sampled run (unless `-m` or a test id asks for them), skip gpu tests without a GPU;
    long files come first, so that the processes of a run, which take files in turn, end together."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    asked_by_name = any("::" in argument for argument in config.args)
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow and not (is_full(config) or config.getoption("-m") or asked_by_name):
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]
    if not asked_by_name:
        items[:] = long_files_first(items)


def long_files_first(items: list[pytest.Item]) -> list[pytest.Item]:
    """Files with tests of several processes, then those with interpreted kernels, then those with more tests."""
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)

    def rank(tests: list[pytest.Item]) -> tuple[bool, bool, int]:
        marks = {mark.name for test in tests for mark in test.iter_markers()}
        return "distributed" not in marks, "interpreter" not in marks, -len(tests)

    return [test for tests in sorted(files.values(), key=rank) for test in tests]


@pytest.fixture(autouse=True)
def _seed_everything() -> None:
    """Each test starts from the same random state, whatever ran before it in its process."""
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)


@pytest.fixture(scope="session")
def stress(pytestconfig: pytest.Config) -> int:
    """Multiplier for the counts of loops: 1 in a sampled run, FULL_MULTIPLIER in a full one."""
    return FULL_MULTIPLIER if is_full(pytestconfig) else 1
