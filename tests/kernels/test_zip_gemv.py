"""zip_gemv: lossless for every pattern and shape on every back end and instruction set; products as the plain twin."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ernie_elastic.errors import ConfigError, FormatError
from ernie_elastic.kernels import zip_gemv
from ernie_elastic.kernels.native import NativeLibrary
from ernie_elastic.kernels.zip_gemv import cpu_impl
from tests.kernels.compare import any_words, gaussian, same_bits, same_values

NATIVE = "native" in zip_gemv.available_backends()
LEVELS = range(cpu_impl.load().library.zip_level() + 1) if NATIVE else range(0)
needs_native = pytest.mark.skipif(not NATIVE, reason=zip_gemv.backend_reason())
SHAPES = [(1, 1), (1, 7), (7, 1), (3, 8), (65, 37), (64, 128), (100, 72), (17, 31), (33, 256), (5, 4099), (2, 9000)]


def each_way(packed: zip_gemv.PackedMatrix) -> Iterator[str]:
    """Back ends to test: "reference", then "native" prepared for each instruction set of this machine."""
    yield "reference"
    for level in LEVELS:
        packed.prepared.clear()
        cpu_impl.prepare(packed, level)
        yield "native"


def check_lossless(weight_RC: Tensor) -> None:
    """Whole matrix, a range of rows and named rows, in both dtypes, on every back end."""
    packed = zip_gemv.pack(weight_RC, "reference")
    for level in LEVELS:  # packing has one result, whoever packs
        native = cpu_impl.pack(weight_RC, level)
        assert all(torch.equal(native.tensors[name], tensor) for name, tensor in packed.tensors.items()), level
    rows = weight_RC.shape[0]
    first, last = rows // 3, rows - rows // 4
    which = torch.arange(2 * rows, 0, -3) % rows
    for backend in each_way(packed):
        for dtype in (torch.bfloat16, torch.float32):
            expected_RC = weight_RC.to(dtype)
            assert same_bits(zip_gemv.unpack(packed, dtype, backend), expected_RC)
            part_RC = zip_gemv.unpack(packed, dtype, backend, start=first, stop=last)
            assert same_bits(part_RC, expected_RC[first:last])
            assert same_bits(zip_gemv.unpack_rows(packed, which, dtype, backend), expected_RC[which])


@pytest.mark.parametrize("shape", [(256, 256), (64, 1024), (2048, 32), (16, 4096)])
def test_every_pattern_survives(all_patterns: Tensor, shape: tuple[int, int]) -> None:
    check_lossless(all_patterns.reshape(shape))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("make", [gaussian, any_words])
def test_every_shape_survives(make: Callable[..., Tensor], shape: tuple[int, int]) -> None:
    check_lossless(make(*shape))


@given(st.integers(1, 70), st.integers(1, 600), st.integers(0, 10**6), st.booleans())
def test_random_matrices_survive(rows: int, columns: int, seed: int, trained: bool) -> None:
    check_lossless((gaussian if trained else any_words)(rows, columns, seed=seed))


def test_strided_weight_is_packed_in_row_order() -> None:
    weight_CR = gaussian(40, 24)
    assert same_bits(zip_gemv.unpack(zip_gemv.pack(weight_CR.T)), weight_CR.T.contiguous())


@pytest.mark.parametrize("shape", [(128, 128), (64, 128), (100, 72), (65, 37)], ids=str)
def test_small_matrices_stay_small(shape: tuple[int, int]) -> None:
    packed = zip_gemv.pack(gaussian(*shape))
    assert packed.bits_per_weight <= 11.7
    assert packed.nbytes == sum(tensor.numel() * tensor.element_size() for tensor in packed.tensors.values())


def test_table_has_maximal_coverage() -> None:
    weight_RC = gaussian(50, 40)
    counts = torch.bincount(weight_RC.view(torch.int16).reshape(-1).int() >> 7 & 0xFF, minlength=256)
    expected = weight_RC.numel() - int(counts.sort(descending=True).values[:7].sum())
    assert zip_gemv.pack(weight_RC).num_fallbacks == expected > 0


@needs_native
@pytest.mark.parametrize("make", [gaussian, any_words])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_have_the_bits_of_the_plain_twin(make: Callable[..., Tensor], shape: tuple[int, int]) -> None:
    weight_RC = make(*shape)
    packed = zip_gemv.pack(weight_RC)
    x_MC = torch.randn(40, shape[1])
    for level in LEVELS:
        packed.prepared.clear()
        cpu_impl.prepare(packed, level)
        level = packed.prepared["native"][0].level  # lower where weights are infinite
        for count in (*range(1, 8), 11, 17, 22, 27, 32, 40 if level == cpu_impl.AMX and shape[1] % 64 == 0 else 32):
            y_MR = cpu_impl.matmul(x_MC[:count], packed)
            assert same_values(y_MR, cpu_impl.bf16_matmul(x_MC[:count], weight_RC, level)), (level, count)
    if make is gaussian:
        x_MC = x_MC[: y_MR.shape[0]]
        exact_MR = x_MC.double() @ weight_RC.double().T
        assert (y_MR.double() - exact_MR).abs().max() <= 1e-6 * (x_MC.norm() * weight_RC.float().norm())


@needs_native
@pytest.mark.parametrize("columns", [1031, 1088])
def test_products_do_not_depend_on_batch_threads_or_vector_width(columns: int) -> None:
    weight_RC = gaussian(1030, columns)
    packed = zip_gemv.pack(weight_RC)
    x_MC = torch.randn(6, columns)
    cpu_impl.prepare(packed, cpu_impl.AVX512)
    y_MR = zip_gemv.matmul(x_MC, packed, "native")
    assert same_bits(torch.cat([zip_gemv.matmul(row[None], packed, "native") for row in x_MC]), y_MR)
    assert same_bits(zip_gemv.matmul(x_MC, packed, "native", start=9, stop=500), y_MR[:, 9:500])
    for level in LEVELS[1:]:
        packed.prepared.clear()
        cpu_impl.prepare(packed, level)
        count = len(x_MC) if level <= cpu_impl.AVX512 else 1
        assert same_bits(cpu_impl.matmul(x_MC[:count], packed), y_MR[:count]), level
    torch.set_num_threads(2)
    try:
        assert same_bits(zip_gemv.matmul(x_MC[:1], packed, "native"), y_MR[:1])
        assert same_bits(zip_gemv.unpack(packed, torch.bfloat16, "native"), weight_RC)
        which = torch.arange(1029, -1, -1)
        assert same_bits(zip_gemv.unpack_rows(packed, which, torch.float32, "native"), weight_RC[which].float())
        again = zip_gemv.pack(weight_RC)
        assert all(torch.equal(again.tensors[name], tensor) for name, tensor in packed.tensors.items())
    finally:
        torch.set_num_threads(1)


@pytest.mark.skipif(len(LEVELS) <= cpu_impl.AMX, reason="this processor has no AMX")
def test_tiles_do_not_depend_on_batch_threads_or_how_x_is_stored() -> None:
    weight_RC = gaussian(1030, 320)
    packed = zip_gemv.pack(weight_RC)
    assert cpu_impl.uses_tiles(packed)
    x_MC = torch.randn(75, 320)
    x_MC[3] = x_MC[3].bfloat16().float()
    y_MR = zip_gemv.matmul(x_MC, packed, "native")
    torch.testing.assert_close(y_MR, x_MC @ weight_RC.float().T, rtol=1e-5, atol=1e-5)
    for rows in (slice(0, 2), slice(2, 35), slice(40, 75)):
        assert same_bits(zip_gemv.matmul(x_MC[rows], packed, "native"), y_MR[rows])
    assert same_bits(
        zip_gemv.matmul(x_MC[[3, 3]], packed, "native")[0], y_MR[3]
    )  # all of x is BF16: one column, not three
    assert same_bits(zip_gemv.matmul(x_MC, packed, "native", start=7, stop=90), y_MR[:, 7:90])
    torch.set_num_threads(2)
    try:
        assert same_bits(zip_gemv.matmul(x_MC, packed, "native"), y_MR)
    finally:
        torch.set_num_threads(1)


@needs_native
def test_infinite_weights_and_activations_stay_what_they_are() -> None:
    weight_RC = gaussian(4, 64)
    weight_RC[1, 5], weight_RC[2, 6] = float("inf"), float("nan")
    x_MC = torch.ones(3, 64)  # exact in BF16: an infinite weight must not meet a zero part
    x_MC[1] += 2**-20
    expected_MR = x_MC @ weight_RC.float().T
    torch.testing.assert_close(zip_gemv.matmul(x_MC, zip_gemv.pack(weight_RC), "native"), expected_MR, equal_nan=True)
    packed = zip_gemv.pack(gaussian(4, 64))
    x_MC[0, 0], x_MC[1, 1] = float("inf"), float("nan")
    expected_MR = x_MC @ zip_gemv.unpack(packed, torch.float32).T
    torch.testing.assert_close(
        zip_gemv.matmul(x_MC, packed, "native"), expected_MR, rtol=1e-5, atol=1e-5, equal_nan=True
    )


@pytest.mark.parametrize("count", [0, 1, cpu_impl.FUSED_MAX_ROWS, cpu_impl.FUSED_MAX_ROWS + 1, 40])
def test_product_is_right_for_any_number_of_rows(count: int) -> None:
    weight_RC = gaussian(300, 700)
    packed = zip_gemv.pack(weight_RC)
    x_MC = torch.randn(count, 700)
    for backend in zip_gemv.available_backends():
        y_MR = zip_gemv.matmul(x_MC, packed, backend, start=1, stop=299)
        torch.testing.assert_close(y_MR, x_MC @ weight_RC.float().T[:, 1:299], rtol=1e-5, atol=1e-5)


@needs_native
def test_large_decode_then_multiply_covers_every_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_impl, "DECODE_BLOCK_BYTES", 4 * 64 * 7)
    weight_RC = gaussian(50, 64)
    x_MC = torch.randn(cpu_impl.FUSED_MAX_ROWS + 1, 64)
    packed = zip_gemv.pack(weight_RC)
    cpu_impl.prepare(packed, cpu_impl.AVX512)
    y_MR = cpu_impl.matmul(x_MC, packed, 3, 48)
    torch.testing.assert_close(y_MR, x_MC @ weight_RC.float().T[:, 3:48], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", zip_gemv.available_backends())
def test_out_is_written_and_checked(backend: zip_gemv.Backend) -> None:
    weight_RC = gaussian(9, 20)
    packed = zip_gemv.pack(weight_RC)
    out_RC = torch.full((9, 20), torch.nan, dtype=torch.bfloat16)
    assert zip_gemv.unpack(packed, torch.bfloat16, backend, out=out_RC) is out_RC
    assert same_bits(out_RC, weight_RC)
    for wrong in (out_RC.float(), out_RC[:8], torch.empty(20, 9, dtype=torch.bfloat16).T):
        with pytest.raises(ConfigError, match="out is"):
            zip_gemv.unpack(packed, torch.bfloat16, backend, out=wrong)


@pytest.mark.parametrize("backend", zip_gemv.available_backends())
def test_wrong_arguments_are_named(backend: zip_gemv.Backend) -> None:
    packed = zip_gemv.pack(gaussian(4, 6))
    with pytest.raises(ConfigError, match=r"dtype torch\.float16"):
        zip_gemv.unpack(packed, torch.float16, backend)
    with pytest.raises(ConfigError, match=r"rows 2\.\.5"):
        zip_gemv.unpack(packed, torch.bfloat16, backend, start=2, stop=5)
    with pytest.raises(ConfigError, match=r"outside 0\.\.3"):
        zip_gemv.unpack_rows(packed, torch.tensor([0, 4]), torch.bfloat16, backend)
    with pytest.raises(ConfigError, match="outside"):
        zip_gemv.unpack_rows(packed, torch.tensor([-1]), torch.bfloat16, backend)
    for x_MC in (torch.zeros(2, 5), torch.zeros(6), torch.zeros(1, 6, dtype=torch.bfloat16)):
        with pytest.raises(ConfigError, match=r"x is torch"):
            zip_gemv.matmul(x_MC, packed, backend)
    with pytest.raises(ConfigError, match="'fast' is not known"):
        zip_gemv.unpack(packed, torch.bfloat16, "fast")  # type: ignore[arg-type]


@pytest.mark.parametrize("weight", [torch.zeros(3, 3), torch.zeros(4, dtype=torch.bfloat16)])
def test_pack_takes_bf16_matrices_only(weight: Tensor) -> None:
    with pytest.raises(ConfigError, match=r"expected torch\.bfloat16"):
        zip_gemv.pack(weight)
    with pytest.raises(ConfigError, match="below 1"):
        zip_gemv.pack(torch.empty(0, 4, dtype=torch.bfloat16))


def test_arrays_of_another_size_or_dtype_are_refused() -> None:
    tensors = zip_gemv.pack(gaussian(40, 50)).tensors
    for name, wrong in {
        "low": tensors["low"][:-1],
        "codes": tensors["codes"].int(),
        "offsets": tensors["offsets"].int(),
        "fallbacks": tensors["fallbacks"][:63],
    }.items():
        with pytest.raises(FormatError, match="pack the matrix anew"):
            zip_gemv.PackedMatrix((40, 50), {**tensors, name: wrong})
    with pytest.raises(FormatError, match="table is nothing"):
        zip_gemv.PackedMatrix((40, 50), {key: value for key, value in tensors.items() if key != "table"})


@needs_native
@pytest.mark.parametrize("value", [-1, 1, 10**6])
@pytest.mark.parametrize("place", [0, 1, -1])
def test_damaged_offsets_are_refused_natively(value: int, place: int) -> None:
    packed = zip_gemv.pack(gaussian(100, 90))
    packed.tensors["offsets"][place] += value
    with pytest.raises(FormatError, match="out of range"):
        zip_gemv.unpack(packed, torch.bfloat16, "native")
    with pytest.raises(FormatError, match="out of range"):
        zip_gemv.matmul(torch.zeros(1, 90), packed, "native")


def test_copies_and_pickles_carry_the_arrays_alone() -> None:
    weight_RC = gaussian(12, 30)
    packed = zip_gemv.pack(weight_RC)
    zip_gemv.unpack(packed)
    for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert not other.prepared
        assert other.tensors["low"].data_ptr() != packed.tensors["low"].data_ptr()
        assert same_bits(zip_gemv.unpack(other), weight_RC)


def test_without_native_code_auto_takes_the_reference_and_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cpu_impl, "load", lambda: NativeLibrary(None, "no C++ compiler: tested"))
    zip_gemv._auto_is_native.cache_clear()
    weight_RC = gaussian(5, 9)
    try:
        with caplog.at_level(logging.INFO, logger="ernie_elastic.kernels.zip_gemv"):
            packed = zip_gemv.pack(weight_RC)
            assert same_bits(zip_gemv.unpack(packed), weight_RC)
            assert same_bits(zip_gemv.unpack(packed), weight_RC)
        assert [record.getMessage() for record in caplog.records] == [
            "zip_gemv: auto = reference (no C++ compiler: tested)"
        ]
        assert zip_gemv.available_backends() == ("reference",)
        with pytest.raises(ConfigError, match=r"no C\+\+ compiler: tested"):
            zip_gemv.matmul(torch.zeros(1, 9), packed, "native")
    finally:
        zip_gemv._auto_is_native.cache_clear()


@needs_native
@pytest.mark.parametrize(("hidden", "width"), [(72, 40), (128, 192), (1024, 512)])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 4, 1), (5, 8, 3), (0, 4, 2), (16, 3, 3)])
def test_a_layer_of_experts_in_one_call_is_their_products_one_by_one(
    tokens: int, experts: int, top_k: int, hidden: int, width: int
) -> None:
    dense = gaussian(experts * 2 * width, hidden), gaussian(experts * hidden, width)
    gate_up, down = (zip_gemv.pack(weight) for weight in dense)
    x_MC = torch.randn(tokens, hidden)
    ids_MK = torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)]) if tokens else torch.empty(0, top_k)
    ids_MK = ids_MK.long()
    weights_MK = torch.rand(tokens, top_k)
    expected_MC = torch.zeros(tokens, hidden)
    for token in range(tokens):
        for slot in range(top_k):
            expert = int(ids_MK[token, slot])
            rows = slice(2 * width * expert, 2 * width * (expert + 1))
            gate, up = (dense[0][rows].float() @ x_MC[token]).chunk(2)
            out = dense[1][hidden * expert : hidden * (expert + 1)].float() @ (torch.nn.functional.silu(gate) * up)
            expected_MC[token] += weights_MK[token, slot] * out
    got_MC = zip_gemv.experts(x_MC, gate_up, down, ids_MK, weights_MK)
    assert got_MC is not None
    torch.testing.assert_close(got_MC, expected_MC, rtol=2e-4, atol=2e-4)
    torch.set_num_threads(2)
    try:
        again_MC = zip_gemv.experts(x_MC, gate_up, down, ids_MK, weights_MK)
        assert again_MC is not None and same_bits(again_MC, got_MC)
    finally:
        torch.set_num_threads(1)


@needs_native
def test_experts_that_do_not_fit_one_call_are_left_to_the_caller() -> None:
    gate_up, down = zip_gemv.pack(gaussian(4 * 16, 8)), zip_gemv.pack(gaussian(4 * 8, 8))
    many = torch.zeros(cpu_impl.FUSED_MAX_ROWS + 1, 1, dtype=torch.int64)
    assert zip_gemv.experts(torch.zeros(len(many), 8), gate_up, down, many, torch.ones(len(many), 1)) is None
    one, ids, weights = torch.zeros(1, 8), many[:1], torch.ones(1, 1)
    assert zip_gemv.experts(one.double(), gate_up, down, ids, weights) is None
    assert zip_gemv.experts(one, gate_up, down, ids.int(), weights) is None
    assert zip_gemv.experts(one, gate_up, down, ids, weights.clone().requires_grad_()) is None
    for wrong in ((torch.zeros(1, 7), ids, weights), (one, ids, torch.ones(1, 2)), (torch.zeros(2, 8), ids, weights)):
        with pytest.raises(ConfigError, match="do not fit"):
            zip_gemv.experts(wrong[0], gate_up, down, *wrong[1:])
    with pytest.raises(ConfigError, match="do not fit"):
        zip_gemv.experts(one, down, gate_up, ids, weights)
    with pytest.raises(ConfigError, match="negative"):
        zip_gemv.experts(torch.zeros(1, 8), gate_up, down, -many[:1] - 1, torch.ones(1, 1))


@needs_native
def test_a_bound_product_keeps_its_matrix() -> None:
    weight = gaussian(64, 128)
    product = zip_gemv.bind(zip_gemv.pack(weight))
    gc.collect()
    spare = [torch.full((64 * 128,), 255, dtype=torch.uint8) for _ in range(8)]  # whatever was freed is used again
    assert product is not None and len(spare) == 8
    torch.testing.assert_close(product(torch.ones(1, 128)), weight.float().sum(1)[None], rtol=1e-4, atol=1e-5)
