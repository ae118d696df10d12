"""The GPU's back end of the experts (grouped products, Triton kernels) against the definition; interpreted on the CPU.

Letters: N tokens, K chosen, S pairs, E experts, H hidden, I expert width.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ernie_elastic.errors import ConfigError
from ernie_elastic.kernels.sorted_experts import dispatch, grouped_impl, reference, sorted_experts, torch_impl
from tests.kernels.test_sorted_experts import assert_close, make, run

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("device")]
# (N, E, K, H, I): usual; more experts than pairs; one of each; no tokens; ids beyond a byte; two tiles of a row.
SHAPES = [
    (29, 8, 2, 24, 16),
    (3, 16, 4, 32, 8),
    (20, 5, 1, 8, 48),
    (0, 4, 2, 8, 8),
    (30, 300, 2, 16, 8),
    (3, 2, 2, 8, 1040),
]


def move(leaves: list[Tensor], ids: Tensor, device: torch.device) -> tuple[list[Tensor], Tensor]:
    """The same on the device, in a dtype that it multiplies."""
    dtype = torch.bfloat16 if device.type == "cuda" else leaves[0].dtype
    return [leaf.detach().to(device, dtype).requires_grad_() for leaf in leaves], ids.to(device)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=str)
def test_equals_the_definition_with_gradients(
    shape: tuple[int, ...], dtype: torch.dtype, tolerance: float, device: torch.device
) -> None:
    leaves, ids = move(*make(shape, dtype), device)
    grad = torch.randn(leaves[0].shape).to(leaves[0])
    found = run(sorted_experts, leaves, ids, grad, False, "grouped")
    if not shape[0]:
        assert all(not tensor.any() for tensor in found)
        return
    wanted = run(reference.sorted_experts, [leaf.detach().double() for leaf in leaves], ids, grad.double())
    assert_close(found, [tensor.to(leaves[0].dtype) for tensor in wanted], max(tolerance, 3e-2 * found[0].is_cuda))
    again = run(sorted_experts, leaves, ids, grad, False, "grouped")
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))
    with torch.inference_mode():
        hidden, gate_up, down, weights = leaves
        assert torch.equal(sorted_experts(hidden, gate_up, down, ids, weights, backend="grouped"), found[0])


@pytest.mark.parametrize("seed", range(8))
def test_equals_the_definition_on_random_shapes(seed: int, device: torch.device) -> None:
    random = torch.Generator().manual_seed(seed)
    tokens, experts = (int(torch.randint(1, 17, (), generator=random)) for _ in range(2))
    hidden, width = (8 * int(torch.randint(1, 9, (), generator=random)) for _ in range(2))
    top_k = int(torch.randint(1, min(experts, 8) + 1, (), generator=random))
    leaves, ids = move(*make((tokens, experts, top_k, hidden, width), seed=seed), device)
    grad = torch.randn(tokens, hidden).to(leaves[0])
    wanted = run(reference.sorted_experts, [leaf.detach().double() for leaf in leaves], ids, grad.double())
    found = run(sorted_experts, leaves, ids, grad, False, "grouped")
    assert_close(found, [tensor.to(grad.dtype) for tensor in wanted], 3e-2 if grad.is_cuda else 1e-5)


def test_swiglu_is_right_at_every_size_and_keeps_nan(device: torch.device) -> None:
    from ernie_elastic.kernels.sorted_experts.triton_impl import weighted_swiglu, weighted_swiglu_backward

    sizes = [torch.linspace(-120, 120, 2041), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e38, -1e38, float("nan")])]
    gate = torch.cat(sizes).view(2, -1).to(device)
    fused = torch.cat([gate, torch.full_like(gate, 2.0)], dim=1)
    weight = torch.tensor([0.5, 1.5], device=device)
    exact = gate.double().requires_grad_()
    wanted = nn.functional.silu(exact) * 2 * weight[:, None]
    wanted.backward(torch.ones_like(wanted))
    active = weighted_swiglu(fused, weight)
    torch.testing.assert_close(active.double(), wanted, rtol=1e-5, atol=1e-34, equal_nan=True)
    grad, weight_grad = torch.ones_like(gate), torch.empty(2, device=device)
    fused_grad = weighted_swiglu_backward(fused, weight, grad, weight_grad)
    assert torch.allclose(grad, active, rtol=1e-5, equal_nan=True)
    finite = gate.isfinite() & (gate.abs() < 1e37)
    got, expected = fused_grad[:, : gate.shape[1]].double()[finite], exact.grad[finite]  # type: ignore[index]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert weight_grad[1].isnan(), "the row with a NaN"
    torch.testing.assert_close(
        weight_grad[0].double(), (nn.functional.silu(gate[0].double()) * 2).sum(), rtol=1e-5, atol=1e-3
    )


def test_experts_without_tokens_get_exactly_zero_whatever_the_product_leaves_there(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = grouped_impl.grouped_mm

    def unwritten(left: Tensor, right: Tensor, offs: Tensor) -> Tensor:
        made = real(left, right, offs=offs)
        if right.ndim == 2:
            made[torch.diff(offs, prepend=offs.new_zeros(1)) == 0] = float("nan")
        return made

    leaves, ids = move(*make(SHAPES[0]), device)
    wanted = run(sorted_experts, leaves, ids, torch.ones_like(leaves[0]), False, "grouped")
    monkeypatch.setattr(grouped_impl, "grouped_mm", unwritten)
    found = run(sorted_experts, leaves, ids, torch.ones_like(leaves[0]), False, "grouped")
    assert not found[2][-1].any() and not found[3][-1].any() and found[2][:-1].any()
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_accumulating_twice_is_twice_the_gradient(device: torch.device) -> None:
    (hidden, gate_up, down, weights), ids = move(*make(SHAPES[0]), device)
    grad = torch.ones_like(hidden)
    wanted = run(sorted_experts, [hidden, gate_up, down, weights], ids, grad, False, "grouped")
    places = []
    for _ in range(2):
        sorted_experts(hidden, gate_up, down, ids, weights, True, "grouped").backward(grad)
        places.append((gate_up.grad.data_ptr(), down.grad.data_ptr()))  # type: ignore[union-attr]
    assert places[0] == places[1]
    found = [hidden.grad, gate_up.grad, down.grad, weights.grad]
    assert_close(found, [2 * each for each in wanted[1:]], 1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize("frozen", [(0,), (3,), (1, 2)], ids=str)
def test_frozen_inputs_leave_the_other_gradients_alone(frozen: tuple[int, ...], device: torch.device) -> None:
    leaves, ids = move(*make((7, 4, 2, 8, 8)), device)
    wanted = run(sorted_experts, leaves, ids, torch.ones_like(leaves[0]), False, "grouped")[1:]
    for index in frozen:
        leaves[index].requires_grad_(False)
    hidden, gate_up, down, weights = leaves
    sorted_experts(hidden, gate_up, down, ids, weights, backend="grouped").backward(torch.ones_like(hidden))
    for index, (leaf, grad) in enumerate(zip(leaves, wanted, strict=True)):
        assert leaf.grad is None if index in frozen else torch.equal(leaf.grad, grad)  # type: ignore[arg-type]


def test_what_it_cannot_run_is_named_and_auto_goes_elsewhere(device: torch.device) -> None:
    (hidden, gate_up, down, weights), ids = move(*make((7, 4, 2, 12, 7)), device)
    with pytest.raises(ConfigError, match=r"rows of 12 and 7 numbers are no multiples of 16 bytes; choose auto or"):
        sorted_experts(hidden, gate_up, down, ids, weights, backend="grouped")
    (hidden, gate_up, down, weights), ids = move(*make((7, 4, 2, 8, 8)), device)
    across = gate_up.detach().transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(ConfigError, match="not contiguous"):
        sorted_experts(hidden, across, down, ids, weights, backend="grouped")
    shifted = torch.empty(gate_up.numel() + 1).to(gate_up)[1:].view_as(gate_up)
    with pytest.raises(ConfigError, match="do not begin at multiples of 16 bytes"):
        sorted_experts(hidden, shifted, down, ids, weights, backend="grouped")
    many = torch.zeros(1024, 16, 8).to(gate_up), torch.zeros(1024, 8, 8).to(down)
    with pytest.raises(ConfigError, match="1024 experts, torch's grouped product takes 1023"):
        sorted_experts(hidden, *many, ids, weights, backend="grouped")
    wide = [leaf.detach().double() for leaf in (hidden, gate_up, down)]
    with pytest.raises(ConfigError, match=r"float32|bfloat16"):
        sorted_experts(*wide, ids, weights, backend="grouped")
    if device.type == "cpu":
        for bad in (ids + 3, ids - 1):
            with pytest.raises(ConfigError, match="an id is not among the 4 experts"):
                sorted_experts(hidden, gate_up, down, bad, weights, backend="grouped")
        narrow = [leaf.detach().bfloat16() for leaf in (hidden, gate_up, down)]
        assert dispatch.implementation("auto", *narrow) is torch_impl, "interpreted kernels are for tests"
    else:
        assert dispatch.implementation("auto", hidden, gate_up, down) is grouped_impl
    assert "grouped" in dispatch.available_backends()
    none = hidden.detach()[:0]
    assert dispatch.implementation("grouped", none, gate_up.detach(), down.detach()) is torch_impl, "refused when empty"
