"""Run under torchrun (or alone): learns on this rank's share of fixed batches; each rank writes what it has.

usage: tokenizer_worker.py OUT_DIRECTORY books|codec|visual|refiner
"""

import sys
from pathlib import Path
from typing import Any

import torch

from ernie_elastic.modeling.refiner import RefinerConfig
from ernie_elastic.tokenizer_training.audio.seanet import SeanetTrainee, SeanetTrainingConfig
from ernie_elastic.tokenizer_training.refiner.train import RefinerTrainee, RefinerTrainingConfig
from ernie_elastic.tokenizer_training.visual.conv import ConvVisualTrainee
from ernie_elastic.tokenizer_training.visual.settings import ConvVisualTrainingConfig
from ernie_elastic.tokenizers.audio.residual_codebooks import CodebookConfig, ResidualCodebooks
from ernie_elastic.tokenizers.audio.seanet import SeanetAudioTokenizerConfig
from ernie_elastic.tokenizers.visual.conv_config import conv_visual_config
from ernie_elastic.training.ranks import group, rank, world_size

SOUNDS = 4  # of all ranks together
LENGTH = 25


def share(items: torch.Tensor) -> torch.Tensor:
    """This rank's part of a batch [N, ...]."""
    own = len(items) // world_size()
    return items[rank() * own : (rank() + 1) * own]


def learn_books() -> dict[str, Any]:
    """Codebooks on features that drift, so that codes die and are restarted."""
    torch.manual_seed(0)
    books = ResidualCodebooks(CodebookConfig(6, 3, 16, code_dim=5, split_semantic=True, decay=0.5, restart_below=0.2))
    restarted = 0.0
    for step in range(12):
        latent = share(torch.randn(SOUNDS, LENGTH, 6, generator=torch.Generator().manual_seed(step)) + 0.5 * step)
        # Another generator on each rank on purpose: rank 0's draws count.
        generator = torch.Generator().manual_seed(step + 1000 * rank())
        if not step:
            books.initialise(latent, generator)
        restarted += sum(books.learn(books.quantise(latent), generator)["restarted"])
    return {"state": books.state_dict(), "restarted": restarted}


def train_codec() -> dict[str, Any]:
    """A whole codec, with what ranks draw for themselves (dropout, noise) switched off."""
    config = SeanetAudioTokenizerConfig(
        sample_rate=3000, strides=(5, 4, 3, 4), width=4, max_width=8, latent_width=8, num_levels=2, codebook_size=8,
        decay=0.8,
    )  # fmt: skip
    training = SeanetTrainingConfig(
        steps=4, quantise_start=0.25, quantiser_dropout=0.0, mel_noise=0.0, learning_rate=1e-3, warmup_steps=0,
        adversarial_weight=0.5, adversarial_start=0.5, discriminator_width=2, lecam_weight=0.1,
    )  # fmt: skip
    trainee = SeanetTrainee(config, training)
    start = {name: value.clone() for name, value in weights_of(trainee).items()}
    for step in range(4):
        waves = torch.randn(SOUNDS, 10 * config.step_samples, generator=torch.Generator().manual_seed(step)) * 0.3
        trainee.step(share(waves), step)
    return {"state": weights_of(trainee), "start": start}


def weights_of(trainee: SeanetTrainee) -> dict[str, torch.Tensor]:
    """Codec and discriminator."""
    assert trainee.discriminator is not None
    return {**trainee.tokenizer.state_dict(), **trainee.discriminator.state_dict()}


def train_visual() -> dict[str, Any]:
    """The convolutional tokenizer with its discriminator; amplitudes are measured on the way."""
    config = conv_visual_config(32, 8, 6, num_scales=3, width=4, bit_series=(3, 6))
    training = ConvVisualTrainingConfig(
        steps=6, warmup_share=0.5, warmup_steps=0, learning_rate=1e-3, adversarial_weight=0.1, adversarial_start=0.5,
        discriminator_width=4, lecam_weight=0.1, perceptual_weight=0.1, average_decay=0.5,
    )  # fmt: skip
    trainee = ConvVisualTrainee(config, training)
    for step in range(6):
        trainee.step(share(pictures(step)), step)
    assert trainee.discriminator is not None
    state = {**trainee.tokenizer.state_dict(), **trainee.discriminator.state_dict()}
    return {"state": {**state, "amplitudes": torch.tensor(trainee.tokenizer.config.amplitudes, dtype=torch.float64)}}


def train_refiner() -> dict[str, Any]:
    """The refiner's averaged weights."""
    trainee = RefinerTrainee(RefinerConfig(width=4, blocks=1), RefinerTrainingConfig(steps=4, warmup_steps=0))
    for step in range(4):
        trainee.step(share(pictures(step)), step)
    return {"state": trainee.refiner.state_dict()}


def pictures(step: int) -> torch.Tensor:
    """uint8 [SOUNDS, 1, 32, 32, 3], blocks of colour."""
    small = torch.rand(SOUNDS, 3, 4, 4, generator=torch.Generator().manual_seed(step))
    return (255 * small.repeat_interleave(8, 2).repeat_interleave(8, 3)).byte().movedim(1, -1)[:, None]


def main() -> None:
    torch.set_num_threads(1)
    with group(60.0):
        makers = {"books": learn_books, "codec": train_codec, "visual": train_visual, "refiner": train_refiner}
        found = makers[sys.argv[2]]()
        torch.save(found, Path(sys.argv[1]) / f"rank{rank()}.pt")


if __name__ == "__main__":
    main()
