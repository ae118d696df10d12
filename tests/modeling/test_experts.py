"""The mixture of experts against a loop over single tokens and single experts: outputs, gradients, counts, losses."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from ernie_elastic.modeling.model import ErnieElasticMoE
from ernie_elastic.modeling.router import orthogonal_loss, z_loss
from tests.modeling.common import tiny_config

HIDDEN, EXPERTS = 32, 6
KEPT = [0, 2, 3, 5]
BACK_ENDS = ["eager", "grouped_mm"]


def make_mixture(back_end: str = "eager", **changes: object) -> ErnieElasticMoE:
    config = tiny_config(hidden_size=HIDDEN, num_experts=EXPERTS, **changes)
    config._experts_implementation = back_end
    torch.manual_seed(3)
    mixture = ErnieElasticMoE(config, 0)
    assert mixture.experts.config._experts_implementation == back_end
    with torch.no_grad():
        for parameter in mixture.parameters():
            parameter.normal_(0, 0.25)
        mixture.gate.e_score_correction_bias.normal_(0, 0.1)
    return mixture


def inputs(rows: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randn(rows, length, HIDDEN, generator=torch.Generator().manual_seed(8))


def route_token(
    mixture: ErnieElasticMoE, token_H: torch.Tensor, kept: list[int], top_k: int
) -> dict[int, torch.Tensor]:
    """Combine weight of every chosen expert of one token."""
    logits = {expert: mixture.gate.weight[expert] @ token_H for expert in kept}
    if mixture.gate.scoring == "sigmoid":
        scores = {expert: 1 / (1 + torch.exp(-logit)) for expert, logit in logits.items()}
    else:
        total = sum(torch.exp(logit) for logit in logits.values())
        scores = {expert: torch.exp(logit) / total for expert, logit in logits.items()}
    bias = mixture.gate.e_score_correction_bias
    chosen = sorted(kept, key=lambda expert: -(scores[expert] + bias[expert]).item())[:top_k]
    total = sum(scores[expert] for expert in chosen)
    return {expert: scores[expert] / total for expert in chosen}


def swiglu(token_H: torch.Tensor, gate_IH: torch.Tensor, up_IH: torch.Tensor, down_HI: torch.Tensor) -> torch.Tensor:
    gate = gate_IH @ token_H
    return down_HI @ (gate / (1 + torch.exp(-gate)) * (up_IH @ token_H))


def one_token_at_a_time(
    mixture: ErnieElasticMoE, hidden_BTH: torch.Tensor, kept: list[int], top_k: int
) -> tuple[torch.Tensor, list[dict[int, torch.Tensor]]]:
    experts, shared, width = mixture.experts, mixture.shared_experts, mixture.experts.intermediate_dim
    outputs, routes = [], []
    for token in hidden_BTH.reshape(-1, HIDDEN):
        route = route_token(mixture, token, kept, top_k)
        output = torch.zeros(HIDDEN)
        for expert, weight in route.items():
            gate_up, down = experts.gate_up_proj[expert], experts.down_proj[expert]
            output = output + weight * swiglu(token, gate_up[:width], gate_up[width:], down)
        if shared is not None:
            output = output + swiglu(token, shared.gate_proj.weight, shared.up_proj.weight, shared.down_proj.weight)
        outputs.append(output)
        routes.append(route)
    return torch.stack(outputs).view_as(hidden_BTH), routes


def gradients(mixture: ErnieElasticMoE, output: torch.Tensor, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of a loss that weighs every output differently, by parameter name, and that of the input."""
    named = dict(mixture.named_parameters())
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    found = torch.autograd.grad((output * weights).sum(), [*named.values(), hidden], allow_unused=True)
    return dict(zip([*named, "input"], found, strict=True))


@pytest.mark.parametrize("back_end", BACK_ENDS)
@pytest.mark.parametrize(("kept", "top_k"), [(None, None), (None, 1), (KEPT, None), (KEPT, 1), (KEPT, 3), ([4], 1)])
@pytest.mark.parametrize("shared", [0, 2])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_outputs_and_gradients_are_those_of_the_loop(scoring, shared, kept, top_k, back_end):
    mixture = make_mixture(back_end, router_scoring=scoring, num_shared_experts=shared)
    hidden = inputs().requires_grad_()
    kept_E = None if kept is None else torch.tensor(kept)
    output, decision = mixture(hidden, kept_E, top_k)
    expected, routes = one_token_at_a_time(mixture, hidden, kept or list(range(EXPERTS)), top_k or 2)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    for route, weights, ids in zip(routes, decision.weights_NK, decision.experts_NK, strict=True):
        assert list(route) == ids.tolist()
        torch.testing.assert_close(weights, torch.stack(list(route.values())), rtol=0, atol=1e-6)
    found, wanted = gradients(mixture, output, hidden), gradients(mixture, expected, hidden)
    for name, gradient in wanted.items():
        scale = max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-5 * scale, msg=lambda m, n=name: n + m)
    used = {expert for route in routes for expert in route}
    for expert in range(EXPERTS):
        assert (found["experts.down_proj"][expert].abs().sum() > 0) == (expert in used)
    single = (top_k or 2) == 1
    assert (found["gate.weight"].abs().max() > 1e-4) != single, "one chosen expert always weighs 1"


@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_an_expert_that_nobody_chose_changes_nothing(back_end):
    mixture = make_mixture(back_end)
    hidden = inputs()
    with torch.no_grad():
        mixture.gate.e_score_correction_bias[1] = -10.0
        before, decision = mixture(hidden)
        mixture.experts.gate_up_proj[1] = 7.0
        after, _ = mixture(hidden)
    assert decision.counts_E[1] == 0 and torch.equal(before, after)


@pytest.mark.parametrize("kept", [None, KEPT])
@pytest.mark.parametrize("padding", [False, True])
@torch.no_grad()
def test_counts_and_mass_are_those_of_the_valid_tokens(padding, kept):
    mixture, hidden = make_mixture(), inputs()
    valid_N = torch.rand(18, generator=torch.Generator().manual_seed(1)) < 0.6 if padding else None
    _, decision = mixture(hidden, None if kept is None else torch.tensor(kept), None, valid_N)
    counts, mass = [0] * EXPERTS, [0.0] * EXPERTS
    _, routes = one_token_at_a_time(mixture, hidden, kept or list(range(EXPERTS)), 2)
    for token, route in enumerate(routes):
        if valid_N is None or valid_N[token]:
            for expert, weight in route.items():
                counts[expert] += 1
                mass[expert] += float(weight)
    num_valid = 18 if valid_N is None else int(valid_N.sum())
    assert 0 < num_valid <= 18 and (num_valid < 18) == padding
    assert decision.counts_E.tolist() == counts and decision.counts_E.sum() == 2 * num_valid
    torch.testing.assert_close(decision.mass_E, torch.tensor(mass), rtol=0, atol=1e-5)
    assert float(decision.mass_E.sum()) == pytest.approx(num_valid, abs=1e-4)


@torch.no_grad()
def test_padding_changes_no_output_and_no_loss():
    mixture, hidden = make_mixture(router_z_loss=0.5), inputs()
    valid_N = torch.arange(18) % 3 > 0
    noisy = hidden.clone().view(18, HIDDEN)
    noisy[~valid_N] = 3.0
    output, decision = mixture(hidden, None, None, valid_N)
    other, other_decision = mixture(noisy.view_as(hidden), None, None, valid_N)
    torch.testing.assert_close(output.view(18, -1)[valid_N], other.view(18, -1)[valid_N], rtol=1e-5, atol=1e-5)
    assert torch.equal(decision.counts_E, other_decision.counts_E)
    torch.testing.assert_close(decision.loss, other_decision.loss)
    assert (mixture(noisy.view_as(hidden))[1].loss - decision.loss).abs() > 1e-3


@pytest.mark.parametrize("padding", [False, True])
def test_z_loss_is_the_mean_squared_log_sum_of_exponentials(padding):
    logits_NE = 2 * torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    valid = [True, False, True, True, False, True, True] if padding else [True] * 7
    squares = [
        math.log(sum(math.exp(logit) for logit in row)) ** 2
        for row, keep in zip(logits_NE.tolist(), valid, strict=True)
        if keep
    ]
    found = z_loss(logits_NE, torch.tensor(valid) if padding else None)
    assert float(found) == pytest.approx(sum(squares) / len(squares), rel=1e-5)


def test_z_loss_of_padding_alone_is_zero():
    assert z_loss(torch.randn(3, 4), torch.zeros(3, dtype=torch.bool)) == 0


def test_orthogonal_loss_is_the_mean_squared_cosine_of_different_rows():
    rows = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    cosines = [float(F.cosine_similarity(rows[i], rows[j], dim=0)) ** 2 for i in range(5) for j in range(5) if i != j]
    assert float(orthogonal_loss(rows)) == pytest.approx(sum(cosines) / len(cosines), rel=1e-4)
    assert float(orthogonal_loss(torch.eye(4) * 3)) == pytest.approx(0, abs=1e-6)
    assert float(orthogonal_loss(torch.ones(3, 4))) == pytest.approx(1, rel=1e-5)
    assert float(orthogonal_loss(torch.ones(1, 4))) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("kept", [None, KEPT])
def test_the_router_loss_is_the_weighted_sum_over_kept_experts_and_reaches_the_router(kept):
    mixture = make_mixture(router_z_loss=0.7, router_orthogonal_loss=0.2)
    hidden = inputs()
    rows = mixture.gate.weight if kept is None else mixture.gate.weight[kept]
    expected = 0.7 * z_loss(hidden.reshape(-1, HIDDEN) @ rows.T, None) + 0.2 * orthogonal_loss(rows)
    _, decision = mixture(hidden, None if kept is None else torch.tensor(kept))
    torch.testing.assert_close(decision.loss, expected)
    (gradient,) = torch.autograd.grad(decision.loss, mixture.gate.weight)
    (wanted,) = torch.autograd.grad(expected, mixture.gate.weight)
    torch.testing.assert_close(gradient, wanted)
    assert gradient.abs().max() > 0


def test_router_losses_that_are_off_leave_no_loss():
    assert make_mixture()(inputs())[1].loss is None
