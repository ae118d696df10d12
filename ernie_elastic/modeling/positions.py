"""Uni-RoPE: one rotary embedding over (t, h, w) for every modality.

Letters: B rows, T positions, P rotary pairs (half of the head), A heads, C head width.
paper: section 1.3; the pair split and the centring formula are ours, the report gives none.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from ernie_elastic.modeling.configuration import ErnieElasticConfig

# cos and sin float32 [B, T, P], and cos + i sin complex64 [B, T, P] where complex numbers may be used.
Rotary = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def axis_of_pair(section: list[int], layout: str) -> torch.Tensor:
    """Which axis each rotary pair turns with: int64 [P], 0 = t, 1 = h, 2 = w; pair 0 is the fastest.

    section: pairs for (h, w, t). "sectioned": h and w alternate on the fast pairs, t takes the slowest.
    "interleaved": h, w, t in turn while each lasts (ours: with a small head the slowest pairs barely move).
    """
    left = {1: section[0], 2: section[1], 0: section[2]}
    turns = (1, 2) if layout == "sectioned" else (1, 2, 0)
    axes: list[int] = []
    while any(left[axis] for axis in turns):
        for axis in turns:
            if left[axis]:
                axes.append(axis)
                left[axis] -= 1
    axes += [0] * left[0]
    return torch.tensor(axes)


class UniRotary(nn.Module):
    """Angles of every position: forward(position [B, T] or [B, T, 3]) -> cos, sin float32 [B, T, P]."""

    def __init__(self, config: ErnieElasticConfig) -> None:
        super().__init__()
        assert config.rope_parameters is not None and config.mrope_section is not None
        base = float(config.rope_parameters["rope_theta"])
        self.inv_freq = nn.Buffer(rotary_frequencies(base, config.head_dim), persistent=False)
        self.axis_P = nn.Buffer(axis_of_pair(config.mrope_section, config.mrope_layout), persistent=False)
        self.base, self.head_dim = base, config.head_dim
        self.section, self.layout = config.mrope_section, config.mrope_layout

    def forward(self, position: torch.Tensor) -> Rotary:
        """position float or int, [B, T] (text: t = h = w) or [B, T, 3]; returns float32 cos, sin [B, T, P], and cos + i
        sin as complex64 [B, T, P] (None in a compiled graph, which cannot hold complex numbers)."""
        position = position.float()
        if position.dim() == 2:
            angles_BTP = position[..., None] * self.inv_freq.float()
        else:
            angles_BTP = position[..., self.axis_P] * self.inv_freq.float()
        cos_BTP, sin_BTP = angles_BTP.cos(), angles_BTP.sin()
        return cos_BTP, sin_BTP, None if torch.compiler.is_compiling() else torch.complex(cos_BTP, sin_BTP)


def set_rope_base(model: PreTrainedModel, base: float) -> None:
    """Give a model another base of its rotary positions, in its config too; nothing when it has it already."""
    for module in model.modules():
        if isinstance(module, UniRotary) and module.base != base:
            module.base = base
            module.inv_freq.copy_(rotary_frequencies(base, module.head_dim))
            model.config.rope_parameters["rope_theta"] = base


def rotary_frequencies(base: float, head_dim: int) -> torch.Tensor:
    """float32 [P] angles per unit of position."""
    return 1.0 / base ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)


def apply_rotary(
    x_BATC: torch.Tensor, cos_BTP: torch.Tensor, sin_BTP: torch.Tensor, cis_BTP: torch.Tensor | None = None
) -> torch.Tensor:
    """Turn neighbouring pairs (interleaved, as ERNIE 4.5 does) in fp32; returns x's dtype and shape [B, A, T, C]."""
    if cis_BTP is not None and x_BATC.dtype == torch.float32 and not torch.compiler.is_compiling():
        # One complex product each way instead of four real ones and a stack.
        pairs = torch.view_as_complex(x_BATC.unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * cis_BTP[:, None]).flatten(-2)
    even, odd = x_BATC[..., 0::2].float(), x_BATC[..., 1::2].float()
    cos, sin = cos_BTP[:, None], sin_BTP[:, None]
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
    return turned.flatten(-2).to(x_BATC.dtype)
