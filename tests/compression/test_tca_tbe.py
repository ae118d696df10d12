"""The published layout: its order of tiles, its streams and its padding, checked one weight at a time."""

from __future__ import annotations

import numpy as np
import torch

from ernie_elastic.compression import encode
from ernie_elastic.compression.bits import exponents
from ernie_elastic.compression.format import BodyReader, read_header
from ernie_elastic.compression.tca_tbe import from_tiles, to_tiles


def coordinates(position: int) -> tuple[int, int]:
    """Row and column in a BlockTile of 64x64 of a position in tile order, from docs/formats.md 2.2."""
    stripe, rest = divmod(position, 1024)
    core, rest = divmod(rest, 256)
    fragment, rest = divmod(rest, 64)
    row, column = divmod(rest, 8)
    return stripe * 16 + (fragment % 2) * 8 + row, core * 16 + (fragment // 2) * 8 + column


def test_order_of_tiles_is_the_published_one() -> None:
    matrix = np.arange(128 * 192, dtype=np.uint16).reshape(128, 192)
    tiles = to_tiles(matrix)
    assert tiles.shape == (6, 4096)
    for block in range(6):
        for position in range(0, 4096, 7):
            row, column = coordinates(position)
            assert tiles[block, position] == matrix[block // 3 * 64 + row, block % 3 * 64 + column]
    assert np.array_equal(from_tiles(tiles, 128, 192), matrix)
    # The four FragTiles of a TensorCoreTile, column-major: the order of the A fragment of mma.m16n8k16.
    assert [coordinates(64 * k) for k in range(5)] == [(0, 0), (8, 0), (0, 8), (8, 8), (0, 16)]


def test_streams_and_offsets_one_weight_at_a_time() -> None:
    weight = (torch.randn(70, 100, generator=torch.Generator().manual_seed(1)) * 0.02).to(torch.bfloat16)
    stream = encode(weight, "w", "tca_tbe").stream
    header = read_header(stream)
    reader = BodyReader(stream, header)
    ends = reader.take("<i8", 8).reshape(4, 2)
    stripes = reader.take("<i4", 32).reshape(4, 4, 2)
    bitmaps = reader.take("<u8", 3 * 4 * 64).reshape(3, 4, 64)
    full, low = reader.take("<u2", int(ends[-1, 1])), reader.take("u1", int(ends[-1, 0]))
    first = int(reader.take("u1", 1)[0])
    reader.end()
    words = weight.view(torch.int16).numpy().view(np.uint16)
    assert (ends[:, 0] % 16 == 0).all() and (ends[:, 1] % 8 == 0).all()
    for block in range(4):
        at = [int(ends[block - 1, k]) if block else 0 for k in range(2)]
        start = list(at)
        for position in range(4096):
            if position % 1024 == 0:
                assert [at[k] - start[k] for k in range(2)] == stripes[block, position // 1024].tolist()
            row, column = coordinates(position)
            row, column = row + block // 2 * 64, column + block % 2 * 64
            word = int(words[row, column]) if row < 70 and column < 100 else first << 7
            code = sum((int(bitmaps[k, block, position // 64]) >> (position % 64) & 1) << k for k in range(3))
            if code:
                assert word >> 7 & 0xFF == first + code - 1
                assert low[at[0]] == (word >> 8 & 0x80 | word & 0x7F)
            else:
                assert full[at[1]] == word and not 0 <= (word >> 7 & 0xFF) - first <= 6
            at[0 if code else 1] += 1
    assert int(exponents(full[:1])[0]) != 0


def test_size_matches_the_paper_on_gaussian_weights() -> None:
    weight = (torch.randn(512, 512) * 0.02).to(torch.bfloat16)
    published, ours = encode(weight, "w", "tca_tbe"), encode(weight, "w", "dense_plane")
    # paper: 11.3 bits a weight; what ours saves is offsets and padding alone.
    assert 11.25 < published.bits_per_weight < 11.36
    assert 0.05 < published.bits_per_weight - ours.bits_per_weight < 0.15
    assert published.fallbacks == ours.fallbacks
