"""Residual codebooks: nearest codes, gradients straight through, moving averages, start and restart."""

from __future__ import annotations

import pytest
import torch

from ernie_elastic.errors import ConfigError
from ernie_elastic.tokenizers.audio.residual_codebooks import (  # fmt: skip
    CodebookConfig,
    ResidualCodebooks,
    draw_active,
    draw_rows,
    nearest,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def started(latent_NSC: torch.Tensor, **changes: object) -> ResidualCodebooks:
    fields = {"width": latent_NSC.shape[2], "num_levels": 3, "codebook_size": 16, **changes}
    books = ResidualCodebooks(CodebookConfig(**fields))
    books.initialise(latent_NSC, generator())
    return books


def test_codes_are_nearest_and_residual() -> None:
    latent = torch.randn(4, 20, 8)
    books = started(latent)
    found = books.quantise(latent)
    rest = latent
    for level in range(3):
        code = torch.cdist(rest.flatten(0, 1), books.codebooks_QVD[level]).argmin(dim=1).view(4, 20)
        assert torch.equal(found.codes[:, :, level], code)
        rest = rest - books.codebooks_QVD[level][code]
    torch.testing.assert_close(found.features, latent - rest)
    torch.testing.assert_close(books.decode(found.codes[0]), found.features[0])
    assert torch.equal(books.encode(latent[0]), found.codes[0])
    errors = [float((books.decode(found.codes[0, :, :n]) - latent[0]).square().mean()) for n in (1, 2, 3)]
    assert errors[0] > errors[1] > errors[2]


def test_the_lowest_of_equally_near_codes_wins() -> None:
    codebook = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, -1.0], [0.0, 1.0]])
    assert nearest(torch.zeros(1, 5, 2), codebook).tolist() == [[1] * 5]
    assert nearest(torch.tensor([[[0.0, 0.9]]]), codebook).item() == 1


def test_the_semantic_level_stands_beside_the_stack() -> None:
    latent = torch.randn(4, 20, 8)
    books = started(latent, split_semantic=True)
    found = books.quantise(latent)
    code = torch.cdist(latent.flatten(0, 1), books.codebooks_QVD[1]).argmin(dim=1).view(4, 20)
    assert torch.equal(found.codes[:, :, 1], code)  # level 1 reads the latent itself, not what level 0 left
    before = found.codes[:, :, 1:].clone()
    books.codebooks_QVD[0] += 5.0
    assert torch.equal(books.quantise(latent).codes[:, :, 1:], before)
    assert torch.equal(
        books.quantise(latent).semantic, books.codebooks_QVD[0][books.quantise(latent).codes[:, :, 0]]
    ) or (
        torch.allclose(
            books.quantise(latent).semantic, books.codebooks_QVD[0][books.quantise(latent).codes[:, :, 0]], atol=1e-5
        )
    )


@pytest.mark.parametrize(
    "changes", [{}, {"split_semantic": True}, {"code_dim": 4}, {"code_dim": 4, "split_semantic": True}]
)
def test_gradients_pass_straight_through(changes: dict) -> None:
    latent = torch.randn(4, 20, 8)
    books = started(latent, **changes)
    latent.requires_grad_()
    found = books.quantise(latent)
    weights = torch.randn_like(found.features)
    (found.features * weights).sum().backward()
    assert latent.grad is not None
    if not changes:
        torch.testing.assert_close(latent.grad, weights)  # exactly once, whatever the number of levels
    else:
        assert float(latent.grad.abs().min()) > 0
        assert all(p.grad is not None and float(p.grad.abs().max()) > 0 for p in books.parameters())
    (gradient,) = torch.autograd.grad(books.quantise(latent).commitment, latent)
    assert float(gradient.abs().max()) > 0


def test_fewer_active_levels_are_left_out_of_features_and_commitment() -> None:
    latent = torch.randn(3, 20, 8)
    books = started(latent)
    whole, some = books.quantise(latent), books.quantise(latent, torch.tensor([1, 2, 3]))
    assert torch.equal(whole.codes, some.codes)
    for index in range(3):
        torch.testing.assert_close(some.features[index], books.decode(whole.codes[index, :, : index + 1]))
    distances = [
        (whole.vectors[level].view(3, 20, 8)[n] - books.codebooks_QVD[level][whole.codes[n, :, level]]).square().mean()
        for n in range(3) for level in range(n + 1)
    ]  # fmt: skip
    torch.testing.assert_close(some.commitment, torch.stack(distances).mean())


def test_moving_averages_follow_the_formula() -> None:
    latent = torch.randn(5, 30, 8)
    books = started(latent, num_levels=2, decay=0.9, restart_below=0.0)
    counts, sums = books.counts_QV.clone(), books.sums_QVD.clone()
    batch = torch.randn(5, 30, 8) + 0.3
    found = books.quantise(batch)
    statistics = books.learn(found, generator())
    rest = batch.flatten(0, 1)
    for level in range(2):
        onehot = torch.nn.functional.one_hot(found.codes[:, :, level].flatten(), 16).float()
        new_counts = 0.9 * counts[level] + 0.1 * onehot.sum(dim=0)
        new_sums = 0.9 * sums[level] + 0.1 * onehot.T @ rest
        torch.testing.assert_close(books.counts_QV[level], new_counts)
        torch.testing.assert_close(books.codebooks_QVD[level], new_sums / new_counts[:, None], atol=1e-5, rtol=1e-4)
        share = onehot.mean(dim=0)
        entropy = -(share[share > 0] * share[share > 0].log()).sum()
        assert statistics["perplexity"][level] == pytest.approx(float(entropy.exp()), rel=1e-4)
        assert statistics["used_share"][level] == pytest.approx(float((share > 0).float().mean()))
        rest = found.vectors[level + 1] if level == 0 else rest
    assert statistics["restarted"] == [0.0, 0.0]


def test_a_code_that_nobody_chooses_keeps_its_place() -> None:
    latent = torch.randn(2, 30, 8)
    books = started(latent, num_levels=1, restart_below=0.0)
    before = books.codebooks_QVD.clone()
    far = before[0, 3].expand(1, 10, 8).clone()
    books.learn(books.quantise(far), generator())
    others = [index for index in range(16) if index != int(books.quantise(far).codes[0, 0, 0])]
    torch.testing.assert_close(books.codebooks_QVD[0, others], before[0, others])


def test_restart_brings_usage_up_after_a_planted_collapse() -> None:
    def usage(restart_below: float) -> float:
        latent = torch.randn(8, 50, 8)
        books = started(latent, num_levels=1, codebook_size=32, restart_below=restart_below, decay=0.8)
        books.codebooks_QVD += 1e3  # all codes but one are far from every vector
        books.codebooks_QVD[0, 5] = 0.0
        books.counts_QV.fill_(400 / 32)
        books.sums_QVD.copy_(books.codebooks_QVD * books.counts_QV[..., None])
        assert books.learn(books.quantise(latent), generator())["used_share"] == [1 / 32]
        for step in range(40):
            statistics = books.learn(books.quantise(torch.randn(8, 50, 8)), generator(step))
        return statistics["used_share"][0]

    assert usage(0.1) > 0.9
    assert usage(0.0) < 0.1  # without restarts the collapse stays


def test_fewer_vectors_than_codes_start_and_fill_up() -> None:
    books = started(torch.randn(1, 10, 8), num_levels=2, codebook_size=64)
    assert bool(torch.isfinite(books.codebooks_QVD).all()) and bool(books.started)
    assert len(torch.unique(books.codebooks_QVD[0], dim=0)) == 64
    for step in range(30):
        statistics = books.learn(books.quantise(torch.randn(4, 50, 8)), generator(step))
    assert min(statistics["used_share"]) > 0.6


def test_equal_vectors_are_borne() -> None:
    latent = torch.ones(2, 10, 8)
    books = started(latent)
    books.learn(books.quantise(latent), generator())
    assert bool(torch.isfinite(books.codebooks_QVD).all())
    torch.testing.assert_close(books.quantise(latent).features, latent)


def test_start_and_restart_are_functions_of_the_generator() -> None:
    latent = torch.randn(2, 50, 8)
    first, second = started(latent), started(latent)
    assert torch.equal(first.codebooks_QVD, second.codebooks_QVD)
    other = ResidualCodebooks(first.config)
    other.initialise(latent, generator(1))
    assert not torch.equal(first.codebooks_QVD, other.codebooks_QVD)


def test_drawn_rows_repeat_only_when_they_must() -> None:
    rows = torch.arange(6.0)[:, None]
    assert sorted(draw_rows(rows, 6, generator()).flatten().tolist()) == [0, 1, 2, 3, 4, 5]
    counts = torch.bincount(draw_rows(rows, 15, generator()).flatten().long(), minlength=6)
    assert counts.min() >= 2 and counts.max() <= 3


def test_dropout_draws_levels_uniformly() -> None:
    drawn = draw_active(4000, 4, 0.5, generator())
    share = torch.bincount(drawn, minlength=5).double() / 4000
    torch.testing.assert_close(share, torch.tensor([0, 0.125, 0.125, 0.125, 0.625]).double(), atol=0.03, rtol=0)
    assert draw_active(10, 4, 0.0, generator()).tolist() == [4] * 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_levels": 0}, "num_levels is 0"),
        ({"codebook_size": 1}, "codebook_size is 1"),
        ({"num_levels": 1, "split_semantic": True}, "split_semantic with 1 level"),
        ({"decay": 1.0}, "decay 1.0"),
    ],
)
def test_bad_configs_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CodebookConfig(**{"width": 8, "num_levels": 2, "codebook_size": 4, **changes})
