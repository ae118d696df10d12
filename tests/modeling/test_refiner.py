"""The refiner: sizes, the same picture alone, in a batch and in tiles, seeds, bicubic at the start, save and load."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ernie_elastic.errors import CheckpointError, ConfigError, DataError
from ernie_elastic.modeling.refiner import Refiner, RefinerConfig, bicubic


def refiner(seed: int = 0, learned: bool = True, **fields: object) -> Refiner:
    """A tiny refiner; `learned` gives its last layer weights, so that it does not say bicubic."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = Refiner(RefinerConfig(**{"width": 8, "multipliers": (1, 2), "blocks": 1, "steps": 3, **fields}))  # type: ignore[arg-type]
        if learned:
            torch.nn.init.normal_(made.network.last.weight, std=0.1)
    return made.eval()


def pixels(count: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, height, width, 3), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize("size", [(1, 1), (3, 7), (8, 8), (13, 5)])
def test_any_size_becomes_factor_times_larger(factor: int, size: tuple[int, int]) -> None:
    low = pixels(2, *size)
    made = refiner(factor=factor, multipliers=(1, 2, 2)).refine(low)
    assert made.dtype == torch.uint8
    assert made.shape == (2, factor * size[0], factor * size[1], 3)
    assert not torch.equal(made, bicubic(low, factor))


@pytest.mark.parametrize("steps", [1, 4, 20])
def test_without_training_it_is_exactly_bicubic(steps: int) -> None:
    low = pixels(2, 9, 6)
    made = refiner(learned=False, sigma=1.0).refine(low, steps=steps, seed=4)
    assert torch.equal(made, bicubic(low, 2))


def test_a_flat_picture_stays_flat_under_bicubic() -> None:
    assert torch.equal(bicubic(torch.full((1, 4, 4, 3), 77, dtype=torch.uint8), 4), torch.full((1, 16, 16, 3), 77))


def test_the_batch_does_not_matter() -> None:
    made, low = refiner(), pixels(3, 11, 10)
    together = made.refine(low, seed=2)
    for number in range(3):
        assert torch.equal(made.refine(low[number : number + 1], seed=2)[0], together[number])
    assert torch.equal(made.refine(low.flip(0), seed=2).flip(0), together)
    assert torch.equal(made.refine(low.numpy(), seed=2), together)


def test_the_seed_decides_and_the_global_generator_does_not() -> None:
    made, low = refiner(), pixels(1, 8, 8)
    torch.manual_seed(0)
    first = made.refine(low, seed=1)
    torch.manual_seed(1)
    assert torch.equal(made.refine(low, seed=1), first)
    assert not torch.equal(made.refine(low, seed=2), first)


def test_the_temperature_scales_the_noise() -> None:
    made, low = refiner(sigma=2.0), pixels(1, 8, 8)
    means = [made.refine(low, seed=seed, temperature=0.0) for seed in (1, 2)]
    assert torch.equal(*means)
    spread = [
        (made.refine(low, seed=1, temperature=heat).double() - means[0].double()).abs().mean() for heat in (0.2, 1.0)
    ]
    assert 0 < spread[0] < spread[1]
    with pytest.raises(ConfigError, match=r"temperature 1.5 must lie in 0..1"):
        made.refine(low, temperature=1.5)


def test_different_pictures_start_from_different_noise_but_frames_from_the_same() -> None:
    made = refiner(sigma=2.0)
    still = pixels(1, 8, 8).expand(3, -1, -1, -1)
    frames = made.refine_video(still, seed=3)
    assert torch.equal(frames[0], frames[1]) and torch.equal(frames[1], frames[2])
    # Frames that differ by one grey value in one corner: far from it they stay the same only with the same noise.
    low = pixels(1, 40, 4).repeat(2, 1, 1, 1)
    low[1, 0, 0, 0] ^= 1
    clip, alone = made.refine_video(low, steps=1), made.refine(low, steps=1)
    assert torch.equal(clip[0, -8:], clip[1, -8:])
    assert not torch.equal(alone[0, -8:], alone[1, -8:])


@pytest.mark.parametrize("multipliers", [(1,), (1, 2)])
def test_tiles_do_not_show(multipliers: tuple[int, ...]) -> None:
    made, low = refiner(multipliers=multipliers), pixels(1, 75, 61)
    assert made.network.reach < 40, "the picture must be larger than a tile with its surroundings"
    whole, tiled = made.refine(low, seed=1), made.refine(low, seed=1, tile=16)
    assert int((whole.int() - tiled.int()).abs().max()) <= 1
    assert float((whole != tiled).float().mean()) < 1e-3


def test_the_level_reaches_the_network() -> None:
    made, low = refiner(), pixels(1, 8, 8)
    assert not torch.equal(made.refine(low, level=0.0), made.refine(low, level=1.0))


def test_gradients_reach_all_parameters() -> None:
    made = refiner(multipliers=(1, 2, 2), blocks=2)
    state, condition = torch.randn(2, 3, 16, 16), torch.rand(2, 3, 16, 16)
    made(state, condition, torch.tensor([0.2, 0.7]), torch.tensor([0.1, 0.9])).square().mean().backward()
    without = [name for name, value in made.named_parameters() if value.grad is None or not value.grad.abs().sum() > 0]
    assert not without


def test_save_and_load_give_the_same_bits(tmp_path: Path) -> None:
    made, low = refiner(factor=4, multipliers=(1, 2)), pixels(1, 6, 5)
    made.save(tmp_path)
    loaded = Refiner.load(tmp_path)
    assert loaded.config == made.config
    for name, value in made.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert torch.equal(loaded.refine(low), made.refine(low))


def test_damaged_directories_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
        Refiner.load(tmp_path)
    refiner().save(tmp_path)
    weights, config = tmp_path / "refiner.safetensors", tmp_path / "config.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match="no whole refiner"):
        Refiner.load(tmp_path)
    weights.write_bytes(whole)
    fields = json.loads(config.read_text())
    config.write_text(json.dumps({**fields, "width": 16}))
    with pytest.raises(CheckpointError, match="no whole refiner"):
        Refiner.load(tmp_path)
    config.write_text(json.dumps({**fields, "kind": "visual"}))
    with pytest.raises(CheckpointError, match="is no refiner's"):
        Refiner.load(tmp_path)
    weights.unlink()
    config.write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match=r"refiner\.safetensors does not exist"):
        Refiner.load(tmp_path)


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros((0, 8, 8, 3), np.uint8),
        np.zeros((1, 0, 8, 3), np.uint8),
        np.zeros((1, 8, 8, 3), np.float32),
        np.zeros((8, 8, 3), np.uint8),
        np.zeros((1, 8, 8, 4), np.uint8),
    ],
    ids=["no pictures", "no rows", "float", "one picture", "four channels"],
)
def test_bad_pictures_are_named(bad: np.ndarray) -> None:
    made = refiner()
    for call in (made.refine, made.refine_video, lambda value: bicubic(value, 2)):
        with pytest.raises(DataError, match="expected uint8"):
            call(bad)


def test_bad_settings_are_named() -> None:
    made, low = refiner(max_level=0.5), pixels(1, 4, 4)
    for fields in ({"steps": 0}, {"level": 0.6}, {"level": -0.1}, {"tile": 0}):
        with pytest.raises(ConfigError, match=next(iter(fields))):
            made.refine(low, **fields)  # type: ignore[arg-type]
    for wrong in ({"factor": 3}, {"multipliers": ()}, {"width": 0}, {"sigma": -1.0}, {"steps": 0}, {"max_level": 2.0},
                  {"temperature": -0.1}):  # fmt: skip
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            RefinerConfig(**wrong)  # type: ignore[arg-type]
