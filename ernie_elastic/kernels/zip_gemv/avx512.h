// AVX-512 (F, BW, VL, VBMI, VBMI2) code: the same results as avx2.h, bit for bit.
#pragma once
#include "layout.h"

#ifdef ZIP_X86
#define ZIP_AVX512 __attribute__((target("avx2,fma,bmi,popcnt,avx512f,avx512bw,avx512vl,avx512vbmi,avx512vbmi2")))
#define ZIP_AVX512_INLINE ZIP_AVX512 __attribute__((always_inline)) inline

namespace zip::avx512 {

// Byte tables of the shuffles below, filled once.
struct Indices {
  alignas(64) uint8_t spread[64];  // the three code bytes of each 8 weights to the start of a 64-bit lane
  alignas(64) uint8_t fields[64];  // bit offsets 0, 3, .. 21 within each 64-bit lane
  alignas(64) uint64_t first[8];   // 64-bit lanes of two interleaved vectors that hold words 0..31
  alignas(64) uint64_t second[8];  // words 32..63

  Indices() {
    for (int k = 0; k < 64; ++k) {
      spread[k] = uint8_t(k % 8 < 3 ? 3 * (k / 8) + k % 8 : 63);
      fields[k] = uint8_t(3 * (k % 8));
    }
    for (int k = 0; k < 8; ++k) {
      first[k] = uint64_t(k / 4 * 2 + k % 2 + k % 4 / 2 * 8);
      second[k] = first[k] + 4;
    }
  }
};

inline const Indices& indices() {
  static const Indices all;
  return all;
}

// What decoding keeps in registers. table: code -> exponent, repeated, so that a look-up may use 6 bits of a field.
struct Constants {
  __m512i table, spread, fields;

  ZIP_AVX512_INLINE static Constants of(const Matrix& m) {
    int64_t eight;
    std::memcpy(&eight, m.table, 8);
    return {_mm512_set1_epi64(eight), _mm512_load_si512(indices().spread), _mm512_load_si512(indices().fields)};
  }
};

// 64 fields whose low three bits are the codes, from 24 bytes.
ZIP_AVX512_INLINE __m512i fields_of(const uint8_t* codes, const Constants& k) {
  const __m512i raw = _mm512_zextsi256_si512(_mm256_maskz_loadu_epi8(0xFFFFFFu, codes));
  return _mm512_multishift_epi64_epi8(k.fields, _mm512_permutexvar_epi8(k.spread, raw));
}

// Which of 64 weights are fallbacks.
ZIP_AVX512_INLINE uint64_t escaped(__m512i fields) {
  return _mm512_testn_epi8_mask(fields, _mm512_set1_epi8(7));
}

// 64 weights as BF16 words, interleaved within 128-bit lanes: words 0..7, 16..23, .. to a, 8..15, 24..31, .. to b.
ZIP_AVX512_INLINE void decode_group(const uint8_t* low, const uint8_t* codes, const uint8_t*& fallbacks,
                                    const Constants& k, __m512i& a, __m512i& b) {
  const __m512i sign = _mm512_set1_epi8(-128), fields = fields_of(codes, k), byte = _mm512_loadu_si512(low);
  const uint64_t mask = escaped(fields);
  const __m512i exponent = _mm512_mask_expand_epi8(_mm512_permutexvar_epi8(fields, k.table), mask,
                                                   _mm512_loadu_si512(fallbacks));
  fallbacks += _mm_popcnt_u64(mask);
  // Ternary 0xCA takes the second operand where the first has ones, else the third.
  const __m512i high = _mm512_ternarylogic_epi64(sign, byte, _mm512_srli_epi16(exponent, 1), 0xCA);
  const __m512i rest = _mm512_ternarylogic_epi64(sign, _mm512_slli_epi16(exponent, 7), byte, 0xCA);
  a = _mm512_unpacklo_epi8(rest, high), b = _mm512_unpackhi_epi8(rest, high);
}

// Fallbacks in `groups` whole groups from weight i, a multiple of 8, on.
ZIP_AVX512 inline int64_t count_fallbacks(const Matrix& m, int64_t i, int64_t groups) {
  const Constants k = Constants::of(m);
  int64_t found = 0;
  for (const uint8_t* codes = m.codes + i / 8 * 3; groups > 0; --groups, codes += 24)
    found += _mm_popcnt_u64(escaped(fields_of(codes, k)));
  return found;
}

// `groups` whole groups from weight i, a multiple of 8, on to `out` in order. Word: uint16_t for BF16, else uint32_t for
// the bits of floats.
template <class Word>
ZIP_AVX512 void decode(const Matrix& m, int64_t i, int64_t groups, const uint8_t*& place, Word* out) {
  const Constants k = Constants::of(m);
  const __m512i first = _mm512_load_si512(indices().first), second = _mm512_load_si512(indices().second);
  const uint8_t *low = m.low + i, *codes = m.codes + i / 8 * 3, *fallbacks = place;
  for (; groups > 0; --groups, low += kGroup, codes += 24, out += kGroup) {
    _mm_prefetch(reinterpret_cast<const char*>(low + kLowAhead), _MM_HINT_T1);
    _mm_prefetch(reinterpret_cast<const char*>(codes + kCodesAhead), _MM_HINT_T1);
    _mm_prefetch(reinterpret_cast<const char*>(fallbacks + kLowAhead / kFallbackShare), _MM_HINT_T1);
    __m512i a, b;
    decode_group(low, codes, fallbacks, k, a, b);
    const __m512i words[2] = {_mm512_permutex2var_epi64(a, first, b), _mm512_permutex2var_epi64(a, second, b)};
    ZIP_UNROLL for (int h = 0; h < 2; ++h) {
      if constexpr (sizeof(Word) == 2) {
        _mm512_storeu_si512(out + h * kLane, words[h]);
      } else {
        const __m256i halves[2] = {_mm512_castsi512_si256(words[h]), _mm512_extracti64x4_epi64(words[h], 1)};
        ZIP_UNROLL for (int q = 0; q < 2; ++q)
          _mm512_storeu_si512(out + h * kLane + q * 16, _mm512_slli_epi32(_mm512_cvtepu16_epi32(halves[q]), 16));
      }
    }
  }
  place = fallbacks;
}

// Columns of a group of 64 in the order in which decoded weights fall into four vectors of 16 floats: even and odd
// words of the two interleaved vectors, or of plain words.
inline int64_t fused_column(int64_t k) { return k % 16 / 4 * 16 + k / 32 * 8 + k % 4 * 2 + k / 16 % 2; }
inline int64_t word_column(int64_t k) { return k / 32 * 32 + k % 16 * 2 + k / 16 % 2; }

ZIP_AVX512_INLINE __m256 lower(__m512 v) { return _mm512_castps512_ps256(v); }
ZIP_AVX512_INLINE __m256 upper(__m512 v) {
  return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1));
}
ZIP_AVX512_INLINE __m128 halves(__m256 v) { return _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1)); }

// The tree of tree_sum over sums in fused_column order, or in word_column order.
template <bool kFused>
ZIP_AVX512_INLINE float reduce(const __m512 (&s)[4]) {
  __m128 four;
  if constexpr (kFused) {
    __m256 v[4];
    ZIP_UNROLL for (int k = 0; k < 4; ++k) v[k] = _mm256_add_ps(lower(s[k]), upper(s[k]));
    four = _mm_add_ps(halves(_mm256_add_ps(v[0], v[1])), halves(_mm256_add_ps(v[2], v[3])));
  } else {
    const __m512 pairs = _mm512_add_ps(_mm512_add_ps(s[0], s[2]), _mm512_add_ps(s[1], s[3]));
    four = halves(_mm256_add_ps(lower(pairs), upper(pairs)));
  }
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

// sums += the 64 weights in a and b (even and odd words of each) times T rows of x.
template <int T>
ZIP_AVX512_INLINE void accumulate(__m512i a, __m512i b, const float* const (&x)[T], int64_t c, __m512 (&sums)[T][4]) {
  const __m512i odd = _mm512_set1_epi32(int(0xFFFF0000));
  const __m512 w[4] = {_mm512_castsi512_ps(_mm512_slli_epi32(a, 16)), _mm512_castsi512_ps(_mm512_and_si512(a, odd)),
                       _mm512_castsi512_ps(_mm512_slli_epi32(b, 16)), _mm512_castsi512_ps(_mm512_and_si512(b, odd))};
  ZIP_UNROLL for (int k = 0; k < 4 * T; ++k)
    sums[k / 4][k % 4] = _mm512_fmadd_ps(w[k % 4], _mm512_load_ps(x[k / 4] + c + 16 * (k % 4)), sums[k / 4][k % 4]);
}

// R packed rows from `row` on (of whole groups) times T rows of x in fused_column order. places[r]: where row r's
// fallbacks begin; the last one moves on to the next row's.
template <int R, int T>
ZIP_AVX512 void dot_fused(const Matrix& m, int64_t row, const uint8_t* (&places)[R], const Rows& rows) {
  const Constants k = Constants::of(m);
  const uint8_t *low = m.low + row * m.columns, *codes = m.codes + row * m.columns / 8 * 3, *fallbacks[R];
  const int64_t columns = m.columns;
  const float* x[T];
  __m512 sums[R][T][4];
  ZIP_UNROLL for (int r = 0; r < R; ++r) fallbacks[r] = places[r];
  ZIP_UNROLL for (int t = 0; t < T; ++t) x[t] = rows.x[t];
  ZIP_UNROLL for (int s = 0; s < R * 4 * T; ++s) sums[s / (4 * T)][s / 4 % T][s % 4] = _mm512_setzero_ps();
  for (int64_t line = 0; line < R * columns / kFallbackShare; line += 64)
    _mm_prefetch(reinterpret_cast<const char*>(fallbacks[0] + R * columns / kFallbackShare + line), _MM_HINT_T0);
  for (int64_t c = 0; c < columns; c += kGroup, low += kGroup, codes += 24)
    ZIP_UNROLL for (int r = 0; r < R; ++r) {
      const uint8_t *l = low + r * columns, *q = codes + r * columns / 8 * 3;
      _mm_prefetch(reinterpret_cast<const char*>(l + kLowAhead), _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(q + kCodesAhead), _MM_HINT_T0);
      __m512i a, b;
      decode_group(l, q, fallbacks[r], k, a, b);
      accumulate<T>(a, b, x, c, sums[r]);
    }
  places[R - 1] = fallbacks[R - 1];
  ZIP_UNROLL for (int r = 0; r < R; ++r)
    ZIP_UNROLL for (int t = 0; t < T; ++t) rows.y[t][row + r - rows.first] = reduce<true>(sums[r][t]);
}

// A part of R rows of plain words (whole rows if R > 1) times T rows of x in word_column order.
template <int R, int T>
ZIP_AVX512 void dot_words(const Part& part, const Rows& rows) {
  const float* x[T];
  __m512 sums[R][T][4];
  ZIP_UNROLL for (int t = 0; t < T; ++t) x[t] = rows.x[t];
  const bool first = part.is_first();
  ZIP_UNROLL for (int s = 0; s < R * 4 * T; ++s)
    sums[s / (4 * T)][s / 4 % T][s % 4] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(part.sums + 16 * s);
  const uint16_t* words = part.words;
  const int64_t columns = part.columns, end = part.end;
  int64_t c = part.begin;
  for (; c + kSums <= end; c += kSums, words += kSums)
    ZIP_UNROLL for (int r = 0; r < R; ++r) {
      const uint16_t* w = words + r * columns;
      _mm_prefetch(reinterpret_cast<const char*>(w) + kWordsAhead, _MM_HINT_T1);
      _mm_prefetch(reinterpret_cast<const char*>(w) + kWordsAhead + 64, _MM_HINT_T1);
      accumulate<T>(_mm512_loadu_si512(w), _mm512_loadu_si512(w + kLane), x, c, sums[r]);
    }
  if (c < end) {
    const uint64_t inside = (1ull << (end - c)) - 1;
    ZIP_UNROLL for (int r = 0; r < R; ++r) {
      const uint16_t* w = words + r * columns;
      accumulate<T>(_mm512_maskz_loadu_epi16(__mmask32(inside), w),
                    _mm512_maskz_loadu_epi16(__mmask32(inside >> kLane), w + kLane), x, c, sums[r]);
    }
  }
  if (part.is_last()) {
    ZIP_UNROLL for (int r = 0; r < R; ++r)
      ZIP_UNROLL for (int t = 0; t < T; ++t) rows.y[t][part.row + r - rows.first] = reduce<false>(sums[r][t]);
  } else {
    ZIP_UNROLL for (int s = 0; s < 4 * T; ++s) _mm512_storeu_ps(part.sums + 16 * s, sums[0][s / 4][s % 4]);
  }
}

// Sum of 64-bit words of `count` blocks of four lines.
ZIP_AVX512 inline uint64_t read_lines(const uint8_t* data, int64_t count) {
  __m512i sums[4] = {};
  for (; count > 0; --count, data += 256)
    ZIP_UNROLL for (int k = 0; k < 4; ++k) {
      _mm_prefetch(reinterpret_cast<const char*>(data + 1024 + 64 * k), _MM_HINT_T1);
      sums[k] = _mm512_add_epi64(sums[k], _mm512_loadu_si512(data + 64 * k));
    }
  const __m512i all = _mm512_add_epi64(_mm512_add_epi64(sums[0], sums[1]), _mm512_add_epi64(sums[2], sums[3]));
  return uint64_t(_mm512_reduce_add_epi64(all));
}

}  // namespace zip::avx512
#endif  // ZIP_X86
