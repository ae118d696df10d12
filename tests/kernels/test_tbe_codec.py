"""The native codec of `dense_plane`: the bytes of the reference at every level, and False for fields that lie."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

from ernie_elastic.errors import ConfigError
from ernie_elastic.kernels import native, tbe_codec
from ernie_elastic.kernels.tbe_codec import cpu_impl, reference
from ernie_elastic.kernels.tbe_codec.reference import RANKS, TILE, WINDOW, Fields, Words
from tests.support import ROOT

NATIVE = pytest.mark.skipif(cpu_impl.load().library is None, reason=f"no native codec: {cpu_impl.load().reason}")
LEVELS = range(cpu_impl.load().library.tbe_level() + 1 if cpu_impl.load().library is not None else 0)
SHAPES = [(1, 1), (3, 1), (2, 31), (1, 32), (5, 33), (2, 63), (1, 64), (3, 65), (1, TILE), (2, TILE + 1), (3, 5000),
          (1, 2 * TILE - 1), (0, 100), (4, 0)]  # fmt: skip


def gaussian(matrices: int, count: int, seed: int = 0) -> Words:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(matrices, count, generator=generator) * 0.02
    return values.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


def windows(words_En: Words, first: int | None = None) -> np.ndarray:
    """The given window for every matrix, or one that begins six below the largest exponent."""
    if first is not None or not words_En.size:
        return np.full(words_En.shape[0], first or 0, dtype=np.uint8)
    top = reference.exponents(words_En).max(axis=1).astype(np.int64)
    return np.clip(top - 6, 0, 249).astype(np.uint8)


def blank(words_En: Words, first_E: np.ndarray, more: int = 0) -> Fields:
    """Fields of the right sizes, filled with nonsense; more: so many fallbacks too many."""
    matrices, count = words_En.shape
    outside = reference.exponents(words_En) - first_E[:, None] >= WINDOW
    return Fields(
        np.full(matrices * -(-count // TILE), 77, dtype=np.int64),
        np.full((matrices, count), 0xAA, dtype=np.uint8),
        np.full((matrices, 3, -(-count // 8)), 0xAA, dtype=np.uint8),
        first_E,
        np.full(int(outside.sum()) + more, 0xAA, dtype=np.uint8),
    )


def arrays(fields: Fields) -> list[np.ndarray]:
    return [fields.ends_T, fields.low_En, fields.planes_E3P, fields.first_E, fields.fallback_F]


def library() -> object:
    return cpu_impl.load().library


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def check_all_levels(words_En: Words, first_E: np.ndarray) -> None:
    expected = blank(words_En, first_E)
    assert reference.encode(words_En, expected)
    back = np.zeros_like(words_En)
    assert reference.decode(expected, back) and np.array_equal(back, words_En)
    counts = reference.count_exponents(words_En)
    assert counts.sum() == words_En.size
    assert np.array_equal(cpu_impl.count_exponents(library(), words_En), counts)
    for level in LEVELS:
        fields = blank(words_En, first_E)
        assert cpu_impl.encode(library(), words_En, fields, level)
        for ours, theirs in zip(arrays(fields), arrays(expected), strict=True):
            assert np.array_equal(ours, theirs), cpu_impl.LEVELS[level]
        back = np.zeros_like(words_En)
        assert cpu_impl.decode(library(), fields, back, level) and np.array_equal(back, words_En)


@NATIVE
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_level_gives_the_bytes_of_the_reference(shape: tuple[int, int]) -> None:
    words_En = gaussian(*shape)
    check_all_levels(words_En, windows(words_En))
    check_all_levels(words_En, windows(words_En, 249))  # every weight is a fallback


@NATIVE
@pytest.mark.parametrize("first", [0, 1, 120, 248, 249])
def test_all_patterns_with_windows_at_both_ends(first: int, threads: int) -> None:
    every = np.arange(65536, dtype=np.uint16)
    mixed = np.random.default_rng(0).permutation(every)
    check_all_levels(np.stack([every, mixed]), np.array([first, first], dtype=np.uint8))


@NATIVE
def test_two_threads_split_many_tiles_and_matrices(threads: int) -> None:
    check_all_levels(words_En := gaussian(3, 700_001), windows(words_En))
    check_all_levels(words_En := gaussian(1, 2_100_000, 1), windows(words_En))


@NATIVE
@given(st.integers(0, 1000), st.integers(1, 4), st.integers(1, 300), st.integers(0, 249))
def test_random_words_and_windows(seed: int, matrices: int, count: int, first: int) -> None:
    words_En = np.random.default_rng(seed).integers(0, 65536, (matrices, count)).astype(np.uint16)
    check_all_levels(words_En, windows(words_En, first))


@NATIVE
@pytest.mark.parametrize("more", [-1, 1])
def test_another_number_of_fallbacks_is_refused(more: int) -> None:
    words_En = gaussian(2, 9000)
    for level in LEVELS:
        fields = blank(words_En, windows(words_En), more)
        assert not cpu_impl.encode(library(), words_En, fields, level)
        if more > 0:
            assert fields.fallback_F.min() == 0xAA  # nothing half done
    assert not reference.encode(words_En, blank(words_En, windows(words_En), more))


def damaged(words_En: Words) -> Iterator[tuple[str, Fields]]:
    """Fields that disagree, of every kind the decoder must see."""
    first_E = windows(words_En)

    def fresh() -> Fields:
        fields = blank(words_En, first_E)
        assert reference.encode(words_En, fields)
        assert fields.ends_T.size > 2 and fields.ends_T[0] > 1 and fields.fallback_F.size > 10
        return fields

    for name, place, value in (
        ("an end below the one before", 1, 0), ("a negative end", 0, -1), ("an end far beyond", 0, 2**62),
        ("an end one too high", 0, None), ("the lowest number there is", 1, -(2**63)),
    ):  # fmt: skip
        fields = fresh()
        fields.ends_T[place] = fields.ends_T[place] + 1 if value is None else value
        yield name, fields
    fields = fresh()
    fields.planes_E3P[0, :, 5] = 0
    yield "more fallbacks than listed", fields
    fields = fresh()
    fields.planes_E3P[...] = 0
    yield "nothing but fallbacks", fields
    fields = fresh()
    fields.planes_E3P[...] = 0xFF
    yield "no fallback", fields
    fields = fresh()
    fields.fallback_F[3] = first_E[0] + 2
    yield "a fallback inside its window", fields


@NATIVE
def test_fields_that_disagree_are_refused_at_every_level(threads: int) -> None:
    words_En = gaussian(1, 3 * TILE + 100)
    names = []
    for name, fields in damaged(words_En):
        out = np.empty_like(words_En)
        assert not reference.decode(fields, out), name
        for level in LEVELS:
            assert not cpu_impl.decode(library(), fields, out, level), (name, level)
        names.append(name)
    assert len(names) == 9


def test_back_ends_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    words_En = gaussian(1, 100)
    with pytest.raises(ConfigError, match="cuda"):
        tbe_codec.count_exponents(words_En, "cuda")  # type: ignore[arg-type]
    monkeypatch.setattr(cpu_impl, "load", lambda: native.NativeLibrary(None, "no C++ compiler: none asked for"))
    with pytest.raises(ConfigError, match="no C\\+\\+ compiler"):
        tbe_codec.decode(blank(words_En, windows(words_En)), words_En, "native")
    assert "auto = reference (no C++" in tbe_codec.backend_reason()
    fields = blank(words_En, windows(words_En))
    assert tbe_codec.encode(words_En, fields)
    out = np.empty_like(words_En)
    assert tbe_codec.decode(fields, out) and np.array_equal(out, words_En)
    assert np.array_equal(tbe_codec.count_exponents(words_En), reference.count_exponents(words_En))


@NATIVE
@given(st.integers(0, 1000), st.integers(0, 400), st.booleans())
def test_ranks_of_a_frame_are_the_reference_s(seed: int, count: int, any_word: bool) -> None:
    generator = np.random.default_rng(seed)
    words_N = gaussian(1, count, seed)[0] if not any_word else generator.integers(0, 65536, count).astype(np.uint16)
    table = generator.permutation(256)[:RANKS].astype(np.uint8)
    if not any_word:
        table[:8] = np.arange(113, 121)
        table[8:] = np.arange(7)
    low_N, native_low_N = np.empty(count, dtype=np.uint8), np.empty(count, dtype=np.uint8)
    pairs, escapes = reference.encode_ranks(words_N, table, low_N)
    found = cpu_impl.encode_ranks(library(), words_N, table, native_low_N)
    assert np.array_equal(found[0], pairs) and np.array_equal(found[1], escapes)
    assert np.array_equal(native_low_N, low_N)
    for decode in (reference.decode_ranks, lambda *rest: cpu_impl.decode_ranks(library(), *rest)):
        back = np.zeros_like(words_N)
        assert decode(pairs, low_N, table, escapes, back) and np.array_equal(back, words_N)
        assert not decode(pairs, low_N, table, np.append(escapes, np.uint8(9)), back)
        if escapes.size:
            assert not decode(pairs, low_N, table, escapes[:-1], back)
    assert tbe_codec.decode_ranks(pairs, low_N, table, escapes, back, "reference")


LITTLE_MEMORY = """
import resource, sys
import torch
from ernie_elastic.compression import encode
torch.set_num_threads(2)
words = torch.randint(0, 65536, (4096, 4096), dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
encode(words[:64, :64])
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[1]), -1))
try:
    encode(words)
except MemoryError as error:
    print("refused:", error)
else:
    print("encoded")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
@pytest.mark.parametrize("megabytes", [60, 90, 110])
def test_too_little_memory_is_an_error_not_the_end_of_the_process(megabytes: int) -> None:
    command = [sys.executable, "-c", LITTLE_MEMORY, str(megabytes << 20)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-500:]
    assert done.stdout.startswith(("refused:", "encoded"))
