// AVX2 + FMA code, compiled for that target whatever the build's flags are and chosen at run time.
#pragma once
#include "layout.h"

#ifdef ZIP_X86
#define ZIP_AVX2 __attribute__((target("avx2,fma")))

namespace zip::avx2 {

constexpr int64_t kGroup = 32;  // weights decoded at once
constexpr int64_t kSlack = 4;   // code bytes read beyond the last group
constexpr int kTile = 2;        // rows of x that share decoded weights in registers

ZIP_AVX2 inline __m256i load(const void* place) { return _mm256_loadu_si256(static_cast<const __m256i*>(place)); }

ZIP_AVX2 inline __m256i load_table(const uint8_t* table) {
  int64_t eight;
  std::memcpy(&eight, table, 8);
  return _mm256_set1_epi64x(eight);
}

// High bytes of 32 weights in order, from their 12 code bytes (16 are read).
ZIP_AVX2 inline __m256i high_bytes(const uint8_t* codes, __m256i table) {
  // Each 16-bit lane gets the two bytes that hold its 6-bit pair of codes; a multiply moves the pair to bits 10..15.
  const __m256i pick = _mm256_setr_epi8(0, 1, 0, 1, 1, 2, 2, 3, 3, 4, 3, 4, 4, 5, 5, 6,
                                        6, 7, 6, 7, 7, 8, 8, 9, 9, 10, 9, 10, 10, 11, 11, 12);
  const __m256i align = _mm256_set1_epi64x(0x0100004000100400);
  const __m256i raw = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
  const __m256i pair = _mm256_mullo_epi16(_mm256_shuffle_epi8(raw, pick), align);
  const __m256i second = _mm256_and_si256(_mm256_srli_epi16(pair, 5), _mm256_set1_epi16(0x0700));
  // Bit 3 of the even codes is a bit of their neighbour: the table repeats its 8 entries, so it does not matter.
  return _mm256_shuffle_epi8(table, _mm256_or_si256(_mm256_srli_epi16(pair, 10), second));
}

ZIP_AVX2 inline void decode_bf16(const Matrix& m, int64_t begin, int64_t end, uint16_t* out) {
  const __m256i table = load_table(m.table);
  for (int64_t i = begin; i < end; i += kGroup) {
    const __m256i high = _mm256_permute4x64_epi64(high_bytes(m.codes + 3 * (i / 8), table), 0xD8);
    const __m256i low = _mm256_permute4x64_epi64(load(m.low + i), 0xD8);
    __m256i* place = reinterpret_cast<__m256i*>(out + (i - begin));
    _mm256_storeu_si256(place, _mm256_unpacklo_epi8(low, high));
    _mm256_storeu_si256(place + 1, _mm256_unpackhi_epi8(low, high));
  }
}

ZIP_AVX2 inline void decode_fp32(const Matrix& m, int64_t begin, int64_t end, uint32_t* out) {
  const __m256i table = load_table(m.table), zero = _mm256_setzero_si256();
  for (int64_t i = begin; i < end; i += kGroup) {
    const __m256i high = high_bytes(m.codes + 3 * (i / 8), table);
    const __m256i low = load(m.low + i);
    // The 128-bit halves of a hold words 0..7 and 16..23, those of b 8..15 and 24..31.
    const __m256i a = _mm256_unpacklo_epi8(low, high), b = _mm256_unpackhi_epi8(low, high);
    const __m256i a0 = _mm256_unpacklo_epi16(zero, a), a1 = _mm256_unpackhi_epi16(zero, a);
    const __m256i b0 = _mm256_unpacklo_epi16(zero, b), b1 = _mm256_unpackhi_epi16(zero, b);
    __m256i* place = reinterpret_cast<__m256i*>(out + (i - begin));
    _mm256_storeu_si256(place, _mm256_permute2x128_si256(a0, a1, 0x20));
    _mm256_storeu_si256(place + 1, _mm256_permute2x128_si256(b0, b1, 0x20));
    _mm256_storeu_si256(place + 2, _mm256_permute2x128_si256(a0, a1, 0x31));
    _mm256_storeu_si256(place + 3, _mm256_permute2x128_si256(b0, b1, 0x31));
  }
}

ZIP_AVX2 inline void decode_high(const Matrix& m, int64_t begin, int64_t end, uint8_t* out) {
  const __m256i table = load_table(m.table);
  for (int64_t i = begin; i < end; i += kGroup) {
    const uint8_t* codes = m.codes + 3 * (i / 8);
    _mm_prefetch(reinterpret_cast<const char*>(codes + kCodesAhead), _MM_HINT_T1);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + (i - begin)), high_bytes(codes, table));
  }
}

// Columns of a group of 32 in the order in which decoded weights fall into four vectors of 8 floats: from two byte
// streams (interleaved within 128-bit lanes), or from plain words.
inline int64_t stream_column(int64_t k) { return k % 8 / 4 * 16 + k / 16 * 8 + k % 4 * 2 + k / 8 % 2; }
inline int64_t word_column(int64_t k) { return k / 16 * 16 + k % 8 * 2 + k / 8 % 2; }

// The tree of tree_sum over 64 sums. streams: each half is in stream_column order, else in word_column order.
ZIP_AVX2 inline float reduce(const float* sums, bool streams) {
  __m256 s[4];
  ZIP_UNROLL for (int k = 0; k < 4; ++k)
    s[k] = _mm256_add_ps(_mm256_loadu_ps(sums + 8 * k), _mm256_loadu_ps(sums + kLane + 8 * k));
  __m256 a = _mm256_add_ps(s[0], s[1]), b = _mm256_add_ps(s[2], s[3]);
  if (streams) {
    const __m256 first = _mm256_permute2f128_ps(a, b, 0x20);
    b = _mm256_permute2f128_ps(a, b, 0x31);
    a = first;
  }
  a = _mm256_add_ps(a, b);
  __m128 c = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  c = _mm_add_ps(c, _mm_movehl_ps(c, c));
  return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}

// Rows of weights as two byte streams or as BF16 words; load32 gives weights i..i+31, +0 from the `rest`-th on.
struct Streams {
  const uint8_t *low, *high;  // high[0] belongs to low[origin]
  int64_t origin;
  static constexpr bool kStreams = true;

  ZIP_AVX2 static void join(const uint8_t* l, const uint8_t* h, __m256i& a, __m256i& b) {
    const __m256i low = load(l), high = load(h);
    a = _mm256_unpacklo_epi8(low, high), b = _mm256_unpackhi_epi8(low, high);
  }
  ZIP_AVX2 void load32(int64_t i, int64_t rest, __m256i& a, __m256i& b) const {
    _mm_prefetch(reinterpret_cast<const char*>(low + i + kLowAhead), _MM_HINT_T1);
    if (rest >= kLane) return join(low + i, high + (i - origin), a, b);
    uint8_t tail[2 * kLane] = {};
    std::memcpy(tail, low + i, size_t(rest));
    std::memcpy(tail + kLane, high + (i - origin), size_t(rest));
    join(tail, tail + kLane, a, b);
  }
};

struct Words {
  const uint16_t* words;
  static constexpr bool kStreams = false;

  ZIP_AVX2 void load32(int64_t i, int64_t rest, __m256i& a, __m256i& b) const {
    _mm_prefetch(reinterpret_cast<const char*>(words + i) + kWordsAhead, _MM_HINT_T1);
    uint16_t tail[kLane] = {};
    const uint16_t* source = words + i;
    if (rest < kLane) {
      std::memcpy(tail, source, 2 * size_t(rest));
      source = tail;
    }
    a = load(source), b = load(source + 16);
  }
};

// 32 weights given as words in a and b to floats: even and odd words of a, then of b.
ZIP_AVX2 inline void widen_32(__m256i a, __m256i b, __m256 (&w)[4]) {
  const __m256i upper = _mm256_set1_epi32(int(0xFFFF0000));
  w[0] = _mm256_castsi256_ps(_mm256_slli_epi32(a, 16)), w[1] = _mm256_castsi256_ps(_mm256_and_si256(a, upper));
  w[2] = _mm256_castsi256_ps(_mm256_slli_epi32(b, 16)), w[3] = _mm256_castsi256_ps(_mm256_and_si256(b, upper));
}

// Weights of every other group of 32 from column `begin` on, times T rows of x; kBoth: the groups between them too. The
// registers hold T * 4 sums a half, so two rows of x take the halves one after the other.
template <int T, bool kBoth, class Weights>
ZIP_AVX2 inline void accumulate(const Weights& weights, int64_t row, int64_t begin, int64_t end, const float* x,
                                int64_t stride, bool first, float* kept) {
  constexpr int kHalves = kBoth ? 2 : 1, kVectors = 4 * kHalves;
  __m256 sums[T][kVectors], w[4];
  ZIP_UNROLL for (int k = 0; k < T * kVectors; ++k)
    sums[k / kVectors][k % kVectors] =
        first ? _mm256_setzero_ps() : _mm256_loadu_ps(kept + k / kVectors * kSums + 8 * (k % kVectors));
  for (int64_t c = begin; c < end; c += kSums)
    ZIP_UNROLL for (int half = 0; half < kHalves; ++half) {
      const int64_t at = c + half * kLane;
      if (half > 0 && at >= end) break;
      __m256i a, b;
      weights.load32(row + at, end - at, a, b);
      widen_32(a, b, w);
      ZIP_UNROLL for (int k = 0; k < 4 * T; ++k) {
        __m256& sum = sums[k / 4][4 * half + k % 4];
        sum = _mm256_fmadd_ps(w[k % 4], _mm256_load_ps(x + k / 4 * stride + at + 8 * (k % 4)), sum);
      }
    }
  ZIP_UNROLL for (int k = 0; k < T * kVectors; ++k)
    _mm256_storeu_ps(kept + k / kVectors * kSums + 8 * (k % kVectors), sums[k / kVectors][k % kVectors]);
}

// The part times rows t..t+T-1 of x, which is in the column order of the weights, aligned and padded to whole groups.
template <int T, class Weights>
ZIP_AVX2 void dot(const Weights& weights, const Product& p, const Part& part, int64_t t) {
  const int64_t begin = part.begin, end = part.end, rows = part.rows, stride = p.stride, ldy = p.ldy;
  const bool first = part.is_first(), last = part.is_last();
  const float* x = p.x + t * stride;
  float *kept = part.sums + t * kSums, *y = part.y + t * ldy;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = r * part.columns;
    if constexpr (T == 1) {
      accumulate<1, true>(weights, row, begin, end, x, stride, first, kept);
    } else {
      accumulate<T, false>(weights, row, begin, end, x, stride, first, kept);
      accumulate<T, false>(weights, row, begin + kLane, end, x, stride, first, kept + kLane);
    }
    if (last)
      for (int k = 0; k < T; ++k) y[k * ldy + r] = reduce(kept + k * kSums, Weights::kStreams);
  }
}

}  // namespace zip::avx2
#endif  // ZIP_X86
