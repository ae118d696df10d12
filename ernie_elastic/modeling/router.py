"""The router of one layer: fp32 scores, a selection bias outside the combine weights, no modality input.

Letters: N positions, E experts (E' kept ones), K chosen, H hidden. paper: section 1.2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ernie_elastic.modeling.configuration import ErnieElasticConfig


class ErnieElasticTopKRouter(nn.Module):
    """scores = softmax or sigmoid(logits); top-k of scores + bias; weights = scores, renormalised over the chosen."""

    def __init__(self, config: ErnieElasticConfig, layer_idx: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.num_experts, config.hidden_size))
        # Moved by the trainer (aux-loss-free balance), never by a gradient.
        self.e_score_correction_bias = nn.Buffer(torch.zeros(config.num_experts, dtype=torch.float32))
        self.top_k = config.full_spec().top_ks[layer_idx]
        self.num_experts = config.num_experts
        self.scoring = config.router_scoring
        self.norm_min = config.moe_norm_min

    def forward(
        self, hidden_states: torch.Tensor, kept_experts: torch.Tensor | None = None, top_k: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """hidden_states [N, H] -> logits float32 [N, E or E'], weights [N, K] in x's dtype, expert ids int64 [N, K].

        kept_experts int64 [E']: only these take part. Their rows alone are scored, which equals giving the others a
        logit of -inf, and makes the numbers bit-equal to those of an extracted model.
        """
        weight_EH: torch.Tensor = self.weight
        bias_E: torch.Tensor = self.e_score_correction_bias
        if kept_experts is not None:
            weight_EH, bias_E = weight_EH[kept_experts], bias_E[kept_experts]
        with torch.autocast(hidden_states.device.type, enabled=False):
            logits_NE = F.linear(hidden_states.float(), weight_EH.float())
            scores_NE = logits_NE.softmax(-1) if self.scoring == "softmax" else logits_NE.sigmoid()
            chosen_NK = (scores_NE + bias_E.float()).topk(top_k or self.top_k, dim=-1).indices
            weights_NK = scores_NE.gather(-1, chosen_NK)
            weights_NK = weights_NK / weights_NK.sum(-1, keepdim=True).clamp(min=self.norm_min)
        ids_NK = chosen_NK if kept_experts is None else kept_experts[chosen_NK]
        return logits_NE, weights_NK.to(hidden_states.dtype), ids_NK


def z_loss(logits_NE: torch.Tensor, valid_N: torch.Tensor | None) -> torch.Tensor:
    """Mean over valid positions of logsumexp(logits)^2: keeps router logits small. peer: ERNIE 4.5."""
    squared_N = logits_NE.logsumexp(-1).square()
    if valid_N is None:
        return squared_N.mean()
    return (squared_N * valid_N).sum() / valid_N.sum().clamp(min=1)


def orthogonal_loss(weight_EH: torch.Tensor) -> torch.Tensor:
    """Mean squared cosine between the router rows of different experts. peer: ERNIE 4.5 (idea; the form is ours)."""
    rows_EH = F.normalize(weight_EH.float(), dim=-1)
    cosine_EE = rows_EH @ rows_EH.T
    others = max(1, len(rows_EH) * (len(rows_EH) - 1))
    return (cosine_EE.square().sum() - cosine_EE.diagonal().square().sum()) / others
