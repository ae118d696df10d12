"""Discriminators and the losses of the game: numbers by hand, gradients, agreement of ranks, and that they learn."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from ernie_elastic.errors import ConfigError, DataError
from ernie_elastic.tokenizer_training.losses.adversarial import (
    LeCam,
    adaptive_weight,
    feature_matching_loss,
    hinge_discriminator_loss,
    hinge_generator_loss,
)
from ernie_elastic.tokenizer_training.losses.discriminators import PatchDiscriminator, StftDiscriminator


def test_hinge_losses_by_hand() -> None:
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([[-3.0, 0.0]])
    assert float(hinge_discriminator_loss(real, fake)) == pytest.approx((0 + 0.5 + 2) / 3 + (0 + 1) / 2)
    assert float(hinge_discriminator_loss(torch.full((4,), 1.5), torch.full((4,), -1.5))) == 0.0
    assert float(hinge_generator_loss(fake)) == pytest.approx(1.5), "the generator wants high logits"


def test_feature_matching_counts_layers_alike_and_leaves_the_real_side_alone() -> None:
    real = [torch.tensor([1.0, -3.0], requires_grad=True), torch.tensor([100.0, 300.0])]
    fake = [torch.tensor([2.0, -3.0], requires_grad=True), torch.tensor([100.0, 200.0])]
    loss = feature_matching_loss(real, fake)
    assert float(loss.detach()) == pytest.approx((0.5 / 2 + 50 / 200) / 2)
    loss.backward()
    assert real[0].grad is None and fake[0].grad is not None
    silent = feature_matching_loss([torch.zeros(3)], [torch.zeros(3)])
    assert float(silent) == 0.0
    with pytest.raises(ConfigError, match="2 real and 1 fake"):
        feature_matching_loss(real, fake[:1])


def test_lecam_by_hand_and_through_a_saved_state() -> None:
    lecam = LeCam(decay=0.5)
    real, fake = torch.tensor([2.0, 4.0]), torch.tensor([-1.0, 1.0, 3.0])
    assert float(lecam.penalty(real, fake)) == 0.0, "no anchors yet"
    lecam.update(real, fake)
    assert (lecam.real, lecam.fake) == (3.0, 1.0), "the first step sets the anchors"
    lecam.update(real + 2.0, fake - 2.0)
    assert (lecam.real, lecam.fake) == (4.0, 0.0)
    # real over the fake anchor 0: 2^2, 4^2; fake below the real anchor 4: 5^2, 3^2, 1^2
    assert float(lecam.penalty(real, fake)) == pytest.approx((4 + 16) / 2 + (25 + 9 + 1) / 3)
    assert float(lecam.penalty(torch.tensor([-1.0]), torch.tensor([5.0]))) == 0.0, "a fooled discriminator pays nothing"
    other = LeCam(decay=0.5)
    other.load_state_dict(lecam.state_dict())
    for item in (lecam, other):
        item.update(real, fake)
    assert (other.real, other.fake) == (lecam.real, lecam.fake)
    with pytest.raises(ConfigError, match=r"decay 1\.0"):
        LeCam(decay=1.0)


def test_lecam_pulls_logits_together() -> None:
    lecam = LeCam()
    lecam.update(torch.tensor([1.0]), torch.tensor([-1.0]))
    real, fake = torch.tensor([2.0], requires_grad=True), torch.tensor([-2.0], requires_grad=True)
    lecam.penalty(real, fake).backward()
    assert real.grad is not None and fake.grad is not None
    assert float(real.grad) == pytest.approx(6.0) and float(fake.grad) == pytest.approx(-6.0)


def test_adaptive_weight_makes_both_gradients_equally_long() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 4, generator=generator, requires_grad=True)
    inputs, targets = torch.randn(8, 4, generator=generator), torch.randn(8, 3, generator=generator)
    outputs = inputs @ weight.T
    reconstruction, adversarial = (outputs - targets).square().mean(), 0.01 * outputs.sin().mean()
    found = adaptive_weight(reconstruction, adversarial, weight)
    assert not found.requires_grad
    (first,) = torch.autograd.grad(reconstruction, weight, retain_graph=True)
    (second,) = torch.autograd.grad(found * adversarial, weight, retain_graph=True)
    assert float(first.norm()) == pytest.approx(float(second.norm()), rel=1e-5)
    assert float(adaptive_weight(reconstruction, adversarial, weight, limit=0.5)) == 0.5
    assert float(adaptive_weight(reconstruction, 0.0 * adversarial, weight)) == 0.0, "nothing to weigh"
    (reconstruction + found * adversarial).backward()
    assert weight.grad is not None, "both graphs are kept"


def of_a_rank(rank: int, out: str) -> None:
    """One of two processes: its own logits and its own half of a batch."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo", init_method=f"file://{out}/meeting", rank=rank, world_size=2)
    lecam = LeCam()
    lecam.update(torch.full((1 + rank,), float(rank)), torch.full((2,), -2.0 * rank))
    weight, x_3, scale = shares()
    own = slice(2 * rank, 2 * rank + 2)
    found = adaptive_weight((x_3[own] * weight).square().mean(), scale * (x_3[own] * weight).mean(), weight)
    torch.save({"lecam": lecam.state_dict(), "weight": float(found)}, Path(out) / f"rank{rank}.pt")
    dist.destroy_process_group()


def shares() -> tuple[torch.Tensor, torch.Tensor, float]:
    return torch.tensor(1.5, requires_grad=True), torch.tensor([1.0, 2.0, 3.0, 5.0]), 0.1


@pytest.mark.distributed
def test_two_ranks_agree_with_one_batch(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(of_a_rank, (str(tmp_path),), nprocs=2, start_method="spawn")
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    assert first == second
    assert first["lecam"] == {"real": pytest.approx(2 / 3), "fake": pytest.approx(-1.0)}, "a mean over all logits"
    weight, x_3, scale = shares()
    whole = adaptive_weight((x_3 * weight).square().mean(), scale * (x_3 * weight).mean(), weight)
    assert first["weight"] == pytest.approx(float(whole), rel=1e-5)


def patch_discriminator(**settings: int) -> PatchDiscriminator:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return PatchDiscriminator(**settings)


def stft_discriminator(**settings: object) -> StftDiscriminator:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return StftDiscriminator(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(("height", "width", "grid"), [(32, 32, (4, 4)), (8, 8, (1, 1)), (45, 30, (5, 3))])
def test_patch_logits_of_any_size_and_of_each_item_by_itself(height: int, width: int, grid: tuple[int, int]) -> None:
    network = patch_discriminator(width=8).eval()
    pixels = torch.rand(3, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1
    logits = network(pixels).detach()
    assert logits.shape == (3, 1, *grid)
    torch.testing.assert_close(network(pixels[1:2]), logits[1:2], atol=1e-6, rtol=1e-5)
    assert float((logits[0] - logits[1]).abs().max()) > 1e-5, "it looks at the pixels"


def test_a_patch_logit_sees_its_own_part_only() -> None:
    network = patch_discriminator(width=8).eval()
    pixels = torch.zeros(1, 3, 128, 128, requires_grad=True)
    (gradient,) = torch.autograd.grad(network(pixels)[0, 0, 0, 0], pixels)
    seen = gradient.abs().sum(dim=(0, 1)).nonzero().amax(dim=0)
    assert 8 <= int(seen.max()) < 64


def test_the_patch_discriminator_learns_to_tell_sharp_from_blurred() -> None:
    network = patch_discriminator(width=8, layers=2)
    optimizer = torch.optim.Adam(network.parameters(), 2e-3, (0.5, 0.9))
    generator = torch.Generator().manual_seed(2)
    for _ in range(60):
        real = torch.rand(8, 3, 16, 16, generator=generator).round() * 2 - 1
        loss = hinge_discriminator_loss(network(real), network(blurred(real)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    fresh = torch.rand(8, 3, 16, 16, generator=generator).round() * 2 - 1
    assert float(network(fresh).detach().min()) > float(network(blurred(fresh)).detach().max())
    assert float(loss.detach()) < 0.2, "logits reach the margins"
    fake = blurred(fresh).requires_grad_()
    (gradient,) = torch.autograd.grad(hinge_generator_loss(network(fake)), fake)
    moved = network(fake.detach() - 0.5 * gradient / gradient.abs().max())
    assert float(moved.mean().detach()) > float(network(fake).mean().detach())


def blurred(pixels: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(pixels, 3, stride=1, padding=1, count_include_pad=False)


def test_patch_discriminator_names_what_is_wrong() -> None:
    with pytest.raises(DataError, match="4x16 pixels are smaller than 8"):
        patch_discriminator(width=4)(torch.zeros(1, 3, 4, 16))
    with pytest.raises(DataError, match=r"expected \[N, 3, H, W\]"):
        patch_discriminator(width=4)(torch.zeros(1, 16, 16, 3))
    with pytest.raises(ConfigError, match="layers 0"):
        PatchDiscriminator(layers=0)


@pytest.mark.parametrize("length", [1, 100, 5000])
def test_stft_logits_of_any_length_and_of_each_item_by_itself(length: int) -> None:
    network = stft_discriminator(windows=(512, 128), width=4)
    wave = torch.randn(3, length, generator=torch.Generator().manual_seed(1))
    found, alone = network(wave), network(wave[1:2])
    assert len(found) == 2
    for window, (logits, features), (own, _) in zip((512, 128), found, alone, strict=True):
        frames, bins = 1 + length // (window // 4), math.ceil((window // 2 + 1) / 8)
        assert logits.shape == (3, 1, frames, bins)
        assert len(features) == 5 and features[-1].shape == (3, 4, frames, bins)
        torch.testing.assert_close(own, logits[1:2], atol=1e-5, rtol=1e-4)


def test_stft_gradients_are_finite_for_silence() -> None:
    wave = torch.zeros(1, 600, requires_grad=True)
    sum(hinge_generator_loss(logits) for logits, _ in stft_discriminator(width=4)(wave)).backward()
    assert wave.grad is not None and bool(torch.isfinite(wave.grad).all()) and float(wave.grad.abs().max()) > 0


def test_the_stft_discriminator_learns_to_hear_noise() -> None:
    network = stft_discriminator(windows=(256, 64), width=6)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3, (0.8, 0.99))
    generator = torch.Generator().manual_seed(3)
    for _ in range(80):
        real, fake = tones(generator), tones(generator) + 0.1 * torch.randn(6, 1024, generator=generator)
        pairs = zip(network(real), network(fake), strict=True)
        loss = torch.stack([hinge_discriminator_loss(a, b) for (a, _), (b, _) in pairs]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # Logits of 0 cost 2. How fast it falls depends on rounding: other seeds have 0.6 to 1.3 after 40 steps, and all of
    # them less than 0.1 after 80.
    assert float(loss.detach()) < 1.0
    pairs = zip(network(tones(generator)), network(torch.randn(6, 1024, generator=generator)), strict=True)
    assert all(float(a.mean().detach()) > float(b.mean().detach()) + 0.5 for (a, _), (b, _) in pairs)


def tones(generator: torch.Generator) -> torch.Tensor:
    hertz = 100 + 1000 * torch.rand(6, 1, generator=generator)
    return 0.5 * (2 * math.pi * hertz * torch.arange(1024) / 8000).sin()


def test_stft_discriminator_names_what_is_wrong() -> None:
    with pytest.raises(DataError, match="L >= 1"):
        stft_discriminator(width=2)(torch.zeros(2, 0))
    with pytest.raises(ConfigError, match=r"windows \(8,\)"):
        StftDiscriminator(windows=(8,))
