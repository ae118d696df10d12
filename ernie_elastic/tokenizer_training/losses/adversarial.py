"""Losses of a generator and a discriminator: hinge, feature matching, LeCam, and the weight that balances them.

Contract: pure functions of their arguments, but for `LeCam`, which remembers two averages. What several processes must
agree on (the averages of `LeCam`, the weight of `adaptive_weight`) is summed over all of them, so every process calls
it in every step. paper: section 2.2 names an adversarial loss and no formula; VideoAR's tokenizer adds LeCam.

Shape letters: none of its own; logits have any shape, which need not be the same for real and fake.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ernie_elastic.errors import ConfigError
from ernie_elastic.training.ranks import all_reduce_sum, world_size

SMALLEST = 1e-6  # features whose mean size is below it count as this size


def hinge_discriminator_loss(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """Scalar: mean of relu(1 - real) plus mean of relu(1 + fake), of logits of any shape. 2 where all logits are 0.

    background: hinge loss (Lim and Ye 2017), without the factor 1/2 that some write before it.
    """
    return F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean()


def hinge_generator_loss(fake: torch.Tensor) -> torch.Tensor:
    """Scalar: minus the mean of the discriminator's logits of any shape on what the generator made. background."""
    return -fake.mean()


def feature_matching_loss(real_features: Sequence[torch.Tensor], fake_features: Sequence[torch.Tensor]) -> torch.Tensor:
    """Scalar: mean over layers of mean |real - fake| / mean |real|; layer by layer the same shape.

    The real features are targets: no gradient flows to them. background: MelGAN; the division by the size of the real
    features (EnCodec) makes layers count alike. Raises ConfigError when there are no layers or not the same number.
    """
    if not real_features or len(real_features) != len(fake_features):
        raise ConfigError(
            f"feature matching: {len(real_features)} real and {len(fake_features)} fake layers; both must come from "
            "one discriminator, with at least one layer"
        )
    parts = []
    for real, fake in zip(real_features, fake_features, strict=True):
        target = real.detach()
        parts.append((fake - target).abs().mean() / target.abs().mean().clamp(min=SMALLEST))
    return torch.stack(parts).mean()


class LeCam:
    """Keeps the discriminator's logits near where they were: it stays weak enough to teach when data are few.

    background: Tseng et al. 2021, "Regularizing generative adversarial networks under limited data", with the hinged
    form of its public code. Moving averages of the mean logit on real and on made data are the anchors; both are equal
    on all ranks. ours: the averages start at the first step's means, not at 0.
    """

    def __init__(self, decay: float = 0.99) -> None:
        """decay: of the moving averages, per update. Raises ConfigError unless it lies in [0, 1)."""
        if not 0.0 <= decay < 1.0:
            raise ConfigError(f"LeCam: decay {decay} must lie in [0, 1)")
        self.decay = decay
        self.real: float | None = None
        self.fake: float | None = None

    def penalty(self, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
        """Scalar: mean of relu(real - average fake)^2 plus mean of relu(average real - fake)^2, of logits of any shape.

        A constant 0 before the first `update`: there is nothing to stay near to.
        """
        if self.real is None or self.fake is None:
            return real.new_zeros(())
        return F.relu(real - self.fake).square().mean() + F.relu(self.real - fake).square().mean()

    @torch.no_grad()
    def update(self, real: torch.Tensor, fake: torch.Tensor) -> None:
        """Take in the logits of a step, of any shape; all ranks call it together."""
        sums = [real.double().sum(), real.new_tensor(real.numel(), dtype=torch.float64)]
        sums += [fake.double().sum(), fake.new_tensor(fake.numel(), dtype=torch.float64)]
        real_sum, real_count, fake_sum, fake_count = all_reduce_sum(torch.stack(sums)).tolist()
        self.real = self._moved(self.real, real_sum / real_count)
        self.fake = self._moved(self.fake, fake_sum / fake_count)

    def _moved(self, old: float | None, new: float) -> float:
        return new if old is None else self.decay * old + (1.0 - self.decay) * new

    def state_dict(self) -> dict[str, Any]:
        """The two averages (None before the first update)."""
        return {"real": self.real, "fake": self.fake}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.real, self.fake = state["real"], state["fake"]


def adaptive_weight(
    reconstruction_loss: torch.Tensor, generator_loss: torch.Tensor, last_layer_weight: torch.Tensor, limit: float = 1e4
) -> torch.Tensor:
    """Scalar without gradient: the weight that gives the generator loss a gradient as large as the reconstruction's.

    The ratio of the norms of both gradients with respect to the decoder's last weight (any shape), at most `limit`.
    0 when the generator loss has no gradient there. Both losses are scalars whose graphs are kept. background: VQGAN.
    ours: the norms are those of the mean gradients over ranks, so that ranks agree and match one large batch.
    """
    gradients = [
        torch.autograd.grad(loss, last_layer_weight, retain_graph=True)[0]
        for loss in (reconstruction_loss, generator_loss)
    ]
    mean = all_reduce_sum(torch.stack([gradient.flatten() for gradient in gradients])) / world_size()
    reconstruction_norm, generator_norm = mean.norm(dim=1).unbind()
    ratio = (reconstruction_norm / generator_norm).clamp(max=limit)
    return torch.where(generator_norm > 0, ratio, torch.zeros_like(ratio))
