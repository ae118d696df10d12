"""Muon: orthogonal updates of the right matrices, AdamW's own numbers for the rest, and rest for unused experts."""

import copy

import pytest
import torch

from ernie_elastic.training.configuration import TrainingConfig
from ernie_elastic.training.engines.choice import make_optimizer, parameter_groups
from ernie_elastic.training.engines.muon import MuonAdamW, orthogonalise
from tests.modeling.common import tiny_model


@pytest.mark.parametrize("shape", [(24, 24), (12, 40), (40, 12), (5, 16, 32)])
def test_singular_values_come_close_to_one_and_directions_stay(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 7
    result = orthogonalise(matrix)
    assert result.shape == matrix.shape
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    inner = u.mT @ result @ vh.mT
    values = inner.diagonal(dim1=-2, dim2=-1)
    rest = inner - torch.diag_embed(values)
    # A square random matrix has singular values near zero, which five iterations do not bring all the way.
    assert values.max() < 1.3 and values.median() > 0.65
    assert values.min() > (0.1 if shape[-1] == shape[-2] else 0.6)
    assert rest.abs().max() < 1e-4


def test_a_stacked_parameter_is_split_before_it_is_orthogonalised():
    gate_up = torch.nn.Parameter(torch.zeros(3, 2 * 8, 20))
    gate_up.grad = torch.randn(gate_up.shape, generator=torch.Generator().manual_seed(0))
    optimizer = MuonAdamW([{"params": [gate_up], "muon": True, "split": 2, "lr": 1.0}], (0.9, 0.95))
    gradient = gate_up.grad.clone()
    optimizer.step()
    for half in range(2):
        rows = slice(8 * half, 8 * half + 8)
        torch.testing.assert_close(gate_up.data[:, rows], -orthogonalise(gradient[:, rows]))


def test_only_matrices_of_the_stack_take_muon_steps():
    model = tiny_model()
    training = TrainingConfig(optimizer="muon", engine="torch", learning_rate=1e-3, muon_learning_rate=1e-2)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, training)
    assert sum(len(group["params"]) for group in groups) == len(names)
    muon = {names[id(p)] for group in groups if group.get("muon") for p in group["params"]}
    assert {name.split("layers.0.")[1] for name in muon if "layers.0." in name} == {
        *(f"self_attn.{kind}_proj.weight" for kind in "qkvo"), "mlp.experts.gate_up_proj", "mlp.experts.down_proj",
    }  # fmt: skip
    assert all(name.startswith("model.layers.") for name in muon)
    assert {group["scale"] for group in groups} == {1.0, 10.0}


def test_the_rest_moves_as_torch_adamw_moves_it():
    ours, theirs = tiny_model(), tiny_model()
    kinds = {"learning_rate": 1e-2, "engine": "torch", "zero_stage": 0}
    first = make_optimizer(ours, TrainingConfig(optimizer="muon", **kinds))
    second = make_optimizer(theirs, TrainingConfig(optimizer="adamw", **kinds))
    for step in range(3):
        for model, optimizer in ((ours, first), (theirs, second)):
            generator = torch.Generator().manual_seed(step)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            for group in optimizer.param_groups:
                group["lr"] = 1e-2
            optimizer.step()
    for (name, one), two in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        same = torch.allclose(one, two, rtol=1e-5, atol=1e-7)
        assert same != (".layers." in name and one.dim() >= 2 and "gate.weight" not in name), name


def test_an_expert_without_a_gradient_rests_though_it_has_momentum():
    experts = torch.nn.Parameter(torch.zeros(2, 8, 12))
    optimizer = MuonAdamW([{"params": [experts], "muon": True, "lr": 0.1}], (0.9, 0.95))
    experts.grad = torch.randn(experts.shape, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    before = experts.detach().clone()
    experts.grad = torch.randn(experts.shape, generator=torch.Generator().manual_seed(1))
    experts.grad[1] = 0
    optimizer.step()
    assert torch.equal(experts[1], before[1]) and not torch.equal(experts[0], before[0])


def test_state_can_be_saved_and_loaded():
    def step(optimizer, parameters, seed):
        generator = torch.Generator().manual_seed(seed)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()

    def make():
        parameters = [torch.nn.Parameter(torch.ones(6, 8)), torch.nn.Parameter(torch.ones(8))]
        groups = [{"params": [parameters[0]], "muon": True}, {"params": [parameters[1]]}]
        return parameters, MuonAdamW(groups, (0.9, 0.95))

    whole, optimizer = make()
    step(optimizer, whole, 0)
    resumed, again = make()
    for target, source in zip(resumed, whole, strict=True):
        target.data.copy_(source.data)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(optimizer, whole, 1)
    step(again, resumed, 1)
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
