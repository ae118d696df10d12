"""The reader: what reaches the stack from a picture or a clip, before anything is learned."""

import pytest
import torch

from tests.modeling.common import tiny_config, tiny_model


def media(seed, frames=1):
    """Random pixels uint8 [2, F, S, S, 3] and features [2, F, h, w, D] that fit the tiny model."""
    config, generator = tiny_config(), torch.Generator().manual_seed(seed)
    size, grid = config.understanding_image_size, config.visual_scales[-1]
    pixels = torch.randint(0, 256, (2, frames, size, size, 3), dtype=torch.uint8, generator=generator)
    return pixels, torch.randn((2, frames, *grid, config.visual_bits), generator=generator)


def test_weights_start_at_one_over_the_root_of_the_fan_in():
    reader = tiny_model(initializer_range=0.001, understanding_width=32).model.understanding
    parts = {name: m for name, m in reader.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)}
    assert {"cnn_in", "cnn_out", "vit_in", "vit.0.qkv", "merge.down", "out"} <= set(parts)
    for name, part in parts.items():
        expected = part.weight[0].numel() ** -0.5
        assert float(part.weight.detach().std()) == pytest.approx(expected, rel=0.2), name


@pytest.mark.parametrize("frames", [1, 4])
@pytest.mark.parametrize("path", ["pixels", "features"])
@torch.inference_mode()
def test_both_paths_reach_the_stack(path, frames):
    reader = tiny_model().model.understanding
    pixels, features = media(0, frames)
    other_pixels, other_features = media(1, frames)
    one = (pixels, features)
    two = (other_pixels, features) if path == "pixels" else (pixels, other_features)
    (first, second), _ = reader([one, two])
    change = (first - second).norm() / first.norm()
    assert change > 0.05, float(change)  # random pixels outweigh random features: 1.3 and 0.12


@torch.inference_mode()
def test_a_cell_of_features_reaches_its_neighbours():
    reader = tiny_model().model.understanding
    pixels, features = media(0)
    moved = features.clone()
    moved[:, :, 1, 1] += 3.0  # in the first token of a 2x2 grid, at its inner corner
    (first, second), _ = reader([(pixels, features), (pixels, moved)])
    changed = (first - second).abs().amax(-1)[0].reshape(reader.grid // 2, -1)
    assert (changed > 0).all(), "a 3x3 path shows an object to the cells beside it"
