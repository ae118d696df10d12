"""Training the convolutional visual tokenizer: it learns, resumes to the bit, computes no loss of weight 0, and its
health tells a collapse from a healthy tokenizer."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import ViTConfig, ViTModel

from ernie_elastic.data.world.scenes import WorldConfig, draw_scene, random_scene, world_rng
from ernie_elastic.errors import ConfigError, DataError
from ernie_elastic.tokenizer_training.losses.perceptual import VisionTeacher
from ernie_elastic.tokenizer_training.visual import conv as training_module
from ernie_elastic.tokenizer_training.visual.bits import measure_amplitudes
from ernie_elastic.tokenizer_training.visual.conv import ConvVisualTrainee, ConvVisualTrainingConfig
from ernie_elastic.tokenizer_training.visual.health import VisualCollapseLimits, collapse_findings, conv_visual_health
from ernie_elastic.tokenizers.quantizers import MultiScaleBits
from ernie_elastic.tokenizers.visual.conv import ConvVisualTokenizer, conv_visual_config
from ernie_elastic.tokenizers.visual.patch import PatchVisualTokenizer, PatchVisualTokenizerConfig

CONFIG = conv_visual_config(32, 8, 12, ((3, 4),), width=12, multipliers=(1, 2, 2), bit_series=(4, 12))
TRAINING = ConvVisualTrainingConfig(steps=50, batch_size=8, warmup_steps=5, learning_rate=3e-3, warmup_share=0.4)
QUANTIZER = MultiScaleBits(((1, 1), (2, 2), (4, 4)), (0.3, 0.4, 0.8))


def scenes(count: int, split: str = "train") -> np.ndarray:
    """Scenes of the world, each colour channel inverted or not, so that even the mean of a picture is worth coding."""
    config = WorldConfig(image_size=32)
    drawn = []
    for index in range(count):
        rng = world_rng(0, index, split, "test")
        scene = draw_scene(random_scene(rng, config, split), 32)
        drawn.append(np.where(rng.random(3) < 0.5, scene, 255 - scene).astype(np.uint8))
    return np.stack(drawn)


def gradients(count: int, seed: int) -> np.ndarray:
    """Smooth pictures between four random colours: what a training of seconds learns to code."""
    corners = torch.rand(count, 3, 2, 2, generator=torch.Generator().manual_seed(seed)) * 255
    large = torch.nn.functional.interpolate(corners, (32, 32), mode="bilinear", align_corners=True)
    return large.permute(0, 2, 3, 1).to(torch.uint8).numpy()


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    return scenes(64)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
    )
    ViTModel(config).save_pretrained(directory)
    return directory


def batch(pictures: np.ndarray, step: int, size: int = 8) -> torch.Tensor:
    pick = np.random.default_rng(step).integers(len(pictures), size=size)
    return torch.from_numpy(pictures[pick][:, None])


def run(trainee: ConvVisualTrainee, pictures: np.ndarray, first: int, last: int) -> list[dict[str, float]]:
    return [trainee.step(batch(pictures, step), step) for step in range(first, last)]


def everything(teacher: Path, **change: Any) -> ConvVisualTrainingConfig:
    """Every loss on."""
    fields: dict[str, Any] = {
        "steps": 8, "warmup_share": 0.25, "certainty_weight": 0.01, "perceptual_weight": 0.1,
        "adversarial_weight": 0.05,
        "adversarial_start": 0.5, "adaptive_limit": 10.0, "lecam_weight": 0.1, "semantic_weight": 0.1,
        "flip_rate": 0.02, "average_decay": 0.9, "coarse_share": 0.3, "low_bit_share": 0.3, "discriminator_width": 4,
        "teacher": teacher,
    }  # fmt: skip
    return dataclasses.replace(TRAINING, **(fields | change))


# Training


@pytest.fixture(scope="module")
def trained() -> ConvVisualTokenizer:
    trainee = ConvVisualTrainee(CONFIG, dataclasses.replace(TRAINING, steps=80), seed=1)
    run(trainee, gradients(256, 0), 0, 80)
    return trainee.tokenizer


def test_training_lowers_the_loss(pictures: np.ndarray) -> None:
    metrics = run(ConvVisualTrainee(CONFIG, TRAINING, seed=1), pictures, 0, TRAINING.steps)
    first, last = (np.mean([m["absolute"] for m in part]) for part in (metrics[:3], metrics[-8:]))
    assert last < 0.5 * first
    assert "commitment" not in metrics[19] and "commitment" in metrics[20]  # noise, then signs
    assert not {"perceptual", "adversarial", "semantic"} & set(metrics[-1])


def test_a_trained_tokenizer_is_healthy(trained: ConvVisualTokenizer) -> None:
    tokenizer = trained
    assert not tokenizer.training
    health = conv_visual_health(tokenizer, list(gradients(24, 1)))
    assert health["collapse"] == []
    assert health["psnr_db"] > health["flat_psnr_db"] + 2
    assert health["psnr_db"] == health["psnr_db_by_scales"][-1] == health["psnr_db_by_bits"]["12"]
    assert health["psnr_db_by_scales"][0] < health["psnr_db"] and health["psnr_db_by_bits"]["4"] < health["psnr_db"]
    assert len(health["bit_entropy_by_scale"]) == 4 and 0 < health["bits_used"] <= 1
    assert health["perceptual_measure"] == "pyramid" and 0 < health["perceptual_distance"] < 1
    assert "reconstruction_fid" not in health


def test_amplitudes_are_those_of_the_trained_latents(trained: ConvVisualTokenizer) -> None:
    tokenizer = trained
    measured = measure_amplitudes(tokenizer.encode(gradients(64, 0)), tokenizer.quantizer)
    np.testing.assert_allclose(tokenizer.config.amplitudes, measured, rtol=0.3)
    assert tokenizer.quantizer.amplitudes == tokenizer.config.amplitudes != CONFIG.amplitudes


def test_every_loss_at_once(pictures: np.ndarray, teacher: Path) -> None:
    trainee = ConvVisualTrainee(CONFIG, everything(teacher), seed=1)
    weights = [parameter.clone() for parameter in trainee.discriminator.parameters()]  # type: ignore[union-attr]
    metrics = run(trainee, pictures, 0, 8)
    names = {"absolute", "squared", "commitment", "bit_uncertainty", "bit_sameness", "perceptual", "adversarial",
             "discriminator", "lecam", "semantic", "gradient_norm", "learning_rate"}  # fmt: skip
    assert names <= set(metrics[-1]) and "adversarial" not in metrics[3] and "semantic" not in metrics[1]
    assert all(np.isfinite(value) for m in metrics for value in m.values())
    now = list(trainee.discriminator.parameters())  # type: ignore[union-attr]
    assert any(not torch.equal(a, b) for a, b in zip(weights, now, strict=True))
    health = conv_visual_health(trainee.tokenizer, list(pictures[:6]), VisionTeacher.load(teacher))
    assert health["perceptual_measure"] == "teacher features" and health["reconstruction_fid"] > 0


def test_a_loss_of_weight_zero_is_not_computed(
    pictures: np.ndarray, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("computed")

    for name in ("feature_distance", "semantic_loss", "hinge_generator_loss", "bit_entropies", "VisionTeacher",
                 "PyramidDistance", "PatchDiscriminator", "LeCam", "adaptive_weight"):  # fmt: skip
        monkeypatch.setattr(training_module, name, never)
    plain = dataclasses.replace(
        TRAINING,
        steps=4,
        diversity_weight=0.0,
        commitment_weight=0.0,
        squared_weight=0.0,
        teacher=teacher,
        warmup_share=0,
    )
    metrics = run(ConvVisualTrainee(CONFIG, plain), pictures, 0, 2)
    assert set(metrics[-1]) - {"psnr_db"} == {"absolute", "gradient_norm", "learning_rate"}


def test_a_state_goes_on_to_the_same_bits(pictures: np.ndarray, teacher: Path) -> None:
    training = everything(teacher)
    whole = ConvVisualTrainee(CONFIG, training, seed=1)
    run(whole, pictures, 0, 5)
    stream = io.BytesIO()
    torch.save(whole.state_dict(), stream)
    expected = run(whole, pictures, 5, 8)
    resumed = ConvVisualTrainee(CONFIG, training, seed=1)
    run(resumed, pictures, 0, 1)
    stream.seek(0)
    resumed.load_state_dict(torch.load(stream, weights_only=True))
    assert run(resumed, pictures, 5, 8) == expected
    assert resumed.tokenizer.config == whole.tokenizer.config
    for name, value in whole.tokenizer.state_dict().items():
        assert torch.equal(value, resumed.tokenizer.state_dict()[name]), name


def test_a_state_of_other_losses_is_refused(teacher: Path) -> None:
    state = ConvVisualTrainee(CONFIG, TRAINING).state_dict()
    with pytest.raises(ConfigError, match="go on with the settings that it was started with"):
        ConvVisualTrainee(CONFIG, everything(teacher)).load_state_dict(state)


def test_the_average_of_the_weights_comes_out(pictures: np.ndarray) -> None:
    training = dataclasses.replace(TRAINING, steps=6, average_decay=0.5, warmup_share=0.2)
    trainee = ConvVisualTrainee(CONFIG, training)
    start = [parameter.detach().clone() for parameter in trainee.model.parameters()]
    trainee.step(batch(pictures, 0), 0)
    decay = 1 / 10
    for kept, before, new in zip(trainee.tokenizer.parameters(), start, trainee.model.parameters(), strict=True):
        torch.testing.assert_close(kept, decay * before + (1 - decay) * new)
    run(trainee, pictures, 1, 6)
    assert trainee.tokenizer is not trainee.model
    assert trainee.tokenizer.config.amplitudes == trainee.model.config.amplitudes


def test_clips_of_an_inflated_tokenizer_train(pictures: np.ndarray, teacher: Path, tmp_path: Path) -> None:
    flat = ConvVisualTokenizer(CONFIG).eval()
    flat.save(tmp_path)
    config = dataclasses.replace(CONFIG, temporal_stride=4)
    trainee = ConvVisualTrainee(config, everything(teacher, warmup_share=0.0), init=tmp_path)
    given = pictures[:2]
    assert torch.equal(trainee.tokenizer.encode(given), flat.encode(given))
    before = [p.detach().clone() for p in trainee.model.parameters()]
    for step in range(6):
        clips = torch.from_numpy(pictures[step * 10 : step * 10 + 10].reshape(2, 5, 32, 32, 3))
        metrics = trainee.step(clips, step)
    assert "semantic" in metrics and "adversarial" in metrics
    for old, new in zip(before, trainee.model.parameters(), strict=True):
        assert old.ndim < 5 or not torch.equal(old[:, :, 0], new[:, :, 0])


def test_an_init_with_other_layers_is_refused(tmp_path: Path) -> None:
    ConvVisualTokenizer(dataclasses.replace(CONFIG, width=8)).save(tmp_path / "other")
    with pytest.raises(ConfigError, match="has width 8, this training 12"):
        ConvVisualTrainee(CONFIG, TRAINING, init=tmp_path / "other")
    PatchVisualTokenizer(PatchVisualTokenizerConfig(width=8)).save(tmp_path / "patch")
    with pytest.raises(ConfigError, match="is a 'patch' tokenizer"):
        ConvVisualTrainee(CONFIG, TRAINING, init=tmp_path / "patch")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps 0 must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate 0.0 must be above 0"),
        ({"perceptual_weight": -1.0}, "perceptual_weight -1.0 must be 0 or more"),
        ({"coarse_share": 1.5}, "coarse_share 1.5 is a share"),
        ({"flip_rate": 0.5}, "flip_rate 0.5 must lie in"),
        ({"average_decay": 1.0}, "average_decay 1.0 must lie in"),
        ({"absolute_weight": 0.0, "squared_weight": 0.0}, "nothing says what is right"),
        ({"semantic_weight": 0.1}, "needs teacher"),
    ],
)
def test_settings_that_cannot_be_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(TRAINING, **change)


# Collapse


def random_bits(count: int = 16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(2, (count, h, w, 12), generator=generator).float() for h, w in QUANTIZER.scales]


def test_healthy_bits_give_no_findings() -> None:
    assert collapse_findings(random_bits(), 20.0, 14.0) == []
    assert collapse_findings(random_bits(1), 20.0, 14.0) == []  # one picture cannot be alike, its scale 0 is not judged


def test_dead_bits_are_found_at_their_scale() -> None:
    bits = random_bits()
    bits[1][..., :3] = 1.0
    assert collapse_findings(bits, 20.0, 14.0) == []  # a quarter may
    bits[1][..., :4] = 1.0
    (finding,) = collapse_findings(bits, 20.0, 14.0)
    assert finding.startswith("scale 1: 4 of its 12 bits are the same")
    assert collapse_findings(bits, 20.0, 14.0, VisualCollapseLimits(dead=0.5)) == []


def test_pictures_that_are_coded_alike_are_found() -> None:
    bits = [part[:1].expand(16, -1, -1, -1).clone() for part in random_bits()]
    bits[2][3, 0, 0, 0] = 1 - bits[2][3, 0, 0, 0]
    findings = collapse_findings(bits, 20.0, 14.0)
    assert any(text.startswith("all 16 pictures are coded alike") for text in findings)


def test_reconstructions_no_better_than_flat_pictures_are_found() -> None:
    (finding,) = collapse_findings(random_bits(), 14.2, 14.0)
    assert finding.startswith("reconstructions have 14.20 dB, pictures of one flat colour 14.00 dB")


def test_collapsed_tokenizers_are_found(trained: ConvVisualTokenizer) -> None:
    given = list(gradients(10, 1))
    blind = ConvVisualTokenizer(CONFIG)  # an encoder that sees nothing
    with torch.no_grad():
        last = [p for p in blind.encoder.parameters() if p.ndim == 5][-1]
        last.zero_()
        next(p for p in reversed(list(blind.encoder.parameters())) if p.ndim == 1).copy_(torch.randn(12))
    found = " ".join(conv_visual_health(blind, given)["collapse"])
    assert "coded alike" in found and "bits are the same" in found and "nothing but the mean" in found
    mute = ConvVisualTokenizer(trained.config).eval()
    mute.load_state_dict(trained.state_dict())
    with torch.no_grad():
        mute.last_weight.zero_()
    (finding,) = conv_visual_health(mute, given)["collapse"]
    assert "nothing but the mean comes back" in finding


def test_health_of_several_sizes_names_them() -> None:
    tokenizer = ConvVisualTokenizer(CONFIG).eval()
    sizes = CONFIG.sizes
    assert len(sizes) == 2
    given = [np.random.default_rng(i).integers(0, 256, (*sizes[i % 2], 3), dtype=np.uint8) for i in range(6)]
    health = conv_visual_health(tokenizer, given)
    assert health["pictures"] == 6 and any(
        f"pictures of {sizes[1][0]}x{sizes[1][1]}: " in t for t in health["collapse"]
    )
    with pytest.raises(DataError, match="no pictures"):
        conv_visual_health(tokenizer, [])
    with pytest.raises(DataError, match="HxW one of"):
        conv_visual_health(tokenizer, [np.zeros((16, 16, 3), np.uint8)])


def test_limits_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"shares in 0\.\.1"):
        VisualCollapseLimits(dead=2.0)
