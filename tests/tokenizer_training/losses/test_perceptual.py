"""Vision teachers against Transformers itself, refusals, and distances of pictures: by hand, by order, by gradient."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from ernie_elastic.errors import CheckpointError, ConfigError, DataError
from ernie_elastic.tokenizer_training.losses.perceptual import (
    PictureFormat,
    PyramidDistance,
    VisionTeacher,
    feature_distance,
    frechet_distance,
    semantic_loss,
)

SIZE, PATCH = 32, 8
TOKENS: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32, "image_size": SIZE,
    "patch_size": PATCH,
}  # fmt: skip
TEXT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 50}
KINDS: dict[str, dict[str, Any]] = {
    "ViT": TOKENS,
    "Dinov2": TOKENS,
    "Dinov2WithRegisters": TOKENS,
    "DINOv3ViT": {**TOKENS, "num_register_tokens": 2},
    "CLIPVision": TOKENS,
    "SiglipVision": TOKENS,
    "CLIP": {"vision_config": TOKENS, "text_config": TEXT},
    "Siglip": {"vision_config": TOKENS, "text_config": TEXT},
    "Swin": {
        "image_size": SIZE, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4,
    },
    "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
    "ConvNext": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
}  # fmt: skip


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def saved(directory: Path, kind: str, preprocessor: dict[str, Any] | None = None, **fields: Any) -> Path:
    """A directory with a tiny model of a kind, with random weights."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(**{**KINDS.get(kind, {}), **fields})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.AutoModel.from_config(config).save_pretrained(directory)
    if preprocessor is not None:
        (directory / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return directory


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("vit") / "model", "ViT")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_vision_model_gives_maps_with_gradients(tmp_path: Path, kind: str) -> None:
    teacher = VisionTeacher.load(saved(tmp_path, kind, {"size": {"height": SIZE, "width": SIZE}}))
    teacher.train()
    assert not any(module.training for module in teacher.modules())
    pixels = (0.5 * noise(2, 3, 48, 40)).requires_grad_()
    maps = teacher.features(pixels)
    assert all(item.shape[0] == 2 and item.shape[2] == item.shape[3] for item in maps)
    assert maps[-1].shape[:2] == (2, teacher.width) and maps[-1].shape[2] >= 4
    torch.testing.assert_close(teacher.pooled(pixels), maps[-1].mean(dim=(2, 3)))
    torch.testing.assert_close(teacher.features(pixels[1:])[-1][0], maps[-1][1], atol=1e-5, rtol=1e-4)
    weight = noise(*maps[-1].shape, seed=1)  # not a plain sum, which a final norm makes constant
    (maps[-1] * weight).sum().backward()
    assert pixels.grad is not None and float(pixels.grad.abs().max()) > 0
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize(("kind", "first"), [("ViT", 1), ("Dinov2WithRegisters", 5), ("SiglipVision", 0)])
def test_class_and_register_tokens_are_dropped_and_cells_stay_in_place(tmp_path: Path, kind: str, first: int) -> None:
    import transformers

    teacher = VisionTeacher.load(saved(tmp_path, kind), num_layers=3)
    pixels = noise(2, 3, SIZE, SIZE).clamp(-1, 1)
    model = transformers.AutoModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        theirs = model(pixel_values=pixels, output_hidden_states=True)
        maps = teacher.features(pixels)
    assert len(maps) == 3
    for found, expected in zip(maps, [*theirs.hidden_states[1:3], theirs.last_hidden_state], strict=True):
        assert found.shape == (2, 16, SIZE // PATCH, SIZE // PATCH)
        torch.testing.assert_close(found[:, :, 1, 2], expected[:, first + 1 * SIZE // PATCH + 2], atol=1e-5, rtol=1e-4)


def test_layers_are_evenly_spaced_and_the_last_is_among_them(tmp_path: Path) -> None:
    directory = saved(tmp_path, "ViT", num_hidden_layers=6)
    pixels = noise(1, 3, SIZE, SIZE)
    all_maps, two = (VisionTeacher.load(directory, num_layers=n).features(pixels) for n in (9, 2))
    assert len(all_maps) == 6
    assert torch.equal(two[0], all_maps[2]) and torch.equal(two[1], all_maps[5])
    with pytest.raises(ConfigError, match="num_layers 0"):
        VisionTeacher.load(directory, num_layers=0)


class Echo(nn.Module):
    """Gives back what a vision model would see."""

    main_input_name, config = "pixel_values", None

    def forward(self, pixel_values: torch.Tensor, **_: Any) -> dict[str, Any]:
        return {"last_hidden_state": pixel_values, "hidden_states": (pixel_values, pixel_values)}


@pytest.mark.parametrize(
    ("preprocessor", "size", "of_black_and_white"),
    [
        (None, 20, (-1.0, 1.0)),
        ({"size": 8, "image_mean": [0.5, 0.25, 0.0], "image_std": [0.25] * 3}, 8, (-2.0, 2.0)),
        ({"size": {"shortest_edge": 12}, "crop_size": {"height": 10}, "do_normalize": False}, 10, (0.0, 1.0)),
        ({"size": {"shortest_edge": 12}, "do_normalize": False}, 12, (0.0, 1.0)),
        ({"crop_size": 6, "do_rescale": False, "do_normalize": False}, 6, (0.0, 255.0)),
        ({"size": [14], "rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3}, 14, (-1.0, 1.0)),
    ],
)  # fmt: skip
def test_pixels_arrive_as_the_preprocessor_says(
    tmp_path: Path, preprocessor: dict[str, Any] | None, size: int, of_black_and_white: tuple[float, float]
) -> None:
    if preprocessor is not None:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    teacher = VisionTeacher(Echo(), PictureFormat.read(tmp_path, 20))
    pixels = torch.stack([-torch.ones(3, 9, 17), torch.ones(3, 9, 17)])
    (seen,) = teacher.features(pixels)
    assert seen.shape == (2, 3, size, size)
    torch.testing.assert_close(seen[:, 0, size // 2, 0], torch.tensor(of_black_and_white), atol=1e-4, rtol=1e-5)


def test_statistics_are_per_channel(tmp_path: Path) -> None:
    fields = {"image_processor": {"size": 4, "image_mean": [0.5, 0.25, 0.0], "image_std": [1.0, 0.5, 0.1]}}
    (tmp_path / "processor_config.json").write_text(json.dumps(fields))
    (seen,) = VisionTeacher(Echo(), PictureFormat.read(tmp_path, None)).features(torch.ones(1, 3, 4, 4))
    assert seen[0, :, 0, 0].tolist() == pytest.approx([0.5, 1.5, 10.0], rel=1e-5)
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": {"image_mean": [0.5]}}))
    with pytest.raises(CheckpointError, match=r"mean \(0\.5,\)"):
        PictureFormat.read(tmp_path, None)


def without(source: Path, directory: Path, lost: str) -> Path:
    """A copy of a model directory that lacks one tensor."""
    directory.mkdir()
    tensors = load_file(source / "model.safetensors")
    assert lost in tensors
    del tensors[lost]
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text((source / "config.json").read_text())
    return directory


def test_a_weight_that_would_be_random_is_refused_but_for_the_unused_pooler(vit: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'vit'\) lacks 1 weights, first 'embeddings\.cls_token'"):
        VisionTeacher.load(without(vit, tmp_path / "a", "embeddings.cls_token"))
    pixels = noise(1, 3, SIZE, SIZE)
    teacher = VisionTeacher.load(without(vit, tmp_path / "b", "pooler.dense.weight"))
    assert torch.equal(teacher.pooled(pixels), VisionTeacher.load(vit).pooled(pixels))
    whole = saved(tmp_path / "clip", "CLIP")
    names = list(load_file(whole / "model.safetensors"))
    seen = next(name for name in names if name.startswith("vision_model.encoder.layers.0"))
    with pytest.raises(CheckpointError, match="lacks 1 weights"):
        VisionTeacher.load(without(whole, tmp_path / "c", seen))
    VisionTeacher.load(without(whole, tmp_path / "d", next(name for name in names if name.startswith("text_model."))))


def test_directories_without_a_vision_model_are_refused(vit: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing has no config\.json"):
        VisionTeacher.load(tmp_path / "nothing")
    text = saved(tmp_path / "bert", "Bert", **TEXT)
    with pytest.raises(CheckpointError, match=r"type 'bert', which reads input_ids.*give a vision model"):
        VisionTeacher.load(text)
    unknown = tmp_path / "unknown"
    unknown.mkdir()
    (unknown / "config.json").write_text(json.dumps({"model_type": "no_such_model"}))
    with pytest.raises(CheckpointError, match="model_type 'no_such_model'"):
        VisionTeacher.load(unknown)
    (unknown / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        VisionTeacher.load(unknown)
    other_size = without(vit, tmp_path / "other", "pooler.dense.weight")
    (other_size / "preprocessor_config.json").write_text(json.dumps({"size": 64}))
    with pytest.raises(CheckpointError, match=r"'vit'\) gives no features: .*64"):
        VisionTeacher.load(other_size)
    with pytest.raises(DataError, match=r"expected \[N, 3, H, W\]"):
        VisionTeacher.load(vit).features(torch.zeros(1, SIZE, SIZE, 3))


class FixedMaps:
    """A teacher whose maps are the pixels and twice the pixels."""

    def features(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        return [pixels, 2.0 * pixels]


def test_feature_distance_is_two_minus_two_cosines() -> None:
    a, b = noise(3, 5, 4, 6), noise(3, 5, 4, 6, seed=1)
    expected = (2 - 2 * F.cosine_similarity(a, b, dim=1)).mean(dim=(1, 2))
    torch.testing.assert_close(feature_distance(FixedMaps(), a, b), expected, atol=1e-5, rtol=1e-4)
    assert feature_distance(FixedMaps(), a, 3.0 * a).tolist() == pytest.approx([0.0] * 3, abs=1e-6)
    assert feature_distance(FixedMaps(), a, -a).tolist() == pytest.approx([4.0] * 3, rel=1e-5)
    doubles = noise(1, 3, 2, 2, seed=2, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: feature_distance(FixedMaps(), x, a[:1, :3, :2, :2].double()), doubles)


def test_feature_distance_of_a_real_teacher_grows_with_damage(vit: Path) -> None:
    teacher, picture = VisionTeacher.load(vit), drawing()
    small, large = (feature_distance(teacher, picture, picture + s * noise(2, 3, 64, 64)) for s in (0.05, 0.5))
    assert feature_distance(teacher, picture, picture).tolist() == [0.0, 0.0] and bool((small < large).all())


def drawing() -> torch.Tensor:
    """Two pictures float [2, 3, 64, 64] in -1..1 with edges, texture, and smooth ground."""
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    disc = ((x - 20) ** 2 + (y - 24) ** 2 < 150).float()
    stripes = ((x + y) % 8 < 4).float() * (x > 36)
    first = torch.stack([0.8 * disc - 0.4, 0.7 * stripes - 0.3, x / 64 - 0.5])
    return torch.stack([first, first.flip(0).transpose(1, 2)])


def of_equal_error(pictures: torch.Tensor, damaged: torch.Tensor, error: float) -> torch.Tensor:
    """Damage scaled so that each picture's mean squared error is `error`."""
    change = damaged - pictures
    return pictures + change * (error / change.square().mean(dim=(1, 2, 3), keepdim=True)).sqrt()


def test_the_pyramid_puts_visible_damage_above_brightness_at_equal_squared_error() -> None:
    pictures, distance, error = drawing(), PyramidDistance(), 0.01
    blocks = F.interpolate(F.avg_pool2d(pictures, 4), scale_factor=4)
    blur = F.avg_pool2d(F.pad(pictures, (2, 2, 2, 2), mode="replicate"), 5, stride=1)
    found = {
        name: distance(pictures, of_equal_error(pictures, damaged, error))
        for name, damaged in {
            "brightness": pictures + 0.1, "blur": blur, "blocks": blocks,
            "noise": pictures + noise(2, 3, 64, 64),
        }.items()
    }  # fmt: skip
    assert all(bool((found[damage] > 2.0 * found["brightness"]).all()) for damage in ("blur", "blocks", "noise")), found


def test_the_pyramid_shows_errors_on_smooth_ground_and_masks_them_in_texture() -> None:
    ground, texture = torch.zeros(1, 3, 32, 32), noise(1, 3, 32, 32, seed=9)
    error = 0.1 * noise(1, 3, 32, 32)
    seen, masked = (float(PyramidDistance()(picture, picture + error)) for picture in (ground, texture))
    assert seen > 1.5 * masked


def test_the_pyramid_grows_with_damage_and_is_a_distance() -> None:
    pictures, distance = drawing(), PyramidDistance()
    assert distance(pictures, pictures).tolist() == [0.0, 0.0]
    grown = [distance(pictures, pictures + s * noise(2, 3, 64, 64)) for s in (0.01, 0.05, 0.2)]
    assert all(bool((a < b).all()) for a, b in itertools.pairwise(grown))
    other = pictures.flip(3)
    torch.testing.assert_close(distance(pictures, other), distance(other, pictures))
    torch.testing.assert_close(distance(pictures[1:], other[1:]), distance(pictures, other)[1:])
    assert distance(noise(1, 3, 3, 50), noise(1, 3, 3, 50, seed=1)).shape == (1,), "a picture too small for bands"
    flat = noise(2, 3, 1, 1).expand(2, 3, 30, 21)
    assert [float(band.abs().max()) for band in distance.bands(flat)[:-1]] == pytest.approx([0.0] * 3, abs=1e-5)
    with pytest.raises(DataError, match="expected one shape"):
        distance(pictures, other[:, :, :32])
    with pytest.raises(ConfigError, match="levels 0"):
        PyramidDistance(levels=0)


def test_the_pyramid_leads_back_to_the_picture() -> None:
    distance, target = PyramidDistance(levels=2), drawing()[:1, :, 8:24, 8:24]
    a, b = target.double(), (target + 0.3 * noise(1, 3, 16, 16)).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: distance(a, x), b)
    estimate = torch.zeros_like(target, requires_grad=True)
    optimizer = torch.optim.Adam([estimate], 0.05)
    for step in range(150):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 - step / 150)
        optimizer.zero_grad()
        distance(target, estimate).sum().backward()
        optimizer.step()
    assert float((estimate.detach() - target).abs().mean()) < 0.2 * float(target.abs().mean())


def gaussian_rows(mean: torch.Tensor, root: torch.Tensor) -> torch.Tensor:
    """Rows [2 C, C] whose sample mean and unbiased covariance are exactly `mean` and root^T root."""
    width = len(mean)
    corners = math.sqrt((2 * width - 1) / 2) * torch.eye(width, dtype=torch.float64)
    return mean + torch.cat([corners, -corners]) @ root


def test_frechet_distance_is_exact_on_gaussians() -> None:
    mean = noise(4, seed=1, dtype=torch.float64)
    root_a, root_b = noise(4, 4, seed=2, dtype=torch.float64), noise(4, 4, seed=3, dtype=torch.float64)
    a, b = gaussian_rows(torch.zeros(4, dtype=torch.float64), root_a), gaussian_rows(mean, root_b)
    covariance_a, covariance_b = root_a.T @ root_a, root_b.T @ root_b
    torch.testing.assert_close(torch.cov(a.T), covariance_a)
    # The eigenvalues of S_a S_b are real and positive, though the product is not symmetric.
    roots = torch.linalg.eigvals(covariance_a @ covariance_b).real.sqrt().sum()
    expected = mean.square().sum() + covariance_a.trace() + covariance_b.trace() - 2 * roots
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(float(expected), rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-9)
    assert frechet_distance(a, a + 2.0) == pytest.approx(16.0), "a shift by 2 in four channels"
    assert frechet_distance(a, 3.0 * a) == pytest.approx(4.0 * float(covariance_a.trace())), "(3 - 1)^2 of the spread"


def test_frechet_distance_with_fewer_rows_than_channels() -> None:
    few = noise(5, 64)
    assert frechet_distance(few, few) == pytest.approx(0.0, abs=1e-6)
    assert frechet_distance(few, few.flip(0)) == pytest.approx(0.0, abs=1e-6), "the order of rows does not count"
    shifted = torch.cat([few, few]) + 1.0
    assert 64.0 <= frechet_distance(few, shifted) < 70.0
    for a, b, message in (
        (few[:1], few, "at least 2 rows"), (few, few[:, :3], "with one C"), (few / 0.0, few, "not finite"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=message):
            frechet_distance(a, b)


def test_semantic_loss_compares_directions_cell_by_cell() -> None:
    teacher = noise(2, 6, 4, 4).requires_grad_()
    same = teacher.detach().permute(0, 2, 3, 1)
    assert float(semantic_loss(5.0 * same, teacher)) == pytest.approx(0.0, abs=1e-5)
    assert float(semantic_loss(-same, teacher)) == pytest.approx(2.0, abs=1e-5)
    assert float(semantic_loss(same.transpose(1, 2), teacher)) > 0.3, "cells must stay in place"
    coarse = F.interpolate(teacher.detach(), scale_factor=2).permute(0, 2, 3, 1)
    assert float(semantic_loss(coarse, teacher)) < 0.3
    student = noise(2, 2, 2, 6, seed=4).requires_grad_()
    semantic_loss(student, teacher).backward()
    assert teacher.grad is None and student.grad is not None
    target = noise(1, 3, 2, 2, seed=6, dtype=torch.float64)
    doubles = noise(1, 2, 2, 3, seed=5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: semantic_loss(x, target), doubles)
    with pytest.raises(ConfigError, match="of one N and C"):
        semantic_loss(student[..., :5], teacher)
