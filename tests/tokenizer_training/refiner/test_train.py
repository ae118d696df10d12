"""Training a refiner: it learns, resumes to the bit, takes a tokenizer's artefacts; the health table and comparison."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ernie_elastic.data.media.degradation import DegradationConfig
from ernie_elastic.errors import ConfigError, DataError
from ernie_elastic.modeling.refiner import RefinerConfig
from ernie_elastic.tokenizer_training.refiner.health import refiner_health, ssim, write_comparison
from ernie_elastic.tokenizer_training.refiner.train import RefinerTrainee, RefinerTrainingConfig
from ernie_elastic.tokenizers.visual.patch import PatchVisualTokenizer, PatchVisualTokenizerConfig

CONFIG = RefinerConfig(width=12, multipliers=(1,), blocks=1, residual_scale=0.2, sigma=0.3, steps=2)
PLAIN = DegradationConfig(kernels=("area",), undegraded_share=1.0)


def training(**fields: object) -> RefinerTrainingConfig:
    defaults = {"steps": 60, "batch_size": 4, "crop": 32, "learning_rate": 2e-2, "warmup_steps": 5, "ema_decay": 0.9,
                "start_share": 0.5, "perceptual_weight": 0.0, "degradation": PLAIN}  # fmt: skip
    return RefinerTrainingConfig(**{**defaults, **fields})  # type: ignore[arg-type]


def bars(seed: int, side: int = 32) -> np.ndarray:
    """Bars with hard edges in two greys, along rows or columns, uint8 [side, side, 3]: what bicubic blurs is known."""
    rng = np.random.default_rng(seed)
    on = (np.arange(side) + 2 * rng.integers(4) + 1) // 4 % 2
    pixels_HW = np.tile(np.where(on, 210, 40), (side, 1))
    return np.repeat((pixels_HW.T if rng.random() < 0.5 else pixels_HW)[..., None], 3, axis=2).astype(np.uint8)


def batch(step: int, count: int = 4) -> torch.Tensor:
    return torch.from_numpy(np.stack([bars(1000 * step + number + 50) for number in range(count)]))[:, None]


def test_it_learns_and_beats_bicubic_on_held_out_pictures() -> None:
    trainee = RefinerTrainee(CONFIG, training(), seed=0)
    metrics = [trainee.step(batch(step), step) for step in range(60)]
    shares = [row["endpoint_error"] / row["bicubic_error"] for row in metrics]
    assert np.mean(shares[-10:]) < 0.6 * np.mean(shares[:5])
    assert np.mean([row["loss"] for row in metrics[-10:]]) < np.mean([row["loss"] for row in metrics[:5]])
    table = refiner_health(trainee.refiner, [bars(seed) for seed in range(8)], PLAIN, steps=(1, 2))
    rows = {row["case"]: row for row in table["rows"]}
    assert list(rows) == ["plain", "bicubic", "refined, 1 step", "refined, 2 steps", "refined, 2 steps, temperature 1"]
    assert rows["bicubic"]["psnr_db"] > rows["plain"]["psnr_db"]
    for case in ("refined, 1 step", "refined, 2 steps"):
        assert rows[case]["psnr_db"] > rows["bicubic"]["psnr_db"] + 0.5
    assert rows["refined, 1 step"]["ssim"] > rows["bicubic"]["ssim"]


def test_gradients_reach_all_parameters() -> None:
    trainee = RefinerTrainee(CONFIG, training(), seed=0)
    for step in range(2):  # the first step moves the last layer alone, which starts at 0
        trainee.step(batch(step), step)
    without = [name for name, value in trainee.network.named_parameters() if not value.grad.abs().sum() > 0]  # type: ignore[union-attr]
    assert not without


def test_a_resumed_training_gives_the_same_bits() -> None:
    fields = {"perceptual_weight": 0.5, "degradation": DegradationConfig()}
    whole = RefinerTrainee(CONFIG, training(**fields), seed=3)
    first = RefinerTrainee(CONFIG, training(**fields), seed=3)
    for step in range(4):
        whole.step(batch(step), step)
    for step in range(2):
        first.step(batch(step), step)
    stream = io.BytesIO()
    torch.save(first.state_dict(), stream)
    second = RefinerTrainee(CONFIG, training(**fields), seed=3)
    second.load_state_dict(torch.load(io.BytesIO(stream.getvalue()), weights_only=True))
    last = {}
    for step in range(2, 4):
        torch.randn(7)  # the global generator plays no part
        last = second.step(batch(step), step)
    assert "perceptual" in last
    for one, other in ((whole.network, second.network), (whole.refiner, second.refiner)):
        for name, value in one.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), name


def test_the_result_is_an_average_of_the_weights() -> None:
    trainee = RefinerTrainee(CONFIG, training(ema_decay=0.5), seed=0)
    mean = {name: value.clone() for name, value in trainee.network.named_parameters()}
    for step in range(3):
        trainee.step(batch(step), step)
        decay = min(0.5, (1 + step) / (10 + step))
        for name, value in trainee.network.named_parameters():
            mean[name].mul_(decay).add_(value.detach(), alpha=1 - decay)
    for name, value in trainee.refiner.named_parameters():
        torch.testing.assert_close(value, mean[name].detach())


def test_a_perceptual_weight_of_0_costs_nothing_and_another_changes_the_gradient() -> None:
    results = []
    for weight in (0.0, 1.0):
        trainee = RefinerTrainee(CONFIG, training(perceptual_weight=weight), seed=0)
        metrics = trainee.step(batch(0), 0)
        assert ("perceptual" in metrics) == bool(weight)
        results.append(metrics["gradient_norm"])
    assert results[0] != results[1]


def test_the_condition_goes_through_the_tokenizer(tmp_path: Path) -> None:
    config = PatchVisualTokenizerConfig(image_size=16, scales=((1, 1), (2, 2)), amplitudes=(0.4, 0.8), width=16)
    PatchVisualTokenizer(config).eval().save(tmp_path)
    errors = []
    for tokenizer in (None, tmp_path):
        trainee = RefinerTrainee(CONFIG, training(tokenizer=tokenizer), seed=0)
        errors.append(trainee.step(batch(0), 0)["bicubic_error"])
    assert errors[1] > 1.5 * errors[0]  # an untrained tokenizer loses most of the picture
    trainee = RefinerTrainee(CONFIG, training(tokenizer=tmp_path, crop=64), seed=0)
    with pytest.raises(DataError, match="16"):
        trainee.step(torch.zeros(1, 1, 64, 64, 3, dtype=torch.uint8), 0)


def test_health_takes_any_sizes_and_the_comparison_shows_four_pictures(tmp_path: Path) -> None:
    trainee = RefinerTrainee(CONFIG, training(), seed=0)
    pictures = [bars(0, 33), bars(1, 24)]
    table = refiner_health(trainee.refiner, pictures, DegradationConfig(), steps=(1,), level=0.5)
    rows = {row["case"]: row for row in table["rows"]}
    assert table["pictures"] == 2 and table["level"] == 0.5
    # A network that has learned nothing gives bicubic.
    assert {**rows["refined, 1 step"], "case": ""} == {**rows["bicubic"], "case": ""}
    write_comparison(tmp_path / "sheet.png", trainee.refiner, pictures, PLAIN)
    sheet = np.array(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (32 + 4 + 24, 4 * 32 + 3 * 4, 3)
    assert np.array_equal(sheet[:32, -32:], pictures[0][:32, :32])
    assert np.array_equal(sheet[36:, 3 * 28 : 3 * 28 + 24], pictures[1])
    with pytest.raises(DataError, match="no pictures"):
        refiner_health(trainee.refiner, [], PLAIN)
    with pytest.raises(ConfigError, match=r"\.png"):
        write_comparison(tmp_path / "sheet.jpg", trainee.refiner, pictures, PLAIN)


def test_ssim_agrees_with_its_definition() -> None:
    pixels = torch.from_numpy(bars(3))[None]
    noise = torch.randint(-30, 30, pixels.shape, generator=torch.Generator().manual_seed(0))
    noisy = (pixels.int() + noise).clamp(0, 255).to(torch.uint8)
    assert float(ssim(pixels, pixels)) == pytest.approx(1.0, abs=1e-5)
    assert float(ssim(noisy, pixels)) < 0.99
    # Two flat pictures differ in brightness alone: (2ab + c) / (a^2 + b^2 + c).
    a, b = (torch.full((1, 16, 16, 3), value, dtype=torch.uint8) for value in (100, 150))
    assert float(ssim(a, b)) == pytest.approx((30000 + 6.5025) / (10000 + 22500 + 6.5025), abs=1e-3)


def test_bad_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="crop 33"):
        RefinerTrainee(CONFIG, training(crop=33), seed=0)
    for wrong in ({"steps": 0}, {"learning_rate": 0.0}, {"start_share": 2.0}, {"ema_decay": 1.0}, {"time_floor": 0.0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            training(**wrong)
    trainee = RefinerTrainee(CONFIG, training(), seed=0)
    for bad in (batch(0)[:, 0], batch(0).float(), batch(0)[:0], torch.zeros(1, 1, 1, 1, 3, dtype=torch.uint8)):
        with pytest.raises(DataError):
            trainee.step(bad, 0)
