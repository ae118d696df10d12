"""Packed modules alone: shapes, dtypes, indexing, casts, sharing, and the detection that a model opts in by."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ernie_elastic.compression import PackedTensor, packable, resident_weight_bytes
from ernie_elastic.compression import packed as packed_module
from ernie_elastic.compression.packed import PackedEmbedding, PackedLinear
from ernie_elastic.compression.quantizer import pack_dense
from ernie_elastic.compression.resident import Resident, RowLayout, TileLayout
from ernie_elastic.errors import ConfigError, FormatError
from ernie_elastic.kernels import zip_gemv


def packed_of(
    weight: torch.Tensor, dtype: torch.dtype = torch.float32, layout: type[Resident] | None = None, parts: int = 1
) -> PackedTensor:
    packed = PackedTensor(tuple(weight.shape), parts)
    packed.fill(weight, dtype, layout=layout)
    return packed


both_layouts = pytest.mark.parametrize("layout", [RowLayout, TileLayout])


def stack() -> torch.Tensor:
    return (torch.randn(5, 12, 37) * 0.02).to(torch.bfloat16)


@both_layouts
@pytest.mark.parametrize("parts", [1, 2])
def test_experts_by_index(layout: type[Resident], parts: int) -> None:
    weight = stack()
    packed = packed_of(weight, layout=layout, parts=parts)
    for index in (0, 4, -1, torch.tensor(2)):
        assert torch.equal(packed[index], weight[index].float())
    assert torch.equal(packed[1:3], weight[1:3].float())
    assert torch.equal(packed[torch.tensor([3, 0])], weight[[3, 0]].float())
    assert torch.equal(packed.decode(), weight.float()) and len(packed) == 5
    assert packed.shape == weight.shape and packed.size(1) == 12 and packed.dtype == torch.float32
    with pytest.raises(IndexError, match="5"):
        packed[5]


@both_layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_linear_and_embedding_in_every_compute_dtype(dtype: torch.dtype, layout: type[Resident]) -> None:
    weight = (torch.randn(33, 20) * 0.02).to(torch.bfloat16)
    dense = nn.Linear(20, 33)
    dense.weight.data, dense.bias.data = weight.to(dtype), dense.bias.data.to(dtype)
    packed = PackedLinear(dense, packed_of(weight, dtype, layout))
    x = torch.randn(2, 3, 20).to(dtype)
    assert torch.equal(packed(x), dense(x)) and torch.equal(packed.weight, dense.weight)
    table = nn.Embedding(33, 20, _weight=weight.to(dtype))
    index = torch.tensor([[0, 32, 5], [5, 5, 1]])
    assert torch.equal(PackedEmbedding(table, packed_of(weight, dtype, layout))(index), table(index))
    empty = torch.empty(0, dtype=torch.int64)
    assert PackedEmbedding(table, packed_of(weight, dtype, layout))(empty).shape == (0, 20)


def test_casts_change_the_compute_dtype_and_not_the_weights() -> None:
    weight = stack()
    packed = packed_of(weight).to(torch.bfloat16)
    assert packed.dtype == torch.bfloat16
    assert all(not buffer.is_floating_point() for name, buffer in packed.named_buffers() if name != "compute")
    assert torch.equal(packed[3].view(torch.int16), weight[3].view(torch.int16))
    packed._apply(lambda tensor: tensor.clone())  # as a move to another device
    assert all(packed.resident.tensors[name] is getattr(packed, f"tbe__{name}") for name in packed.resident.tensors)
    packed.kernel = "fused"
    packed.product(torch.ones(2, packed.shape[-1], dtype=torch.float32))  # what calls leave behind is not copied
    packed.kernel = "decode"
    twin = copy.deepcopy(packed)
    assert torch.equal(twin[2], packed[2]) and twin.tbe__low.data_ptr() != packed.tbe__low.data_ptr()


def test_torch_functions_see_the_weight_decoded() -> None:
    weight = stack()
    packed, x = packed_of(weight), torch.randn(5, 4, 37)
    assert torch.equal(torch.bmm(x, packed.decode().transpose(1, 2)), torch.einsum("enc,erc->enr", x, packed))
    assert torch.equal(F.linear(x, packed_of(weight[0])), F.linear(x, weight[0].float()))


@pytest.mark.parametrize("rows", [1, 3, 200])
def test_fused_product_is_close(rows: int) -> None:
    weight = stack()
    packed, x = packed_of(weight), torch.randn(rows, 37)
    packed.kernel = "fused"
    torch.testing.assert_close(packed.product(x, 3), F.linear(x, weight[3].float()), rtol=1e-5, atol=1e-6)
    whole = weight.flatten(0, 1).float()
    for shaped in (x, x[0], x[:, None], x.repeat(1, 2)[:, ::2], x.double(), x[:0]):
        torch.testing.assert_close(packed.product(shaped), F.linear(shaped, whole.to(shaped)), rtol=1e-5, atol=1e-5)
    with pytest.raises((ConfigError, RuntimeError)):
        packed.product(torch.ones(rows, 36))


@pytest.mark.parametrize("rows", [1, 3, 200])
def test_fused_product_of_tiles_is_close(rows: int) -> None:
    weight = stack()[0]
    packed = packed_of(weight, torch.bfloat16, TileLayout)
    packed.kernel = "fused"
    x = torch.randn(rows, 2, 37).to(torch.bfloat16)
    assert packed.product(x).dtype == torch.bfloat16
    torch.testing.assert_close(packed.product(x).float(), F.linear(x.float(), weight.float()), rtol=1e-2, atol=1e-3)
    with pytest.raises(ConfigError, match="float32"):
        packed.product(x.float())
    experts = packed_of(stack(), torch.bfloat16, TileLayout)
    experts.kernel = "fused"
    with pytest.raises(ConfigError, match="zip_moe"):
        experts.product(x, 1)


def test_a_move_to_a_device_of_another_kind_packs_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without such a device: as if the CPU took tiles from a moment on."""
    weight = stack()
    packed = packed_of(weight)
    kinds = iter([RowLayout, TileLayout, TileLayout])
    monkeypatch.setattr(packed_module, "layout_for", lambda device: next(kinds))
    assert packed._apply(lambda tensor: tensor.clone()) is packed
    assert isinstance(packed.resident, TileLayout) and torch.equal(packed.decode(), weight.float())
    assert "tbe__planes" in packed.state_dict() and "tbe__codes" not in packed.state_dict()


@pytest.mark.gpu
def test_a_move_to_a_gpu_and_back_packs_anew() -> None:
    weight = stack()
    packed = packed_of(weight, torch.bfloat16).cuda()
    assert isinstance(packed.resident, TileLayout) and torch.equal(packed[2].cpu(), weight[2])
    packed.cpu()
    assert isinstance(packed.resident, RowLayout) and torch.equal(packed.decode(), weight)


def test_wrong_and_missing_content_is_an_error() -> None:
    packed = PackedTensor((4, 5))
    with pytest.raises(FormatError, match="never filled"):
        packed.decode()
    with pytest.raises(FormatError, match="shape"):
        packed.fill(torch.zeros(5, 4, dtype=torch.bfloat16), torch.float32)


@both_layouts
@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_carries_the_packed_arrays(layout: type[Resident], assign: bool) -> None:
    weight = stack()
    first, second = packed_of(weight, layout=layout), packed_of(weight.flip(0), layout=layout)
    assert not torch.equal(first.decode(), second.decode())
    second.load_state_dict(first.state_dict(), assign=assign)
    assert torch.equal(first.decode(), second.decode())


def test_buffers_that_a_hook_replaces_are_seen_and_damaged_ones_are_refused() -> None:
    first, second = packed_of(stack()), packed_of(stack().flip(0))
    second.decode()
    for name, buffer in first.named_buffers():
        second._buffers[name] = buffer.clone()
    assert torch.equal(first.decode(), second.decode())
    state = first.state_dict()
    state["tbe__offsets"] = state["tbe__offsets"] + 2**44
    second.load_state_dict(state)
    if "native" in zip_gemv.available_backends():
        with pytest.raises(FormatError, match="offsets"):
            second.decode()
    tiles = packed_of(stack(), layout=TileLayout)
    tiles._buffers["tbe__planes"] = tiles._buffers["tbe__planes"][1:]
    tiles._buffers["tbe__low"] = tiles._buffers["tbe__low"].clone()
    with pytest.raises(FormatError, match="planes has"):
        tiles.decode()


def test_fused_gives_gradients_as_decode_does() -> None:
    packed = packed_of(stack()[0])
    linear = PackedLinear(nn.Linear(37, 12), packed)
    gradients = []
    for packed.kernel in ("decode", "fused"):
        x = torch.ones(2, 37, requires_grad=True)
        (x.sum() + linear(x).pow(2).sum()).backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients) and not torch.equal(gradients[0], torch.ones(2, 37))


@pytest.mark.parametrize("kernel", ["decode", "fused"])
def test_inputs_on_another_device_are_an_error_not_a_crash(kernel: str) -> None:
    packed = packed_of(stack()[0])
    packed.kernel = kernel
    with pytest.raises((ConfigError, RuntimeError), match="meta"):
        packed.product(torch.empty(1, 37, device="meta")).sum().item()
    with pytest.raises((ConfigError, RuntimeError, NotImplementedError), match="meta"):
        packed.look_up(torch.empty(3, dtype=torch.int64, device="meta"))


def test_state_dict_names() -> None:
    first = packed_of(stack())
    assert set(first.state_dict()) == {f"tbe__{name}" for name in ("low", "codes", "table", "offsets", "fallbacks")}


def test_resident_bytes_count_shared_storage_once() -> None:
    packed = packed_of((torch.randn(64, 40) * 0.02).to(torch.bfloat16))
    table, head = nn.Embedding(64, 40), nn.Linear(40, 64, bias=False)
    model = nn.ModuleList([PackedEmbedding(table, packed), PackedLinear(head, packed)])
    assert resident_weight_bytes(model) == packed.resident.nbytes + packed.compute.nbytes < 0.8 * 2 * 64 * 40
    assert resident_weight_bytes(nn.Linear(10, 10)) == 4 * 110


class Odd(nn.Module):
    """Parameters that a packer must tell apart."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = 4
        self.stack = nn.Parameter(torch.zeros(4, 30, 30))
        self.single = nn.Parameter(torch.zeros(1, 30, 30))
        self.other = nn.Parameter(torch.zeros(3, 30, 30))
        self.flat = nn.Parameter(torch.zeros(30, 30))


def test_what_can_stay_packed() -> None:
    odd = Odd()
    assert packable(odd, "stack")
    assert not any(packable(odd, name) for name in ("single", "other", "flat", "absent"))
    assert packable(nn.Linear(3, 3), "weight") and not packable(nn.Linear(3, 3), "bias")
    assert packable(nn.Embedding(3, 3), "weight") and not packable(nn.Embedding(3, 3, max_norm=1.0), "weight")
    assert not packable(nn.Conv1d(8, 8, 3), "weight")

    class Scaled(nn.Embedding):
        """Its forward may do anything."""

    assert not packable(Scaled(3, 3), "weight")


def test_packing_a_dense_model_keeps_ties_and_skips_what_is_not_bf16() -> None:
    model = nn.Module()
    model.embed, model.head = nn.Embedding(60, 32), nn.Linear(32, 60, bias=False)
    model.free = nn.Linear(32, 60)
    model.embed.weight.data = model.embed.weight.data.bfloat16().float()
    model.head.weight = model.embed.weight
    model.odd = Odd()
    expected = model.head(torch.ones(2, 32))
    assert pack_dense(model, torch.float32) == 3
    assert model.embed.packed is model.head.packed and isinstance(model.free, nn.Linear)
    assert isinstance(model.odd.stack, PackedTensor) and torch.equal(model.head(torch.ones(2, 32)), expected)
