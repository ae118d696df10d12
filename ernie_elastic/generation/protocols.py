"""What the decoder and the packed entry need of a causal model, so that the model can be made of them."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn

from ernie_elastic.modeling.configuration import ErnieElasticConfig
from ernie_elastic.modeling.model import ErnieElasticModel


class CausalModel(Protocol):
    """A stack with a text head: `ErnieElasticForCausalLM`, and whatever offers as much."""

    config: ErnieElasticConfig
    model: ErnieElasticModel
    lm_head: nn.Linear

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
