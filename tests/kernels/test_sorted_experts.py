"""Experts over sorted pairs against their definition: values, gradients, accumulation, compilation, determinism.

Letters: N tokens, K chosen, E experts, H hidden, I expert width.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ernie_elastic.errors import ConfigError
from ernie_elastic.kernels.native import NativeLibrary
from ernie_elastic.kernels.sorted_experts import (
    NAME,
    available_backends,
    backend_reason,
    cpu_impl,
    reference,
    register,
    sorted_experts,
    sorted_experts_forward,
    torch_impl,
)

# (N, E, K, H, I): usual; more experts than pairs; one expert each; no tokens; several blocks; beyond a block.
SHAPES = [(37, 8, 2, 24, 16), (3, 16, 4, 32, 8), (50, 5, 1, 8, 12), (0, 4, 2, 8, 8), (900, 300, 4, 16, 8)]
SHAPES += [(torch_impl.BLOCK_PAIRS + 100, 2, 2, 24, 18)]
needs_native = pytest.mark.skipif("native" not in available_backends(), reason=backend_reason())
BACKENDS = ["torch", pytest.param("native", marks=needs_native)]


def make(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    """Leaves hidden, gate_up, down, weights, and ids; the last experts get no token where E allows it."""
    tokens, experts, top_k, hidden, width = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    scores = normal(tokens, experts)
    if experts > top_k + 1:
        scores[:, -1] = -100.0
    weights, ids = scores.topk(top_k, dim=-1)
    gate_up, down = normal(experts, 2 * width, hidden) / hidden**0.5, normal(experts, hidden, width) / width**0.5
    leaves = (normal(tokens, hidden), gate_up, down, weights.softmax(-1))
    return [leaf.to(dtype).requires_grad_() for leaf in leaves], ids


def run(function: object, leaves: list[Tensor], ids: Tensor, grad: Tensor, *rest: object) -> list[Tensor]:
    """Output, then the gradients of the leaves."""
    copies = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    hidden, gate_up, down, weights = copies
    output = function(hidden, gate_up, down, ids, weights, *rest)  # type: ignore[operator]
    output.backward(grad)
    return [output.detach(), *(leaf.grad for leaf in copies)]  # type: ignore[list-item]


def assert_close(found: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    """Largest error relative to the largest entry."""
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        if other.numel():
            error = (one.double() - other.double()).abs().max() / other.double().abs().max()
            assert error <= tolerance, float(error)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"),
    [
        ("torch", torch.float32, 1e-5),
        ("torch", torch.bfloat16, 3e-2),
        ("torch", torch.float16, 4e-3),
        pytest.param("native", torch.float32, 1e-5, marks=needs_native),
    ],
    ids=str,
)
def test_equals_the_definition_with_gradients(
    shape: tuple[int, ...], backend: str, dtype: torch.dtype, tolerance: float
) -> None:
    leaves, ids = make(shape, dtype)
    grad = torch.randn(leaves[0].shape, dtype=dtype)
    found = run(sorted_experts, leaves, ids, grad, False, backend)
    if not shape[0]:
        assert all(not tensor.any() for tensor in found)
        return
    wanted = run(reference.sorted_experts, [leaf.detach().double() for leaf in leaves], ids, grad.double())
    assert_close(found, [tensor.to(dtype) for tensor in wanted], tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(12))
def test_equals_the_definition_on_random_shapes(seed: int, backend: str) -> None:
    random = torch.Generator().manual_seed(seed)
    tokens, experts, hidden, width = (int(torch.randint(1, 70, (), generator=random)) for _ in range(4))
    top_k = int(torch.randint(1, min(experts, 8) + 1, (), generator=random))
    leaves, ids = make((tokens, experts, top_k, hidden, width), seed=seed)
    grad = torch.randn(tokens, hidden, generator=random)
    wanted = run(reference.sorted_experts, [leaf.detach().double() for leaf in leaves], ids, grad.double())
    found = run(sorted_experts, leaves, ids, grad, False, backend)
    assert_close(found, [tensor.float() for tensor in wanted], 1e-5)


@needs_native
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_native_does_not_depend_on_the_number_of_threads(threads: int) -> None:
    leaves, ids = make((1500, 3, 2, 16, 8))
    grad = torch.randn_like(leaves[0])
    wanted = run(sorted_experts, leaves, ids, grad, False, "torch")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = run(sorted_experts, leaves, ids, grad, False, "native")
    finally:
        torch.set_num_threads(before)
    assert_close(found, wanted, 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gate_is_right_at_every_size_and_keeps_nan(backend: str) -> None:
    # With one unit of width and one of hidden: output = silu(gate of x) * 1, gate = x.
    values = torch.cat([torch.linspace(-120, 120, 4001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 3e38, -3e38])])
    hidden = torch.stack([values, torch.ones_like(values)], dim=1).requires_grad_()
    gate_up, down = torch.eye(2)[None], torch.tensor([[[1.0], [0.0]]])
    ids, ones = torch.zeros(values.shape[0], 1, dtype=torch.int64), torch.ones(values.shape[0], 1)
    found = sorted_experts(hidden, gate_up, down, ids, ones, backend=backend)  # type: ignore[arg-type]
    found.backward(torch.ones_like(found))
    exact = values.double().requires_grad_()
    wanted = nn.functional.silu(exact)
    wanted.sum().backward()
    torch.testing.assert_close(found[:, 0].double(), wanted, rtol=1e-6, atol=1e-34)
    assert hidden.grad is not None and exact.grad is not None
    torch.testing.assert_close(hidden.grad[:-2, 0].double(), exact.grad[:-2], rtol=1e-5, atol=1e-6)
    bad = torch.tensor([[float("nan"), 1.0]])
    assert sorted_experts(bad, gate_up, down, ids[:1], ones[:1], backend=backend).isnan().any()  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", BACKENDS)
def test_experts_without_tokens_get_exactly_zero(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    leaves, ids = make(SHAPES[0])
    # So that a block that nobody writes shows.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        _, _, gate_up, down, _ = run(sorted_experts, leaves, ids, torch.ones_like(leaves[0]), False, backend)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not gate_up[-1].any() and not down[-1].any()
    assert gate_up.isfinite().all() and down.isfinite().all()


def test_gradients_pass_gradcheck() -> None:
    leaves, ids = make((5, 4, 2, 6, 3), torch.float64)
    assert torch.autograd.gradcheck(lambda h, g, d, w: sorted_experts(h, g, d, ids, w), leaves)


@pytest.mark.parametrize("layout", ["expanded", "transposed"])
def test_takes_any_upstream_gradient_and_input_layout(layout: str) -> None:
    leaves, ids = make(SHAPES[0])
    grad = torch.tensor(0.5).expand(leaves[0].shape)
    wanted = run(sorted_experts, leaves, ids, grad.contiguous())
    if layout == "transposed":
        leaves = [leaf.detach().transpose(-1, -2).contiguous().transpose(-1, -2) for leaf in leaves]
        ids = ids.t().contiguous().t()
        hidden, gate_up, down, weights = (leaf.requires_grad_() for leaf in leaves)
        output = sorted_experts(hidden, gate_up, down, ids, weights)
        output.backward(grad)
        assert_close([output.detach(), *(leaf.grad for leaf in leaves)], wanted, 1e-5)  # type: ignore[list-item]
    else:
        assert_close(run(sorted_experts, leaves, ids, grad), wanted, 0.0)


@pytest.mark.parametrize("frozen", [(0,), (3,), (1, 2), (0, 3), (0, 1, 2)], ids=str)
def test_frozen_inputs_leave_the_other_gradients_alone(frozen: tuple[int, ...]) -> None:
    leaves, ids = make(SHAPES[0])
    wanted = run(sorted_experts, leaves, ids, torch.ones_like(leaves[0]))[1:]
    for index in frozen:
        leaves[index].requires_grad_(False)
    hidden, gate_up, down, weights = leaves
    sorted_experts(hidden, gate_up, down, ids, weights).backward(torch.ones_like(hidden))
    for index, (leaf, grad) in enumerate(zip(leaves, wanted, strict=True)):
        assert leaf.grad is None if index in frozen else torch.equal(leaf.grad, grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [SHAPES[4], SHAPES[5]], ids=str)
def test_accumulating_twice_is_twice_the_gradient(shape: tuple[int, ...], backend: str) -> None:
    (hidden, gate_up, down, weights), ids = make(shape)
    wanted = run(sorted_experts, [hidden, gate_up, down, weights], ids, torch.ones_like(hidden))
    for _ in range(2):
        output = sorted_experts(hidden, gate_up, down, ids, weights, True, backend)  # type: ignore[arg-type]
        output.backward(torch.ones_like(hidden))
        place = gate_up.grad.data_ptr(), down.grad.data_ptr()  # type: ignore[union-attr]
    found = [hidden.grad, gate_up.grad, down.grad, weights.grad]
    assert_close(found, [2 * grad for grad in wanted[1:]], 1e-5)  # type: ignore[arg-type]
    sorted_experts(hidden, gate_up, down, ids, weights, True).sum().backward()
    assert place == (gate_up.grad.data_ptr(), down.grad.data_ptr())  # type: ignore[union-attr]


def test_accumulation_fills_only_the_gradient_that_is_missing() -> None:
    (hidden, gate_up, down, weights), ids = make(SHAPES[0])
    wanted = run(sorted_experts, [hidden, gate_up, down, weights], ids, torch.ones_like(hidden))
    gate_up.grad = torch.ones_like(gate_up)
    sorted_experts(hidden, gate_up, down, ids, weights, True).backward(torch.ones_like(hidden))
    assert_close([gate_up.grad, down.grad], [wanted[2] + 1, wanted[3]], 1e-6)  # type: ignore[list-item]


def test_accumulation_leaves_a_frozen_projection_alone() -> None:
    (hidden, gate_up, down, weights), ids = make(SHAPES[0])
    wanted = run(sorted_experts, [hidden, gate_up, down, weights], ids, torch.ones_like(hidden))
    down.requires_grad_(False)
    sorted_experts(hidden, gate_up, down, ids, weights, True).backward(torch.ones_like(hidden))
    assert down.grad is None
    assert_close([gate_up.grad], [wanted[2]], 1e-6)  # type: ignore[list-item]


@pytest.mark.parametrize("accumulate", [False, True])
def test_runs_under_checkpointing(accumulate: bool) -> None:
    leaves, ids = make(SHAPES[0])

    def checkpointed(*arguments: Tensor) -> Tensor:
        return checkpoint(sorted_experts, *arguments, accumulate, use_reentrant=False)  # type: ignore[return-value]

    grad = torch.ones_like(leaves[0])
    assert_close(run(checkpointed, leaves, ids, grad), run(sorted_experts, leaves, ids, grad), 0.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_numbers_in_every_run_and_without_gradients(backend: str) -> None:
    for shape in SHAPES[4:]:
        leaves, ids = make(shape)
        grad = torch.randn_like(leaves[0])
        first, second = (run(sorted_experts, leaves, ids, grad, False, backend) for _ in range(2))
        assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
        hidden, gate_up, down, weights = leaves
        for mode in (torch.inference_mode, torch.no_grad):
            with mode():
                output = sorted_experts(hidden, gate_up, down, ids, weights, backend=backend)  # type: ignore[arg-type]
                assert torch.equal(output, first[0])


@pytest.mark.parametrize("back_end", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_without_a_graph_break(back_end: str) -> None:
    leaves, ids = make(SHAPES[0])
    grad = torch.randn_like(leaves[0])
    torch._dynamo.reset()
    compiled = torch.compile(lambda *arguments: 2 * sorted_experts(*arguments), fullgraph=True, backend=back_end)
    wanted = run(lambda *arguments: 2 * sorted_experts(*arguments), leaves, ids, grad)
    assert_close(run(compiled, leaves, ids, grad), wanted, 1e-6)
    hidden, gate_up, down, weights = (leaf.detach() for leaf in leaves)
    with torch.no_grad():
        assert_close([compiled(hidden, gate_up, down, ids, weights)], wanted[:1], 1e-6)


def test_the_operator_keeps_torchs_rules() -> None:
    (hidden, gate_up, down, weights), ids = make((9, 4, 2, 8, 4))
    torch.library.opcheck(torch.ops.ernie_elastic.sorted_experts, (hidden, gate_up, down, weights, ids, True))


class Experts(nn.Module):
    """What Transformers' interface hands to a back end."""

    def __init__(self, gate_up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Parameter(gate_up), nn.Parameter(down)
        self.act_fn: nn.Module = nn.SiLU()
        self.has_bias = False


def test_behind_transformers_interface() -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    register()
    register()
    assert ALL_EXPERTS_FUNCTIONS.get_interface(NAME, None) is sorted_experts_forward
    (hidden, gate_up, down, weights), ids = make(SHAPES[0])
    module = Experts(gate_up.detach(), down.detach())
    wanted = sorted_experts(hidden, gate_up, down, ids, weights)
    assert torch.equal(sorted_experts_forward(module, hidden, ids, weights), wanted)
    assert sorted_experts_forward(module, hidden.bfloat16(), ids, weights).dtype == torch.bfloat16
    module.accumulate_into_grad = True
    sorted_experts_forward(module, hidden, ids, weights).sum().backward()
    assert module.down_proj.grad is not None
    module.has_bias = True
    with pytest.raises(ConfigError, match="has_bias"):
        sorted_experts_forward(module, hidden, ids, weights)
    module.has_bias, module.act_fn = False, nn.GELU()
    with pytest.raises(ConfigError, match="GELU"):
        sorted_experts_forward(module, hidden, ids, weights)


def test_what_does_not_fit_is_named() -> None:
    (hidden, gate_up, down, weights), ids = make(SHAPES[0])
    good = SimpleNamespace(hidden=hidden, gate_up=gate_up, down=down, ids=ids, weights=weights)
    bad: list[tuple[str, Tensor]] = [("hidden", hidden[:, 1:]), ("gate_up", gate_up.double()), ("ids", ids.int())]
    bad += [("weights", weights[:, :1])]
    bad += [("ids", ids + 7), ("ids", ids - 1), ("down", down[0])]
    for name, value in bad:
        arguments = {**vars(good), name: value}
        with pytest.raises(ConfigError, match="sorted_experts"):
            sorted_experts(*arguments.values())
    with pytest.raises(ConfigError, match="leaves"):
        sorted_experts(hidden, gate_up * 1, down, ids, weights, True).sum().backward()


def test_a_back_end_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    (hidden, gate_up, down, weights), ids = make(SHAPES[0])
    with pytest.raises(ConfigError, match="not known"):
        sorted_experts(hidden, gate_up, down, ids, weights, backend="fast")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="float32 on cpu"):
        sorted_experts(*(leaf.double() for leaf in (hidden, gate_up, down)), ids, weights, backend="native")
    monkeypatch.setattr(cpu_impl, "load", lambda: NativeLibrary(None, "no C++ compiler"))
    assert (
        "native" not in available_backends()
        and "torch" in available_backends()
        and "no C++ compiler" in backend_reason()
    )
    with pytest.raises(ConfigError, match="no C\\+\\+ compiler"):
        sorted_experts(hidden, gate_up, down, ids, weights, backend="native")
