// The run-time layout of reference.py as C++ sees it, its fallback lists, and the portable loops.
//
// Sum order of every product (compressed or plain BF16, any instruction set with FMA, any number of rows of x): 64
// partial sums, one per column residue mod 64, each in column order by FMA, then one fixed tree (tree_sum). So the
// compressed product has the bits of the plain BF16 product. The portable loops keep the order but round the product
// and the sum apart, for processors without FMA.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define ZIP_X86 1
#include <immintrin.h>
#endif

// Before loops over registers: unrolled early, so that arrays of vectors live in registers.
#define ZIP_UNROLL _Pragma("GCC unroll 16")

namespace zip {

constexpr int64_t kBlock = 256;       // weights that one fallback list covers
constexpr int64_t kSums = 64;         // partial sums of a dot product
constexpr int64_t kLane = 32;         // weights that are widened at once: half of them
constexpr int64_t kSegment = 4096;    // weights decoded between two passes over their fallbacks
constexpr int64_t kChunk = 2048;      // columns of a product whose high bytes wait in L1; a multiple of kSums
// Bytes that a product asks for ahead (into L2: L1 has no room for them): low bytes in its second phase, codes in its
// first, so that memory is never idle; words of a plain matrix. Measured.
constexpr int64_t kLowAhead = 8192;
constexpr int64_t kCodesAhead = kLowAhead / 8 * 3;
constexpr int64_t kWordsAhead = 8192;
enum Level { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

// Passed from Python as it is (cpu_impl.Matrix). level: the highest instruction set that may be used.
struct Matrix {
  const uint8_t* low;
  const uint8_t* codes;
  const uint8_t* table;
  const int32_t* offsets;
  const uint8_t* positions;
  const uint8_t* highs;
  int64_t rows, columns, fallbacks, level;

  int64_t count() const { return rows * columns; }
  int64_t code_bytes() const { return 3 * ((count() + 7) / 8); }
  uint8_t high_at(int64_t i) const {
    const uint8_t* p = codes + 3 * (i / 8);
    const uint32_t word = p[0] | uint32_t(p[1]) << 8 | uint32_t(p[2]) << 16;
    return table[(word >> 3 * (i % 8)) & 7];
  }
};

// The highest instruction set of this processor that this file has code for, at most `wanted`.
inline Level supported_level(int64_t wanted) {
#ifdef ZIP_X86
  static const Level best = [] {
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return kPortable;
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi");
    return wide ? kAvx512 : kAvx2;
  }();
  return Level(std::min<int64_t>(best, wanted));
#else
  return Level(std::min<int64_t>(kPortable, wanted));
#endif
}

// Writes the true high byte of every fallback of the flat range [begin, end); the high byte of weight i is
// out[(i - begin) * kStride + kStride - 1]. False when the lists are damaged.
template <int kStride>
bool patch_fallbacks(const Matrix& m, int64_t begin, int64_t end, uint8_t* out) {
  uint8_t nowhere = 0;
  const uint8_t *positions = m.positions, *highs = m.highs;  // the byte writes below may alias m
  const int32_t* offsets = m.offsets;
  const int64_t fallbacks = m.fallbacks;
  for (int64_t block = begin / kBlock; block * kBlock < end; ++block) {
    const int64_t first = offsets[block], last = offsets[block + 1], base = block * kBlock;
    if (first < 0 || last < first || last > fallbacks) return false;
    int64_t k = first;
    if (base >= begin && base + kBlock <= end) {
      uint8_t* place = out + (base - begin) * kStride + kStride - 1;
      if (k + 8 <= fallbacks) {  // the usual count is 3 to 8: eight writes, those beyond the list to `nowhere`
        const uintptr_t away = reinterpret_cast<uintptr_t>(&nowhere);
        const uintptr_t shift = reinterpret_cast<uintptr_t>(place) - away;
        for (int j = 0; j < 8; ++j) {
          // Arithmetic, since a branch would be mispredicted for every other block.
          const uintptr_t valid = uintptr_t((k + j - last) >> 63);
          const uintptr_t target = away + ((shift + positions[k + j] * uintptr_t(kStride)) & valid);
          *reinterpret_cast<uint8_t*>(target) = highs[k + j];
        }
        k += 8;
      }
      for (; k < last; ++k) place[int64_t(positions[k]) * kStride] = highs[k];
      continue;
    }
    for (; k < last; ++k) {
      const int64_t i = base + positions[k];
      if (i >= begin && i < end) out[(i - begin) * kStride + kStride - 1] = highs[k];
    }
  }
  return true;
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

// x [m, columns] (rows `stride` apart) and y [m, ...] (rows `ldy` apart).
struct Product {
  const float* x;
  int64_t m, stride;
  float* y;
  int64_t ldy;
};

// Columns begin..end of `rows` adjacent rows of weights (whole rows when there are several). The partial sums of a row
// pass from part to part through `sums` [m, kSums], in whatever order the code that runs keeps them; the last part
// writes to y.
struct Part {
  int64_t rows, begin, end, columns;
  float* sums;
  float* y;

  bool is_first() const { return begin == 0; }
  bool is_last() const { return end == columns; }
};

// weight(r, c): the float at column c of row r.
template <class Weight>
void dot_portable(Weight weight, const Product& p, const Part& part) {
  for (int64_t r = 0; r < part.rows; ++r)
    for (int64_t t = 0; t < p.m; ++t) {
      float* sums = part.sums + t * kSums;
      if (part.is_first()) std::fill(sums, sums + kSums, 0.0f);
      for (int64_t c = part.begin; c < part.end; ++c) sums[c % kSums] += weight(r, c) * p.x[t * p.stride + c];
      if (part.is_last()) part.y[t * p.ldy + r] = tree_sum(sums);
    }
}

}  // namespace zip
