// The run-time layout of reference.py as C++ sees it, and the portable loops.
//
// Sum order of every product but those of amx.h (compressed or plain BF16, any instruction set with FMA, any number of
// rows of x): 64 partial sums, one per column residue mod 64, each in column order by FMA, then one fixed tree (tree_sum). So the
// compressed product has the bits of the plain BF16 product. The portable loops keep the order but round the product
// and the sum apart, for processors without FMA.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#include "levels.h"

// Before loops over registers: unrolled early, so that arrays of vectors live in registers.
#define ZIP_UNROLL _Pragma("GCC unroll 16")

namespace zip {

constexpr int64_t kTile = 4096;  // weights between two entries of `offsets`
constexpr int64_t kGroup = 64;   // weights decoded at once: 24 bytes of codes
constexpr int64_t kSums = 64;    // partial sums of a dot product
constexpr int64_t kLane = 32;    // weights that are widened at once: half of them
constexpr int64_t kChunk = 2048; // weights of a product that wait in L1 where nothing is fused; a multiple of kSums
constexpr int kMaxTile = 4;      // rows of x that share decoded weights in registers, at most
// Bytes asked for ahead, measured: of plain words (into L2), and of the streams that hold packed weights (into L1).
constexpr int64_t kWordsAhead = 16384;
constexpr int64_t kLowAhead = 8192;
constexpr int64_t kCodesAhead = kLowAhead / 8 * 3;
constexpr int64_t kFallbackShare = 32;  // one weight in so many is a fallback, roughly
constexpr int kPackedRows = 2, kPlainRows = 4;  // rows read at once for one row of x: more streams, fewer loads of x

// Passed from Python as it is (cpu_impl.Matrix). level: the highest instruction set that may be used.
struct Matrix {
  const uint8_t* low;
  const uint8_t* codes;
  const uint8_t* table;
  const int64_t* offsets;
  const uint8_t* fallbacks;  // 64 bytes longer than the last offset
  int64_t rows, columns, level;

  int64_t count() const { return rows * columns; }
  int64_t tiles() const { return (count() + kTile - 1) / kTile; }
  int64_t code_bytes() const { return 3 * ((count() + 7) / 8); }
  uint32_t code(int64_t i) const {
    const uint8_t* p = codes + 3 * (i / 8);
    const uint32_t word = p[0] | uint32_t(p[1]) << 8 | uint32_t(p[2]) << 16;
    return (word >> 3 * (i % 8)) & 7;
  }
  // The weight at i; `fallback` is its fallback if it is one, and moves on in that case.
  uint16_t word(int64_t i, const uint8_t*& fallback) const {
    const uint32_t c = code(i), exponent = c ? table[c] : *fallback++;
    return uint16_t((low[i] & 0x80u) << 8 | exponent << 7 | (low[i] & 0x7Fu));
  }
};

// Bytes that AVX2 reads beyond a group of codes: groups whose read would leave the array are left to `word`.
constexpr int64_t kCodeSlack = 4;

// Whole groups of the flat range [i, end) that vector code may read.
inline int64_t whole_groups(const Matrix& m, Level level, int64_t i, int64_t end) {
  const int64_t readable = level >= kAvx512 ? end : std::min(end, (m.code_bytes() - kCodeSlack) / 3 * 8);
  return std::max<int64_t>(0, (readable - i) / kGroup);
}

inline float widen(uint16_t bits) {
  const uint32_t word = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}

// Both halves, then neighbours, then halves again and again.
inline float tree_sum(const float* p) {
  float pair[16];
  for (int i = 0; i < 16; ++i) pair[i] = (p[2 * i] + p[2 * i + kLane]) + (p[2 * i + 1] + p[2 * i + 1 + kLane]);
  for (int width = 8; width >= 1; width /= 2)
    for (int i = 0; i < width; ++i) pair[i] += pair[i + width];
  return pair[0];
}

// Floats on 64-byte lines, all zero.
class Lines {
 public:
  explicit Lines(int64_t count) : data_(static_cast<float*>(std::aligned_alloc(64, bytes(count)))) {
    if (data_ == nullptr) throw std::bad_alloc();
    std::memset(data_, 0, bytes(count));
  }
  Lines(const Lines&) = delete;
  Lines& operator=(const Lines&) = delete;
  ~Lines() { std::free(data_); }
  float* at(int64_t i) const { return data_ + i; }

 private:
  static size_t bytes(int64_t count) { return size_t(count * 4 + 127) / 64 * 64; }
  float* data_;
};

// `tile` rows of x at x[t], in the order of columns that the kernel wants and padded with zeros to whole groups, and
// where row r's results go: y[t][r - first].
struct Rows {
  const float* const* x;
  float* const* y;
  int tile;
  int64_t first;
};

// Weights of columns begin..end of one row as BF16 words. The partial sums pass from part to part through `sums`
// [tile, kSums], in whatever order the code that runs keeps them; the last part writes row r's results.
struct Part {
  const uint16_t* words;
  int64_t begin, end, columns, row;
  float* sums;

  bool is_first() const { return begin == 0; }
  bool is_last() const { return end == columns; }
};

inline void dot_portable(const Part& part, const Rows& rows) {
  for (int t = 0; t < rows.tile; ++t) {
    float* sums = part.sums + t * kSums;
    if (part.is_first()) std::fill(sums, sums + kSums, 0.0f);
    for (int64_t c = part.begin; c < part.end; ++c) sums[c % kSums] += widen(part.words[c - part.begin]) * rows.x[t][c];
    if (part.is_last()) rows.y[t][part.row - rows.first] = tree_sum(sums);
  }
}

}  // namespace zip
