"""Run under torchrun (or alone): learns on this rank's share of fixed batches; each rank writes what it has.

usage: codebook_worker.py OUT_DIRECTORY books|codec
"""

import sys
from pathlib import Path
from typing import Any

import torch

from ernie_elastic.tokenizers.audio_seanet import SeanetAudioTokenizerConfig
from ernie_elastic.tokenizers.residual_codebooks import CodebookConfig, ResidualCodebooks
from ernie_elastic.training.ranks import group, rank, world_size
from ernie_elastic.training.tokenizer_audio_seanet import SeanetTrainee, SeanetTrainingConfig

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


def main() -> None:
    torch.set_num_threads(1)
    with group(60.0):
        found = {"books": learn_books, "codec": train_codec}[sys.argv[2]]()
        torch.save(found, Path(sys.argv[1]) / f"rank{rank()}.pt")


if __name__ == "__main__":
    main()
