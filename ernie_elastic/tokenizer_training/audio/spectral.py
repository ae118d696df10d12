"""Trains the audio tokenizer: principal directions of spectra, then residual k-means code books with restarts.

Contract: the result is a function of (waves, configs, seed). Waves come as any iterable of mono arrays at the
config's sample rate; nothing here knows the embedded world. ours: k-means in place of a neural codec with EMA code
books; the restart of dead codes is the same cure for collapse.

Shape letters: S steps, F features, C components, V codes of a level, Q levels, L samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ernie_elastic.errors import ConfigError, DataError
from ernie_elastic.stages import progress
from ernie_elastic.tokenizers.audio.spectral import SpectralAudioTokenizer, SpectralAudioTokenizerConfig
from ernie_elastic.tokenizers.quantizers import rvq_decode

DEAD_COUNT = 2  # a code that fewer steps choose is restarted
RESTART_ROUNDS = 0.8  # share of the rounds in which codes are restarted; the last ones only settle


@dataclass(frozen=True)
class AudioTrainingConfig:
    """Budget of the audio tokenizer.

    rounds: k-means rounds of each level. power_rounds: rounds of the randomised decomposition that finds the
    principal directions.
    """

    rounds: int = 30
    power_rounds: int = 3

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.power_rounds < 1:
            raise ConfigError(
                f"audio training: rounds {self.rounds} and power_rounds {self.power_rounds} must be at least 1"
            )


def train_audio_tokenizer(
    waves: Iterable[np.ndarray],
    config: SpectralAudioTokenizerConfig,
    training: AudioTrainingConfig | None = None,
    seed: int = 0,
) -> tuple[SpectralAudioTokenizer, dict[str, Any]]:
    """An audio tokenizer fitted to `waves` (float32 [L] each) and its health on them.

    Health: number of steps, energy share that the components keep (`audio_health` has the rest). Raises DataError
    when there are fewer steps than codes or components.
    """
    training = training or AudioTrainingConfig()
    tokenizer = SpectralAudioTokenizer(config)
    features_SF = torch.cat(tokenizer.features(list(waves)))
    if len(features_SF) <= max(config.codebook_size, config.num_components):
        raise DataError(
            f"audio tokenizer: {len(features_SF)} steps are too few for {config.codebook_size} codes and "
            f"{config.num_components} components; give more sound"
        )
    generator = torch.Generator().manual_seed(seed)
    # Not centred: zero features, which are silence, stay the zero vector.
    tokenizer.basis_FC.copy_(principal_directions(features_SF, config.num_components, training.power_rounds, generator))
    residual_SC = tokenizer.project(features_SF)
    kept = float(residual_SC.square().sum() / features_SF.square().sum())
    bar = progress(total=config.num_levels * training.rounds, desc="audio code books", unit="round")
    for level in range(config.num_levels):
        codebook_VC, code_S = kmeans(residual_SC, config.codebook_size, training.rounds, generator, bar.update)
        tokenizer.codebooks_QVC[level] = codebook_VC
        residual_SC = residual_SC - codebook_VC[code_S]
    bar.close()
    tokenizer.eval()
    return tokenizer, {"train_steps": len(features_SF), "component_energy": round(kept, 4)}


def principal_directions(
    points_SF: torch.Tensor, count: int, power_rounds: int, generator: torch.Generator
) -> torch.Tensor:
    """Orthonormal directions float32 [F, count] of largest energy of points [S, F].

    background: randomised range finder with power rounds.
    """
    spare = min(count + 16, *points_SF.shape)
    basis_FR = torch.randn(points_SF.shape[1], spare, generator=generator)
    for _ in range(power_rounds):
        basis_FR = torch.linalg.qr(points_SF.T @ (points_SF @ basis_FR)).Q
    inside_SR = points_SF @ basis_FR
    _, vectors_RR = torch.linalg.eigh((inside_SR.T @ inside_SR).double())
    directions_FC = basis_FR @ vectors_RR.flip(1)[:, :count].float()
    # The sign of an eigenvector is arbitrary; fix it so that code books do not depend on the linear algebra library.
    largest_1C = directions_FC.gather(0, directions_FC.abs().argmax(dim=0, keepdim=True))
    return directions_FC * largest_1C.sign()


def kmeans(
    points_SC: torch.Tensor,
    count: int,
    rounds: int,
    generator: torch.Generator,
    after_round: Callable[[], object] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(centres float32 [count, C], index of the nearest one int64 [S]) of points float32 [S, C].

    Centre 0 is the zero vector and stays it. Starts from far-apart points (k-means++).
    Another centre that fewer than DEAD_COUNT points choose moves to the point that is farthest from its own centre.
    after_round() is called after each round.
    """
    centres_VC = _spread_start(points_SC, count, generator)
    for number in range(rounds):
        distance_S, code_S = torch.cdist(points_SC, centres_VC).min(dim=1)
        counts_V = torch.bincount(code_S, minlength=count)
        sums_VC = torch.zeros_like(centres_VC).index_add_(0, code_S, points_SC)
        centres_VC = torch.where(counts_V[:, None] > 0, sums_VC / counts_V.clamp(min=1)[:, None], centres_VC)
        centres_VC[0] = 0.0
        dead = 1 + (counts_V[1:] < DEAD_COUNT).nonzero()[:, 0]
        if len(dead) and number < RESTART_ROUNDS * rounds:
            centres_VC[dead] = points_SC[distance_S.topk(len(dead)).indices]
        if after_round is not None:
            after_round()
    return centres_VC, torch.cdist(points_SC, centres_VC).argmin(dim=1)


def _spread_start(points_SC: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    chosen: list[int] = []
    distance_S = points_SC.square().sum(dim=1)
    for _ in range(count - 1):
        # Equal points have distance zero everywhere: then any point is as good as another.
        weights_S = distance_S if bool(distance_S.max() > 0) else torch.ones_like(distance_S)
        index = int(torch.multinomial(weights_S, 1, generator=generator))
        chosen.append(index)
        distance_S = torch.minimum(distance_S, (points_SC - points_SC[index]).square().sum(dim=1))
    return torch.cat([torch.zeros_like(points_SC[:1]), points_SC[chosen]])


@torch.no_grad()
def audio_health(tokenizer: SpectralAudioTokenizer, waves: Iterable[np.ndarray]) -> dict[str, Any]:
    """Numbers on `waves` (float32 [L] each): for each level its codes' perplexity, share in use, and the
    signal-to-noise ratio in dB of the compressed magnitudes after it; bits per second.
    """
    features_SF = torch.cat(tokenizer.features(list(waves)))
    codes_SQ = torch.cat(tokenizer.encode_batch(list(waves)))
    config = tokenizer.config
    levels: list[dict[str, float]] = []
    for level in range(config.num_levels):
        share_V = torch.bincount(codes_SQ[:, level], minlength=config.codebook_size).double() / len(codes_SQ)
        entropy = float(-(share_V * (share_V + 1e-12).log()).sum())
        books = tokenizer.codebooks_QVC[: level + 1]
        decoded_SF = tokenizer.unproject(rvq_decode(codes_SQ[:, : level + 1], books))
        noise = float((decoded_SF - features_SF).square().sum())
        ratio = 10 * math.log10(float(features_SF.square().sum()) / max(noise, 1e-12))
        levels.append({
            "perplexity": round(math.exp(entropy), 2),
            "used_share": round(float((share_V > 0).double().mean()), 4),
            "snr_db": round(ratio, 2),
        })  # fmt: skip
    step_rate = config.sample_rate / config.step_samples
    bits = config.num_levels * math.log2(config.codebook_size) * step_rate
    return {"levels": levels, "bits_per_second": round(bits, 1), "steps_per_second": step_rate}
