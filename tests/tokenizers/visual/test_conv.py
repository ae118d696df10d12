"""The convolutional visual tokenizer: pictures and clips, schedules, pieces, causality, inflation, files and errors."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ernie_elastic.errors import CheckpointError, ConfigError, DataError
from ernie_elastic.tokenizers.visual.base import VisualTokenizer
from ernie_elastic.tokenizers.visual.conv import (
    ConvVisualTokenizer,
    ConvVisualTokenizerConfig,
    conv_visual_config,
    inflate,
)
from ernie_elastic.tokenizers.visual.scale_schedules import closest_schedule, default_num_scales, scale_schedules

RATIOS = ((3, 4), (4, 3), (9, 16), (16, 9))
SMALL: dict[str, Any] = {"num_bits": 12, "bit_series": (4, 8, 12), "width": 8, "multipliers": (1, 2, 2)}
CONFIG = conv_visual_config(32, 8, aspect_ratios=RATIOS, **SMALL)


def make(**change: Any) -> ConvVisualTokenizer:
    tokenizer = ConvVisualTokenizer(dataclasses.replace(CONFIG, **change)).eval()
    noise = torch.randn(2, 12, generator=torch.Generator().manual_seed(0))
    tokenizer.normalise.follow(0.1 * noise[0], noise[1].exp(), 1.0)  # so that files and inflation have to keep it
    return tokenizer


def made_clips(temporal_stride: int) -> ConvVisualTokenizer:
    """A tokenizer of clips whose every temporal slice does something."""
    tokenizer = make(temporal_stride=temporal_stride)
    kernels = [p for p in tokenizer.parameters() if p.dim() == 5 and p.shape[2] > 1]
    assert len(kernels) == (0 if temporal_stride == 1 else 13) and all(p.detach().abs().sum() > 0 for p in kernels)
    return tokenizer


def pixels(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(256, (*shape, 3), dtype=torch.uint8, generator=generator)


def bits(tokenizer: ConvVisualTokenizer, latent: torch.Tensor) -> list[torch.Tensor]:
    return tokenizer.quantizer_for(*latent.shape[1:3]).encode(latent).targets


def same_bits(tokenizer: ConvVisualTokenizer, first: torch.Tensor, second: torch.Tensor) -> bool:
    return all(torch.equal(a, b) for a, b in zip(bits(tokenizer, first), bits(tokenizer, second), strict=True))


# Schedules


def test_schedules_share_their_number_of_scales_and_about_their_area() -> None:
    schedules = scale_schedules(16)
    assert [schedule[-1] for schedule in schedules] == [(16, 16), (14, 18), (18, 14), (12, 21), (21, 12)]
    assert schedules[0] == ((1, 1), (2, 2), (3, 3), (4, 4), (6, 6), (10, 10), (16, 16))
    assert {len(schedule) for schedule in schedules} == {default_num_scales(16)}
    for schedule in schedules:
        assert abs(math.log(schedule[-1][0] * schedule[-1][1] / 256)) < 0.05
        assert list(schedule) == sorted(schedule) and schedule[0] == (1, 1)
    assert scale_schedules(1) == (((1, 1),),)
    assert scale_schedules(4, ((1, 1),), 3) == (((1, 1), (2, 2), (4, 4)),)


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((100, 100), (16, 16)),
        ((480, 640), (14, 18)),
        ((1080, 1920), (12, 21)),
        ((4000, 100), (21, 12)),
        ((1, 1), (16, 16)),
    ],
)
def test_the_closest_schedule_has_the_nearest_shape(size: tuple[int, int], grid: tuple[int, int]) -> None:
    assert closest_schedule(scale_schedules(16), *size)[-1] == grid


def test_of_one_shape_the_closest_schedule_has_the_nearest_area() -> None:
    both = (((1, 1), (4, 4)), ((1, 1), (8, 8)))
    assert closest_schedule(both, 9, 9) == both[1] and closest_schedule(both, 3, 3) == both[0]


def test_schedules_that_cannot_be_are_refused() -> None:
    with pytest.raises(DataError, match="0x5 pixels has no content"):
        closest_schedule(scale_schedules(4), 0, 5)
    for arguments in ((0,), (4, ((0, 1),)), (4, ((1, 1),), 0)):
        with pytest.raises(ConfigError, match="scale schedules"):
            scale_schedules(*arguments)  # type: ignore[arg-type]


# Pictures


@pytest.mark.parametrize("size", CONFIG.sizes)
def test_every_schedule_codes_its_size(size: tuple[int, int]) -> None:
    tokenizer, given = make(), pixels(2, *size)
    latent = tokenizer.encode(given)
    assert latent.shape == (2, size[0] // 8, size[1] // 8, 12) and latent.dtype == torch.float32
    unit = make(unit_length=True).encode(given)
    torch.testing.assert_close(unit.square().mean(dim=-1), torch.ones(latent.shape[:3]), atol=1e-4, rtol=0)
    codes = tokenizer.quantizer_for(*latent.shape[1:3]).encode(latent)
    assert tuple(codes.targets[-1].shape) == tuple(latent.shape)
    picture = tokenizer.decode(codes.total)
    assert picture.dtype == torch.uint8 and picture.shape == given.shape
    assert torch.equal(picture, tokenizer.reconstruct(given.numpy()))
    assert tokenizer.fitting_size(*size) == size


def test_first_bits_and_first_scales_decode() -> None:
    tokenizer = make()
    latent = tokenizer.encode(pixels(2, 32, 32))
    codes = tokenizer.quantizer.encode(latent)
    few = codes.first_bits(4)
    assert not few.total[..., 4:].any() and few.total[..., :4].any()
    coarse = tokenizer.quantizer.contribution(codes.targets[0], 0)
    full = tokenizer.decode(codes.total)
    for feature in (few.total, coarse):
        picture = tokenizer.decode(feature)
        assert picture.shape == full.shape and not torch.equal(picture, full)


def test_many_pictures_equal_few() -> None:
    tokenizer, given = make(), pixels(1030, 32, 32)  # more than one internal batch
    latent = tokenizer.encode(given)
    torch.testing.assert_close(latent[1022:1027], tokenizer.encode(given[1022:1027]), atol=1e-5, rtol=1e-5)
    assert len(tokenizer.decode(latent)) == 1030


def test_gradients_reach_the_encoder_through_the_quantiser() -> None:
    tokenizer = make()
    latent = tokenizer.normalise(tokenizer.encoder(tokenizer.pixels_in(pixels(2, 1, 32, 32)))).movedim(1, -1)[:, 0]
    total = tokenizer.quantizer.encode(latent.detach()).total
    through = latent + (total - latent).detach()
    tokenizer.decoder(through.movedim(-1, 1)[:, :, None]).square().mean().backward()
    for name, parameter in tokenizer.named_parameters():
        assert parameter.grad is not None and float(parameter.grad.abs().sum()) > 0, name


def test_flips_requantise_the_targets_so_that_they_are_repaired() -> None:
    tokenizer = make()
    tokenizer.set_amplitudes([0.3, 0.4, 0.5, 0.7])
    quantizer, latent = tokenizer.quantizer, tokenizer.encode(pixels(8, 32, 32))
    rates = torch.zeros(8, len(quantizer.scales))
    rates[:, :2] = 0.3
    clean = quantizer.encode(latent)
    flipped = quantizer.encode(latent, rates, torch.Generator().manual_seed(0))
    assert torch.equal(clean.targets[0], flipped.targets[0])
    assert not torch.equal(clean.targets[-1], flipped.targets[-1])
    # The same flipped history with the targets of the clean one after it.
    read = torch.Generator().manual_seed(0)
    history = []
    for scale, targets in enumerate(flipped.targets):
        draw = torch.rand(targets.shape, generator=read)
        history.append(torch.where(draw < rates[0, scale], 1 - targets, targets))
    stubborn = quantizer.replay([*history[:2], *clean.targets[2:]]).total
    repaired = quantizer.replay(history).total
    torch.testing.assert_close(repaired, flipped.total)
    assert (repaired - latent).square().mean() < 0.9 * (stubborn - latent).square().mean()


# Clips


@pytest.mark.parametrize("temporal_stride", [1, 2, 4])
def test_a_picture_is_a_clip_of_one_frame(temporal_stride: int) -> None:
    tokenizer, given = made_clips(temporal_stride), pixels(1, 32, 32)
    latent = tokenizer.encode(given)
    assert torch.equal(latent, tokenizer.encode_video(given))
    total = tokenizer.quantizer.encode(latent).total
    assert torch.equal(tokenizer.decode(total), tokenizer.decode_video(total))


@pytest.mark.parametrize(("temporal_stride", "chunks"), [(1, (1, 3, 16)), (2, (2, 4, 6)), (4, (4, 8, 12))])
def test_pieces_of_a_clip_give_the_codes_of_the_whole(temporal_stride: int, chunks: tuple[int, ...]) -> None:
    tokenizer, given = made_clips(temporal_stride), pixels(17, 32, 32)
    whole = tokenizer.encode_video(given, chunk_frames=None)
    assert len(whole) == tokenizer.latent_frames(17) == 1 + 16 // temporal_stride
    total = tokenizer.quantizer.encode(whole).total
    decoded = tokenizer.decode_video(total, chunk_frames=None)
    assert decoded.shape == given.shape
    for chunk in chunks:
        pieces = tokenizer.encode_video(given, chunk_frames=chunk)
        torch.testing.assert_close(pieces, whole, atol=1e-5, rtol=0)
        assert same_bits(tokenizer, pieces, whole)
        again = tokenizer.decode_video(total, chunk_frames=chunk)
        assert int((again.int() - decoded.int()).abs().max()) <= 1  # rounding to whole values


@pytest.mark.parametrize("temporal_stride", [2, 4])
def test_latents_depend_on_frames_up_to_their_own(temporal_stride: int) -> None:
    tokenizer = made_clips(temporal_stride)
    x = tokenizer.pixels_in(pixels(1, 9, 32, 32)).requires_grad_()
    for place in range(1 + 8 // temporal_stride):
        weight = torch.randn(12, 1, 1, generator=torch.Generator().manual_seed(place))  # lengths alone are constant
        (gradient,) = torch.autograd.grad((tokenizer.normalise(tokenizer.encoder(x))[:, :, place] * weight).sum(), x)
        reached = gradient.abs().sum(dim=(0, 1, 3, 4)) > 0
        last = place * temporal_stride
        assert reached[last] and not reached[last + 1 :].any()


def test_decoded_frames_depend_on_latents_up_to_their_own() -> None:
    tokenizer = made_clips(4)
    feature = torch.randn(1, 12, 3, 4, 4).requires_grad_()
    for frame, latest in ((0, 0), (1, 1), (4, 1), (5, 2), (8, 2)):
        (gradient,) = torch.autograd.grad(tokenizer.decoder(feature)[:, :, frame].sum(), feature)
        reached = gradient.abs().sum(dim=(0, 1, 3, 4)) > 0
        assert reached.tolist() == [place <= latest for place in range(3)]


def test_clips_of_any_length_are_coded() -> None:
    tokenizer = made_clips(4)
    for frames, latents in ((1, 1), (2, 2), (5, 2), (6, 3), (8, 3)):
        given = pixels(frames, 32, 32)
        latent = tokenizer.encode_video(given)
        assert len(latent) == tokenizer.latent_frames(frames) == latents
        held = torch.cat([given, given[-1:].expand(4 * latents - 3 - frames, -1, -1, -1)])
        assert torch.equal(latent, tokenizer.encode_video(held))
        assert len(tokenizer.decode_video(latent, frames)) == frames


@pytest.mark.parametrize("temporal_stride", [2, 4])
def test_inflation_keeps_the_bits_of_pictures(temporal_stride: int) -> None:
    flat, given = make(), pixels(3, 32, 32)
    inflated = inflate(flat, temporal_stride)
    assert not inflated.frames_alone and flat.frames_alone and not inflated.training
    latent = flat.encode(given)
    assert torch.equal(inflated.encode(given), latent) and same_bits(flat, inflated.encode(given), latent)
    total = flat.quantizer.encode(latent).total
    assert torch.equal(inflated.decode(total), flat.decode(total))
    # In a clip, every latent frame of an inflated tokenizer is that of the last frame of its group.
    clip = inflated.encode_video(given[[0, *[1] * temporal_stride, *[2] * temporal_stride]])
    torch.testing.assert_close(clip, latent, atol=1e-4, rtol=0)


def test_inflation_of_what_has_time_already_is_refused() -> None:
    for tokenizer, stride in ((make(temporal_stride=2), 4), (make(), 1)):
        with pytest.raises(ConfigError, match="it must go from 1 to 2 or 4"):
            inflate(tokenizer, stride)


# Files and errors


@pytest.mark.parametrize("temporal_stride", [1, 4])
def test_saved_and_loaded_is_bit_equal(tmp_path: Path, temporal_stride: int) -> None:
    tokenizer, given = make(temporal_stride=temporal_stride), pixels(5, *CONFIG.sizes[1])
    tokenizer.set_amplitudes([0.1, 0.2, 0.3, 0.4])
    tokenizer.save(tmp_path)
    loaded = VisualTokenizer.load(tmp_path)
    assert isinstance(loaded, ConvVisualTokenizer) and loaded.config == tokenizer.config and not loaded.training
    assert loaded.quantizer == tokenizer.quantizer
    assert torch.equal(loaded.encode_video(given), tokenizer.encode_video(given))
    assert torch.equal(loaded.reconstruct(given), tokenizer.reconstruct(given))
    loaded.save(tmp_path / "again")
    for name in ("config.json", "tokenizer.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_damaged_files_are_told(tmp_path: Path) -> None:
    make().save(tmp_path)
    weights = tmp_path / "tokenizer.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="no whole visual tokenizer"):
        VisualTokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stride": 12}, "powers of two"),
        ({"stride": 2}, "at least twice the stem"),
        ({"image_size": 36}, "does not divide image_size 36"),
        ({"multipliers": (1, 2)}, "needs 3"),
        ({"multipliers": (1, 3, 3)}, "must be a multiple of the next one"),
        ({"temporal_stride": 3}, "not one of 1, 2, 4"),
        ({"width": 0}, "width 0"),
        ({"bit_series": (4, 8)}, "end with num_bits 12"),
        ({"bit_series": (8, 4, 12)}, "must grow"),
        ({"image_size": 64}, r"must end with the square grid \(8, 8\)"),
        ({"amplitudes": (1.0,)}, "1 amplitudes but 4 scales"),
        ({"schedules": (*CONFIG.schedules, CONFIG.schedules[1])}, "two schedules end with the same grid"),
        ({"schedules": (((9, 9), *CONFIG.schedules[0][1:]),)}, "between 1 and its last grid"),
    ],
)
def test_configs_that_cannot_work_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(CONFIG, **change)


def test_defaults_are_valid() -> None:
    config = ConvVisualTokenizerConfig()
    assert config.sizes[0] == (256, 256) and config.bits_per_picture == 32 * sum(h * w for h, w in config.scales)
    assert conv_visual_config(64, 8, 16, stem=4).multipliers == (1, 2)


WRONG = [
    torch.zeros(1, 1, 1, 3, dtype=torch.uint8), torch.zeros(2, 33, 31, 3, dtype=torch.uint8), torch.zeros(1, 32, 32, 3),
    torch.zeros(1, 64, 64, 3, dtype=torch.uint8), np.zeros((1, 32, 32, 4), np.uint8), np.zeros((32, 32, 3), np.uint8),
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_pixels_are_refused_with_the_sizes(wrong: torch.Tensor) -> None:
    for method in (make().encode, make(temporal_stride=2).encode_video):
        with pytest.raises(DataError, match=r"HxW one of 32x32, 24x32, 32x24, 24x40"):
            method(wrong)


def test_wrong_features_grids_and_chunks_are_refused() -> None:
    tokenizer = make(temporal_stride=4)
    with pytest.raises(DataError, match=r"expected \[..., h, w, 12\] with hxw one of 4x4"):
        tokenizer.decode(torch.zeros(1, 4, 4, 5))
    with pytest.raises(DataError, match="no schedule has a latent grid of 9x9"):
        tokenizer.quantizer_for(9, 9)
    with pytest.raises(DataError, match="0 frames"):
        tokenizer.encode_video(pixels(0, 32, 32))
    with pytest.raises(DataError, match="0 frames"):
        tokenizer.decode_video(torch.zeros(0, 4, 4, 12))
    for chunk in (0, 3):
        with pytest.raises(ConfigError, match=f"chunk_frames {chunk} must be a positive multiple"):
            tokenizer.encode_video(pixels(9, 32, 32), chunk_frames=chunk)
    with pytest.raises(DataError, match="no content"):
        tokenizer.fitting_size(0, 3)
    assert tokenizer.fitting_size(1, 1) == (32, 32) and tokenizer.fitting_size(3, 20000) == (24, 40)
