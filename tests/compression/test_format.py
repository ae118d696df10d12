"""The stream format: fixed vectors, and damage of every kind is refused, never decoded."""

from __future__ import annotations

import struct
import tracemalloc

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

from ernie_elastic.compression import decode, encode
from ernie_elastic.compression.format import (
    CHECKSUM_AT,
    CHECKSUM_BYTES,
    FIXED,
    LAYOUTS,
    build_stream,
    checksum_of,
    matrix_view,
    read_header,
)
from ernie_elastic.errors import FormatError

VECTOR = torch.tensor([[1.0, -2.5, 0.0], [0.02, 3e38, -0.0]]).to(torch.bfloat16)
# Whole for dense_plane and entropy_coded; for tca_tbe, whose one tile has 4096 weights, up to the first bitmap.
HEX = {
    "dense_plane": (
        "45544245020202000100000008000000237e6f362b04349dc1e80a75715e7c4002000000000000000300000000000000"
        "612e776569676874040000000000000000a000246280240000007f8079fe"
    ),
    "entropy_coded": (
        "45544245020302000100000008000000e9a58bf31073eba5d83ca0831a6b0de502000000000000000300000000000000"
        "612e7765696768740c0000000000000000797f80fe0102030405060708090a00a00024628028b52ffd20031900003210"
        "04"
    ),
    "tca_tbe": (
        "45544245020102000100000008000000410880b99e46f67898494531d6d839cb02000000000000000300000000000000"
        "612e776569676874001000000000000008000000000000000000000000000000fc03000004000000fc07000004000000"
        "fc0b000004000000fcfcffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff"
        "ffffffffffffffffffffffffffffffff"
    ),
}
TCA_BYTES = 5753
# The same tensor as version 1 wrote it: another checksum, the same body.
HEX_VERSION_1 = "455442450102020001000000080000003f88c6fd9a0107543fc31bc35fb7b40e" + HEX["dense_plane"][64:]


def gaussian(rows: int, columns: int) -> torch.Tensor:
    """The same BF16 [rows, columns] at every call: Hypothesis replays its draws."""
    return (torch.randn(rows, columns, generator=torch.Generator().manual_seed(5)) * 0.02).to(torch.bfloat16)


def sealed(stream: np.ndarray) -> np.ndarray:
    """The stream with the checksum that its bytes ask for: damage that a checksum cannot see."""
    stream = stream.copy()
    stream[CHECKSUM_AT : CHECKSUM_AT + CHECKSUM_BYTES] = np.frombuffer(checksum_of(stream), dtype=np.uint8)
    return stream


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bytes_of_a_fixed_tensor(layout: str) -> None:
    stream = encode(VECTOR, "a.weight", layout).stream.tobytes()
    expected = bytes.fromhex(HEX[layout])
    if layout == "entropy_coded":  # another zstandard may pack otherwise: what it packed must be read for ever
        assert stream[:16] == expected[:16] and stream[32:48] == expected[32:48]
        stream = expected
    assert stream[: len(expected)].hex() == expected.hex()
    assert len(stream) == (TCA_BYTES if layout == "tca_tbe" else len(expected))
    decoded = decode(np.frombuffer(stream, dtype=np.uint8))
    assert torch.equal(decoded.view(torch.int16), VECTOR.view(torch.int16))


def test_version_1_is_still_read() -> None:
    stream = np.frombuffer(bytes.fromhex(HEX_VERSION_1), dtype=np.uint8).copy()
    assert torch.equal(decode(stream, name="a.weight").view(torch.int16), VECTOR.view(torch.int16))
    stream[-1] ^= 1
    with pytest.raises(FormatError, match="checksum"):
        decode(stream)
    stream[4] = 2
    with pytest.raises(FormatError, match="checksum"):
        decode(stream)


@given(st.data(), st.sampled_from(list(LAYOUTS)))
def test_any_changed_byte_is_noticed(data: st.DataObject, layout: str) -> None:
    stream = encode(gaussian(20, 30), "w", layout).stream.copy()
    place = data.draw(st.integers(0, stream.size - 1))
    stream[place] ^= data.draw(st.integers(1, 255))
    with pytest.raises(FormatError):
        decode(stream)


@given(st.data(), st.sampled_from(list(LAYOUTS)))
def test_damage_under_a_right_checksum_is_refused_or_decodes_to_itself(data: st.DataObject, layout: str) -> None:
    """Every stream has one valid encoding: what decodes at all must encode to the very same bytes."""
    stream = encode(gaussian(9, 23), "w", layout).stream.copy()
    for _ in range(data.draw(st.integers(1, 3))):
        stream[data.draw(st.integers(0, stream.size - 1))] = data.draw(st.integers(0, 255))
    stream = sealed(stream)
    try:
        decoded = decode(stream)
    except FormatError:
        return
    header = read_header(stream)
    again = encode(decoded, header.name, header.layout)
    # A window that is not the best one is the only freedom that is left.
    assert again.stream.size <= stream.size
    assert torch.equal(decode(again.stream).view(torch.int16), decoded.view(torch.int16))


@given(st.binary(max_size=200))
def test_random_bytes_are_refused(content: bytes) -> None:
    with pytest.raises(FormatError):
        decode(np.frombuffer(content, dtype=np.uint8))


@given(st.integers(0, 1), st.data())
def test_cut_and_grown_streams_are_refused(which: int, data: st.DataObject) -> None:
    stream = encode(VECTOR, "w", list(LAYOUTS)[which]).stream
    cut = stream[: data.draw(st.integers(0, stream.size - 1))]
    with pytest.raises(FormatError):
        decode(cut)
    with pytest.raises(FormatError):
        decode(sealed(np.concatenate([stream, np.zeros(1, dtype=np.uint8)])))
    if cut.size > 48:
        with pytest.raises(FormatError):
            decode(sealed(cut))


@pytest.mark.parametrize(
    ("offset", "form", "value"),
    [
        (0, "<I", 7), (4, "B", 0), (4, "B", 3), (5, "B", 4), (5, "B", 0), (6, "B", 9), (6, "B", 1), (7, "B", 1),
        (8, "<I", 2), (8, "<I", 0), (12, "<I", 5000), (12, "<I", 4), (32, "<Q", 128), (32, "<Q", 2**40),
        (40, "<Q", 2**63), (48, "B", 0xFF),
    ],
)  # fmt: skip
@pytest.mark.parametrize("layout", LAYOUTS)
def test_wrong_header_fields_are_refused_even_under_a_right_checksum(
    layout: str, offset: int, form: str, value: int
) -> None:
    stream = encode(VECTOR, "weight", layout).stream.copy()
    stream[offset : offset + struct.calcsize(form)] = np.frombuffer(struct.pack(form, value), dtype=np.uint8)
    with pytest.raises(FormatError):
        decode(sealed(stream))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2**40, 2**20), (2**61,), (2**30, 2**10, 2**10), (0, 2**63), (2**63, 2)])
def test_a_header_that_claims_terabytes_is_refused_before_allocation(layout: str, shape: tuple[int, ...]) -> None:
    head = FIXED.pack(b"ETBE", 2, LAYOUTS[layout], len(shape), 0, matrix_view(shape)[0] % 2**32, 0, bytes(16))
    stream = np.frombuffer(head + struct.pack(f"<{len(shape)}Q", *shape) + bytes(500), dtype=np.uint8)
    tracemalloc.start()
    try:
        with pytest.raises(FormatError):
            decode(sealed(stream))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_stream_is_bound_to_its_name() -> None:
    stream = encode(VECTOR, "layers.0.weight").stream
    with pytest.raises(FormatError, match=r"layers\.0\.weight"):
        decode(stream, "model.safetensors", "layers.1.weight")


@pytest.mark.parametrize("layout", ["dense_plane", "tca_tbe"])
def test_set_padding_bits_and_fallbacks_in_the_window_are_refused(layout: str) -> None:
    tensor = torch.tensor([1.0, 1.5, 3e38]).to(torch.bfloat16)
    stream = encode(tensor, "", layout).stream
    if layout == "dense_plane":
        bad_bit, fallback = stream.size - 3, stream.size - 1  # last plane byte, then `first`, then the fallback
        for place, value in ((bad_bit, 0x80), (fallback, 127)):
            changed = stream.copy()
            changed[place] = value
            with pytest.raises(FormatError):
                decode(sealed(changed))
    else:
        for place in range(stream.size - 20, stream.size - 1):  # sign bytes of padded weights, then a byte of padding
            changed = stream.copy()
            changed[place] ^= 0x80
            with pytest.raises(FormatError):
                decode(sealed(changed))


def test_how_a_tensor_is_read_as_matrices() -> None:
    assert matrix_view(()) == (1, 1, 1) and matrix_view((5,)) == (1, 1, 5) and matrix_view((4, 5)) == (1, 4, 5)
    assert matrix_view((3, 32, 32)) == (3, 32, 32) and matrix_view((3, 31, 33)) == (1, 3, 1023)
    assert matrix_view((2, 3, 4, 500)) == (1, 2, 6000) and matrix_view((0, 40, 40)) == (1, 0, 1600)


def test_limits_of_the_format_are_named() -> None:
    with pytest.raises(FormatError, match="limits"):
        build_stream("dense_plane", "n" * 5000, (1,), [])
    with pytest.raises(FormatError, match="limits"):
        build_stream("dense_plane", "n", (1,) * 9, [])
