"""RMSNorm of both back ends against its definition in fp64: values, gradients, odd sizes, threads."""

from __future__ import annotations

import pytest
import torch

from ernie_elastic.errors import ConfigError
from ernie_elastic.kernels import rms_norm as package
from ernie_elastic.kernels.native import NativeLibrary
from ernie_elastic.kernels.rms_norm import available_backends, backend_reason, cpu_impl, rms_norm, rms_norm_rotary
from ernie_elastic.modeling.positions import apply_rotary
from tests.modeling.common import tiny_model

needs_native = pytest.mark.skipif("native" not in available_backends(), reason=backend_reason())
BACKENDS = ["torch", pytest.param("native", marks=needs_native)]
# rows and sizes: none; one; a head; no multiple of the lanes; more rows than a chunk.
SHAPES = [(0, 8), (1, 1), (2, 3, 4, 32), (5, 37), (700, 128)]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(package, "_library", lambda: None)
    return str(request.param)


def _run(x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    out = rms_norm(leaves[0], leaves[1], 1e-5)
    out.backward(grad)
    return [out.detach(), *(leaf.grad for leaf in leaves)]  # type: ignore[list-item]


def _inputs(shape: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator) for size in (shape, shape[-1:], shape)]


@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_match_the_definition(shape: tuple[int, ...], backend: str) -> None:
    x, weight, grad = _inputs(shape)
    ours = _run(x, weight, grad)
    leaves = [x.double().requires_grad_(), weight.double().requires_grad_()]
    out = leaves[0] * torch.rsqrt(leaves[0].square().mean(-1, keepdim=True) + 1e-5) * leaves[1]
    out.backward(grad.double())
    for value, truth in zip(ours, [out.detach(), leaves[0].grad, leaves[1].grad], strict=True):
        assert truth is not None
        torch.testing.assert_close(value.double(), truth, rtol=2e-5, atol=2e-5)


def test_without_gradients_the_values_are_the_same(backend: str) -> None:
    x, weight, grad = _inputs((9, 64))
    with_gradients = _run(x, weight, grad)[0]
    with torch.no_grad():
        assert torch.equal(rms_norm(x, weight, 1e-5), with_gradients)


def test_a_transposed_input_is_read_by_its_strides(backend: str) -> None:
    x, weight, grad = _inputs((6, 16))
    turned = x.T.contiguous().T
    for ours, plain in zip(_run(turned, weight, grad.T.contiguous().T), _run(x, weight, grad), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


@needs_native
def test_threads_do_not_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = _inputs((3000, 48))
    results = []
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        results.append(_run(*inputs))
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_without_a_compiler_torch_runs_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x, weight, grad) = tiny_model(qk_norm=True), _inputs((4, 16))
    hidden, position = torch.randn(2, 5, model.config.hidden_size), torch.arange(10.0).view(2, 5)
    rotary, attention = model.model.rotary_emb(position), model.model.layers[0].self_attn
    native, layer = _run(x, weight, grad), attention(hidden, rotary)[0]
    monkeypatch.setattr(cpu_impl, "load", lambda: NativeLibrary(None, "no C++ compiler"))
    package._library.cache_clear()
    try:
        assert available_backends() == ("torch",)
        assert "no C++ compiler" in backend_reason()
        assert rms_norm_rotary(torch.ones(1, 1, 1, 2), torch.ones(2), *torch.ones(2, 1, 1, 1), 1e-5) is None
        for ours, theirs in zip(_run(x, weight, grad), native, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(attention(hidden, rotary)[0], layer, rtol=1e-5, atol=1e-5)
    finally:
        package._library.cache_clear()


def test_hooks_of_the_norm_still_run() -> None:
    model, calls = tiny_model(qk_norm=True), []
    attention = model.model.layers[0].self_attn
    attention.q_norm.register_forward_hook(lambda *_: calls.append("q"))
    hidden = torch.randn(1, 3, model.config.hidden_size)
    attention(hidden, model.model.rotary_emb(torch.arange(3.0)[None]))
    assert calls == ["q"]


def test_tensors_that_do_not_fit_are_refused() -> None:
    x, weight = torch.ones(2, 3, 2, 4), torch.ones(4)
    angles = torch.ones(2, 3, 2)
    for wrong in ((x, torch.ones(5)), (x.double(), weight), (x, weight.double())):
        with pytest.raises(ConfigError, match="rms_norm"):
            rms_norm(*wrong, 1e-5)
        with pytest.raises(ConfigError, match="rms_norm"):
            rms_norm_rotary(*wrong, angles, angles, 1e-5)
    for cos, sin in ((angles, torch.ones(2, 3, 1)), (torch.ones(2, 3, 3), torch.ones(2, 3, 3))):
        with pytest.raises(ConfigError, match="rms_norm_rotary"):
            rms_norm_rotary(x, weight, cos, sin, 1e-5)


@needs_native
@pytest.mark.parametrize("shape", [(0, 3, 2, 4), (1, 1, 1, 2), (2, 5, 3, 12), (3, 40, 4, 32), (2, 300, 2, 64)])
@pytest.mark.parametrize("batches", ["each", "shared"])
@pytest.mark.parametrize("threads", [1, 2])
def test_norm_and_rotation_in_one_pass_are_the_two_steps(
    shape: tuple[int, ...], batches: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    x, weight, _ = _inputs(shape)
    rows = shape[0] if batches == "each" else 1
    angle_BTP = torch.randn(rows, shape[1], shape[3] // 2, generator=torch.Generator().manual_seed(1))
    cos, sin = angle_BTP.cos(), angle_BTP.sin()
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(2)).transpose(1, 2)  # not contiguous
    results = []
    for fused in (True, False):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        if fused:
            out = rms_norm_rotary(*leaves, cos, sin, 1e-5)
            assert out is not None
        else:
            normed = leaves[0] * torch.rsqrt(leaves[0].square().mean(-1, keepdim=True) + 1e-5) * leaves[1]
            out = apply_rotary(normed.transpose(1, 2), cos, sin)
        out.backward(grad)
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)
    with torch.no_grad():
        assert torch.equal(rms_norm_rotary(x, weight, cos, sin, 1e-5), results[0][0])
