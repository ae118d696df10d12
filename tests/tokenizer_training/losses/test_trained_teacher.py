"""Teachers that were trained here, on the world: what perceptual, semantic and Fréchet measures say of them is true."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

from ernie_elastic.data.world.facts import COLOURS
from ernie_elastic.data.world.scenes import WorldConfig, draw_scene, random_scene, world_rng
from ernie_elastic.tokenizer_training.losses.perceptual import VisionTeacher, feature_distance, frechet_distance
from ernie_elastic.tokenizer_training.visual.conv import ConvVisualTrainee, ConvVisualTrainingConfig
from ernie_elastic.tokenizers.visual.conv import conv_visual_config

STEPS, BATCH = 250, 32


def scenes(start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures of one object uint8 [N, 32, 32, 3] and the numbers of their colours."""
    config, pictures, colours = WorldConfig(image_size=32), [], []
    for index in range(start, start + count):
        scene = random_scene(world_rng(0, index, "train", "teacher"), config, "train", 1)
        pictures.append(draw_scene(scene, 32))
        colours.append(COLOURS.index(scene.objects[0].colour))
    return torch.from_numpy(np.stack(pictures)), torch.tensor(colours)


def values(pictures: torch.Tensor) -> torch.Tensor:
    return (pictures.float() / 127.5 - 1).movedim(-1, 1)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small ViT that names the colour of the object."""
    torch.manual_seed(0)
    model = ViTForImageClassification(
        ViTConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32,
            patch_size=8, num_labels=len(COLOURS),
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for step in range(STEPS):
        pictures, colours = scenes(step * BATCH, BATCH)
        loss = model(pixel_values=values(pictures), labels=colours).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    pictures, colours = scenes(100_000, 200)
    with torch.inference_mode():
        right = (model.eval()(pixel_values=values(pictures)).logits.argmax(-1) == colours).float().mean()
    assert float(right) > 0.9
    directory = tmp_path_factory.mktemp("teacher")
    model.save_pretrained(directory)
    return directory


def test_features_tell_other_colours_apart(teacher: Path) -> None:
    """Two pictures of one colour are nearer than two of different colours, though their pixels may differ more."""
    vision = VisionTeacher.load(teacher)
    pictures, colours = scenes(200_000, 200)
    with torch.inference_mode():
        pooled = torch.nn.functional.normalize(
            vision.pooled(values(pictures)) - vision.pooled(values(pictures)).mean(0)
        )
    alike = pooled @ pooled.T
    same = colours[:, None] == colours[None]
    off = ~torch.eye(len(colours), dtype=torch.bool)
    assert float(alike[same & off].mean()) > float(alike[~same].mean()) + 0.5


def test_distances_grow_with_damage(teacher: Path) -> None:
    vision = VisionTeacher.load(teacher)
    pictures, _ = scenes(300_000, 64)
    clean = values(pictures)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        local = [float(feature_distance(vision, clean, clean + size * noise).mean()) for size in (0.0, 0.1, 0.4)]
        reference = vision.pooled(clean)
        whole = [frechet_distance(reference, vision.pooled(clean + size * noise)) for size in (0.0, 0.1, 0.4)]
    assert local[0] == pytest.approx(0, abs=1e-6) and local[0] < local[1] < local[2]
    assert whole[0] == pytest.approx(0, abs=1e-3) and whole[0] < whole[1] < whole[2]


def test_the_semantic_loss_brings_the_bits_nearer_to_the_teacher(teacher: Path) -> None:
    config = conv_visual_config(32, 8, 12, (), width=12, multipliers=(1, 2, 2), bit_series=(12,))
    ends = []
    for weight in (1.0, 1e-6):  # the second measures without teaching
        training = ConvVisualTrainingConfig(
            steps=60,
            batch_size=16,
            learning_rate=2e-3,
            warmup_steps=5,
            warmup_share=0.1,
            semantic_weight=weight,
            teacher=teacher,
        )
        trainee = ConvVisualTrainee(config, training, seed=0)
        metrics = [trainee.step(scenes(step * 16, 16)[0][:, None], step) for step in range(60)]
        found = [one["semantic"] for one in metrics if "semantic" in one]  # of bits: none while noise stands for them
        ends.append((np.mean(found[:5]), np.mean(found[-10:])))
    (first, last), (_, untaught) = ends
    assert last < 0.75 * first and last < 0.9 * untaught
