"""Tokenizers on two ranks: bit-equal on both; codebooks and codec also equal to what one rank learns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed import tokenizer_worker
from tests.support.warm_ranks import launch

WORKER = Path(tokenizer_worker.__file__)


def run(out: Path, ranks: int, what: str) -> list[dict]:
    """What each rank of the worker wrote."""
    out.mkdir()
    done = launch(ranks, WORKER, str(out), what)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in range(ranks)]


@pytest.mark.distributed
def test_two_ranks_keep_equal_codebooks_and_equal_one_rank(tmp_path: Path) -> None:
    (single,) = run(tmp_path / "one", 1, "books")
    first, second = run(tmp_path / "two", 2, "books")
    assert first["restarted"] == second["restarted"] == single["restarted"] > 0, "restarts must occur"
    for name, value in single["state"].items():
        assert torch.equal(first["state"][name], second["state"][name]), name
        torch.testing.assert_close(first["state"][name], value, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_train_one_codec_and_nearly_that_of_one_rank(tmp_path: Path) -> None:
    (single,) = run(tmp_path / "one", 1, "codec")
    first, second = run(tmp_path / "two", 2, "codec")
    assert all(torch.equal(first["state"][name], value) for name, value in second["state"].items())
    flat = {
        key: torch.cat([value.double().flatten() for name, value in state.items() if "_QV" not in name])
        for key, state in (("one", single["state"]), ("two", first["state"]), ("start", single["start"]))
    }
    # Adam turns float noise of tiny gradients into steps of some weights, so single weights may differ.
    assert float((flat["two"] - flat["one"]).norm()) < 0.03 * float((flat["one"] - flat["start"]).norm())


@pytest.mark.distributed
@pytest.mark.parametrize("what", ["visual", "refiner"])
def test_two_ranks_keep_equal_weights(what: str, tmp_path: Path) -> None:
    first, second = (found["state"] for found in run(tmp_path / "two", 2, what))
    different = [name for name, value in first.items() if not torch.equal(second[name], value)]
    assert not different and len(first) > 10
