// AMX (BF16 tiles): products with two rows of x and more, where AVX-512 would be held up by its multiplications.
//
// A float32 x is the exact sum of three BF16 numbers, each in a column of its own; a tile multiplies 16 rows of weights
// by 16 such columns. Packed weights are decoded into L2, 32 rows at a time in the order of memory, plain ones are read
// in place; both are multiplied in the same order, so the packed product has the bits of the plain one, and a row of x
// has the same results whatever stands beside it. Subnormal weights count as zero. Infinite and NaN weights must not
// come here: infinity times a zero part of x is NaN.
#pragma once

#include <cstring>
#include <vector>

#include "avx512.h"

#ifdef ZIP_HAS_AMX
#define ZIP_AMX \
  __attribute__((target("avx2,fma,bmi,popcnt,avx512f,avx512bw,avx512vl,avx512vbmi,avx512vbmi2,amx-tile,amx-bf16")))
#define ZIP_AMX_INLINE ZIP_AMX __attribute__((always_inline)) inline
#endif

namespace zip::amx {

constexpr int64_t kStep = 32;      // columns of a tile
constexpr int64_t kMaxTiles = 6;   // tiles of columns of x that share decoded weights: six sums stay in registers
constexpr int64_t kRowsOfTwo = 8192;  // columns up to which two tiles of rows are decoded together: they stay in L2
constexpr int64_t kTileWords = 512, kTileFloats = 256;  // a tile: 16 rows of 64 bytes

// Rows of x as tiles: [columns / 32][tiles][16][16][2] BF16 words. parts: 3, or 1 when all of x is BF16 already.
struct Activations {
  int64_t number, columns, parts, tiles;
  std::vector<uint16_t> words;

  // As many rows as `number` that fit kMaxTiles.
  static int64_t limit(int64_t parts) { return kMaxTiles * 16 / parts; }

  static bool is_narrow(const float* x, int64_t count) {
    uint32_t rest = 0;
    for (int64_t i = 0; i < count; ++i) {
      uint32_t bits;
      std::memcpy(&bits, x + i, 4);
      rest |= bits & 0xFFFF;
    }
    return rest == 0;
  }

  Activations(const float* x, int64_t number_, int64_t columns_, int64_t parts_)
      : number(number_), columns(columns_), parts(parts_), tiles((number_ * parts_ + 15) / 16),
        words(size_t(columns_ / kStep * tiles * kTileWords + 32)) {
    for (int64_t t = 0; t < number; ++t)
      for (int64_t c = 0; c < columns; c += kStep) {
        uint16_t* place[3] = {};
        for (int64_t part = 0; part < parts; ++part) {
          const int64_t column = t * parts + part;
          place[part] = start() + (c / kStep * tiles + column / 16) * kTileWords + column % 16 * 2;
        }
        for (int64_t k = 0; k < kStep; ++k) split(x[t * columns + c + k], place, k / 2 * 32 + k % 2);
      }
  }
  // value as the sum of `parts` BF16 numbers to place[part][at].
  void split(float value, uint16_t* const* place, int64_t at) const {
    for (int64_t part = 0; part < parts; ++part) {
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      const bool finite = (bits & 0x7F800000) != 0x7F800000;
      if (value != value) bits |= 0x400000;  // a NaN stays one without its lower half
      bits &= 0xFFFF0000;
      place[part][at] = uint16_t(bits >> 16);
      float taken;
      std::memcpy(&taken, &bits, 4);
      value = finite ? value - taken : 0.0f;
    }
  }
  // On a cache line.
  uint16_t* start() {
    return reinterpret_cast<uint16_t*>((reinterpret_cast<uintptr_t>(words.data()) + 63) / 64 * 64);
  }
};

#ifdef ZIP_HAS_AMX
struct alignas(64) Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};

  Config() {
    for (int k = 0; k < 8; ++k) bytes[k] = 64, rows[k] = 16;
  }
};

// The intrinsics take literal numbers of tiles: 0 weights, 1 x, 2..7 sums.
ZIP_AMX_INLINE void multiply(int64_t sum) {
  switch (sum) {
    case 0: _tile_dpbf16ps(2, 0, 1); break;
    case 1: _tile_dpbf16ps(3, 0, 1); break;
    case 2: _tile_dpbf16ps(4, 0, 1); break;
    case 3: _tile_dpbf16ps(5, 0, 1); break;
    case 4: _tile_dpbf16ps(6, 0, 1); break;
    default: _tile_dpbf16ps(7, 0, 1); break;
  }
}
ZIP_AMX_INLINE void clear_sums() {
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
}
ZIP_AMX_INLINE void store(int64_t sum, float* out) {
  switch (sum) {
    case 0: _tile_stored(2, out, 64); break;
    case 1: _tile_stored(3, out, 64); break;
    case 2: _tile_stored(4, out, 64); break;
    case 3: _tile_stored(5, out, 64); break;
    case 4: _tile_stored(6, out, 64); break;
    default: _tile_stored(7, out, 64); break;
  }
}

// Lines of [start, end) that are asked for bit by bit while tiles are multiplied, so that memory is never idle.
struct Ahead {
  const char *next, *end;

  ZIP_AMX_INLINE void ask(int64_t bytes) {
    for (const char* stop = std::min(end, next + bytes); next < stop; next += 64) _mm_prefetch(next, _MM_HINT_T1);
  }
};

// Packed rows as a source of tiles, decoded in order.
struct Packed {
  const Matrix& m;
  int64_t row, pitch;  // next row; words between decoded rows: a power of two would share cache sets
  const uint8_t* place;
  Lines lines;

  Packed(const Matrix& matrix, int64_t first, const uint8_t* fallbacks)
      : m(matrix), row(first), pitch(matrix.columns + 32), place(fallbacks), lines(16 * pitch) {}

  const uint16_t* fill(int64_t rows, int64_t) {
    uint16_t* words = reinterpret_cast<uint16_t*>(lines.at(0));
    for (int64_t r = 0; r < rows; ++r)
      avx512::decode(m, (row + r) * m.columns, m.columns / kGroup, place, words + r * pitch);
    row += rows;
    return words;
  }
  // The start of what is decoded next: as much as memory can deliver while tiles are multiplied.
  Ahead ahead(int64_t rows) const {
    const char* start = reinterpret_cast<const char*>(m.low + row * m.columns);
    return {start, start + rows * m.columns / 4};
  }
  int64_t bytes_a_step(int64_t rows) const { return rows * kStep / 4; }
};

// Plain rows, read in place but for the last few.
struct Plain {
  const uint16_t* next;
  int64_t pitch, columns;
  Lines lines;

  Plain(const uint16_t* w, int64_t columns_) : next(w), pitch(columns_), columns(columns_), lines(16 * columns_) {}

  const uint16_t* fill(int64_t rows, int64_t whole) {
    const uint16_t* words = next;
    next += rows * columns;
    if (rows == whole) return words;
    std::memcpy(lines.at(0), words, size_t(rows * columns) * 2);
    return reinterpret_cast<const uint16_t*>(lines.at(0));
  }
  Ahead ahead(int64_t rows) const {
    return {reinterpret_cast<const char*>(next), reinterpret_cast<const char*>(next + rows * columns)};
  }
  int64_t bytes_a_step(int64_t rows) const { return rows * kStep * 2; }
};

// `rows` rows of the source times the activations: out[t][row]. kTiles of x; kHalves tiles of rows at once.
template <int64_t kTiles, int64_t kHalves, class Source>
ZIP_AMX void multiply_rows(Source& source, int64_t rows, Activations& x, float* const* out) {
  const Config config;
  _tile_loadconfig(&config);
  alignas(64) float sums[kHalves * kTiles * kTileFloats];
  constexpr int64_t kRows = 16 * kHalves;
  const int64_t pitch = source.pitch * 2, ask = source.bytes_a_step(kRows);
  for (int64_t row = 0; row < rows; row += kRows) {
    const int64_t now = std::min(kRows, rows - row);
    const uint16_t* words = source.fill(now, kRows);
    Ahead ahead = source.ahead(std::min(kRows, rows - row - now));
    clear_sums();
    for (int64_t k = 0; k < x.columns / kStep; ++k) {
      ahead.ask(ask);
      ZIP_UNROLL for (int64_t h = 0; h < kHalves; ++h) {
        _tile_loadd(0, words + k * kStep + h * 16 * source.pitch, pitch);
        ZIP_UNROLL for (int64_t t = 0; t < kTiles; ++t) {
          _tile_loadd(1, x.start() + (k * kTiles + t) * kTileWords, 64);
          multiply(h * kTiles + t);
        }
      }
    }
    ZIP_UNROLL for (int64_t s = 0; s < kHalves * kTiles; ++s) store(s, sums + s * kTileFloats);
    for (int64_t t = 0; t < x.number; ++t)
      for (int64_t r = 0; r < now; ++r) {
        const auto sum = [&](int64_t column) {
          return sums[((r / 16 * kTiles + column / 16) * 16 + r % 16) * 16 + column % 16];
        };
        const int64_t column = t * x.parts;
        out[t][row + r] = x.parts == 1 ? sum(column) : sum(column) + (sum(column + 1) + sum(column + 2));
      }
  }
  _tile_release();
}

template <int64_t kTiles, class Source>
void multiply_rows(Source& source, int64_t rows, Activations& x, float* const* out) {
  if constexpr (kTiles <= 3)
    if (x.columns <= kRowsOfTwo) return multiply_rows<kTiles, 2>(source, rows, x, out);
  multiply_rows<kTiles, 1>(source, rows, x, out);
}

template <class Source>
void multiply_rows(Source& source, int64_t rows, Activations& x, float* const* out) {
  switch (x.tiles) {
    case 1: return multiply_rows<1>(source, rows, x, out);
    case 2: return multiply_rows<2>(source, rows, x, out);
    case 3: return multiply_rows<3>(source, rows, x, out);
    case 4: return multiply_rows<4>(source, rows, x, out);
    case 5: return multiply_rows<5>(source, rows, x, out);
    default: return multiply_rows<6>(source, rows, x, out);
  }
}
#endif  // ZIP_HAS_AMX

}  // namespace zip::amx
