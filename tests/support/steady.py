"""Training whose result does not hang on rounding, so that orders of sums and processors can be compared.

Two things make the last bit of a sum decide more than that bit. AdamW moves an element by the sign alone where its
gradient is rounding and no more (a router that chooses one expert has such a gradient everywhere), and a router at a
tie sends a position to another expert. The first is kept away, the second is measured.
"""

from __future__ import annotations

from typing import Any

import torch

from ernie_elastic.modeling.router import ErnieElasticTopKRouter

# Far above the rounding of a gradient (1e-9 in the tiny models), below most of the gradients themselves (1e-3).
ADAM_EPS = 1e-4


def without_noise_steps(engine: Any) -> None:
    """Raise the epsilon of an engine's AdamW: gradients far below ADAM_EPS hardly move their elements."""
    optimizer = engine.engine.optimizer if hasattr(engine, "engine") else engine.optimizer
    for group in optimizer.param_groups:
        group["eps"] = ADAM_EPS


class Margins:
    """The smallest distance, over all routers and positions seen, of the last chosen score from the first left out."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.smallest = float("inf")
        for module in model.modules():
            if isinstance(module, ErnieElasticTopKRouter):
                module.register_forward_hook(self._see)

    @torch.no_grad()
    def _see(self, router: ErnieElasticTopKRouter, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        logits_NE, _, ids_NK = output
        kept_experts = inputs[1] if len(inputs) > 1 else None
        bias_E = router.e_score_correction_bias
        bias_E = bias_E if kept_experts is None else bias_E[kept_experts]
        scores_NE = logits_NE.softmax(-1) if router.scoring == "softmax" else logits_NE.sigmoid()
        sorted_NE = (scores_NE + bias_E).sort(-1, descending=True).values
        if ids_NK.shape[1] < sorted_NE.shape[1]:
            gap_N = sorted_NE[:, ids_NK.shape[1] - 1] - sorted_NE[:, ids_NK.shape[1]]
            self.smallest = min(self.smallest, float(gap_N.min()))
