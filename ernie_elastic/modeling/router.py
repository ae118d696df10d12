"""The router of one layer: fp32 scores, a selection bias outside the combine weights, no modality input.

Letters: N positions, E experts (E' kept ones), K chosen, H hidden. paper: section 1.2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ernie_elastic.modeling.configuration import ErnieElasticConfig
from ernie_elastic.schema import RouterOutput


class ErnieElasticTopKRouter(nn.Module):
    """scores = softmax or sigmoid(logits); top-k of scores + bias; weights = scores, renormalised over the chosen."""

    def __init__(self, config: ErnieElasticConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.num_experts, config.hidden_size))
        # Moved by the trainer (aux-loss-free balance), never by a gradient.
        self.e_score_correction_bias = nn.Buffer(torch.zeros(config.num_experts, dtype=torch.float32))
        self.top_k = config.num_experts_per_tok
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


def count_routing(
    weights_NK: torch.Tensor, ids_NK: torch.Tensor, num_experts: int, valid_N: torch.Tensor | None
) -> RouterOutput:
    """Counts and routed mass per expert of weights [N, K] and ids int64 [N, K], padding (valid_N False) left out.

    ours: logits are never stored.
    """
    with torch.no_grad():
        ids, weights = ids_NK.detach(), weights_NK.detach().float()
        if valid_N is not None:
            ids, weights = ids[valid_N], weights[valid_N]
        counts_E = torch.bincount(ids.reshape(-1), minlength=num_experts)
        mass_E = torch.bincount(ids.reshape(-1), weights.reshape(-1), minlength=num_experts).float()
    return RouterOutput(weights_NK, ids_NK, counts_E, mass_E)
