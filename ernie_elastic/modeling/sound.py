"""The reader of sounds as continuous features. Letters: N steps of all sounds, F features of a step, H hidden."""

from __future__ import annotations

import torch
from torch import nn

from ernie_elastic.modeling.attention import RMSNorm
from ernie_elastic.modeling.configuration import ErnieElasticConfig
from ernie_elastic.modeling.understanding import Block


class SoundEncoder(nn.Module):
    """Continuous features of 80 ms steps to embeddings, causal inside each sound.

    ours: the report reads sounds as codes; as for pictures, features before quantisation keep what codes lose. Causal,
    so that a sound can be read while it is still being recorded.
    """

    def __init__(self, config: ErnieElasticConfig) -> None:
        super().__init__()
        width = config.understanding_width
        self.project = nn.Linear(config.audio_feature_size, width)
        self.layers = nn.ModuleList(
            Block(width, config.understanding_heads, config.rms_norm_eps) for _ in range(config.audio_encoder_layers)
        )
        self.norm = RMSNorm(width, config.rms_norm_eps)
        self.out = nn.Linear(width, config.hidden_size, bias=False)
        for part in self.modules():
            if isinstance(part, nn.Linear):
                part.initializer_std = part.weight[0].numel() ** -0.5

    def forward(self, features_NF: torch.Tensor, item_N: torch.Tensor) -> torch.Tensor:
        """float32 [N, F] of all sounds in order, and the number of each step's sound int64 [N] -> [N, H]."""
        x = self.project(features_NF.to(self.out.weight.dtype))[None]
        order = torch.arange(len(item_N), device=item_N.device)
        mask = (item_N[:, None] == item_N[None]) & (order[None] <= order[:, None])
        for layer in self.layers:
            x = layer(x, mask)
        return self.out(self.norm(x))[0]
