// AVX2 + FMA code, compiled for that target whatever the build's flags are and chosen at run time.
#pragma once
#include "layout.h"

#ifdef ZIP_X86
#define ZIP_AVX2 __attribute__((target("avx2,fma,bmi,popcnt")))

namespace zip::avx2 {

ZIP_AVX2 inline __m256i load(const void* place) { return _mm256_loadu_si256(static_cast<const __m256i*>(place)); }

// 32 bytes whose low three bits are the codes of 32 weights in order, from 12 code bytes (16 are read); bit 3 of the
// even ones is a bit of their neighbour.
ZIP_AVX2 inline __m256i fields_of(const uint8_t* codes) {
  // Each 16-bit lane gets the two bytes that hold its 6-bit pair of codes; a multiply moves the pair to bits 10..15.
  const __m256i pick = _mm256_setr_epi8(0, 1, 0, 1, 1, 2, 2, 3, 3, 4, 3, 4, 4, 5, 5, 6,
                                        6, 7, 6, 7, 7, 8, 8, 9, 9, 10, 9, 10, 10, 11, 11, 12);
  const __m256i align = _mm256_set1_epi64x(0x0100004000100400);
  const __m256i raw = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
  const __m256i pair = _mm256_mullo_epi16(_mm256_shuffle_epi8(raw, pick), align);
  const __m256i second = _mm256_and_si256(_mm256_srli_epi16(pair, 5), _mm256_set1_epi16(0x0700));
  return _mm256_or_si256(_mm256_srli_epi16(pair, 10), second);
}

// Which of 32 weights are fallbacks.
ZIP_AVX2 inline uint32_t escaped(__m256i fields) {
  const __m256i code = _mm256_and_si256(fields, _mm256_set1_epi8(7));
  return uint32_t(_mm256_movemask_epi8(_mm256_cmpeq_epi8(code, _mm256_setzero_si256())));
}

// Fallbacks in `groups` whole groups from weight i, a multiple of 8, on.
ZIP_AVX2 inline int64_t count_fallbacks(const Matrix& m, int64_t i, int64_t groups) {
  int64_t found = 0;
  for (const uint8_t* codes = m.codes + i / 8 * 3; groups > 0; --groups, codes += 24)
    found += __builtin_popcount(escaped(fields_of(codes))) + __builtin_popcount(escaped(fields_of(codes + 12)));
  return found;
}

// Exponents of `groups` groups (at most kChunk weights) from weight i on to `exponents`, fallbacks too.
ZIP_AVX2 inline void decode_exponents(const Matrix& m, int64_t i, int64_t groups, const uint8_t*& place,
                                      uint8_t* exponents) {
  uint64_t masks[kChunk / kGroup];
  int64_t eight;
  std::memcpy(&eight, m.table, 8);
  const __m256i table = _mm256_set1_epi64x(eight);  // repeated: bit 3 of a field does not matter
  const uint8_t* codes = m.codes + i / 8 * 3;
  for (int64_t g = 0; g < groups; ++g, codes += 24) {
    _mm_prefetch(reinterpret_cast<const char*>(codes + kCodesAhead), _MM_HINT_T1);
    const __m256i a = fields_of(codes), b = fields_of(codes + 12);
    __m256i* target = reinterpret_cast<__m256i*>(exponents + g * kGroup);
    _mm256_storeu_si256(target, _mm256_shuffle_epi8(table, a));
    _mm256_storeu_si256(target + 1, _mm256_shuffle_epi8(table, b));
    masks[g] = escaped(a) | uint64_t(escaped(b)) << 32;
  }
  // Fallbacks are written only now: bytes written one by one are slow to read as vectors right afterwards.
  const uint8_t* fallbacks = place;
  uint8_t nowhere;
  for (int64_t g = 0; g < groups; ++g) {
    uint8_t* group = exponents + g * kGroup;
    uint64_t mask = masks[g];
    const uint8_t* next = fallbacks + __builtin_popcountll(mask);
    for (int k = 0; k < 4; ++k) {  // the usual count is 0 to 4: writes without a branch, some to `nowhere`
      uint8_t* target = mask ? group + __builtin_ctzll(mask | 1ull << 63) : &nowhere;
      *target = fallbacks[k];
      mask &= mask - 1;
    }
    for (int k = 4; mask; mask &= mask - 1) group[__builtin_ctzll(mask)] = fallbacks[k++];
    fallbacks = next;
  }
  place = fallbacks;
}

// `groups` whole groups (at most kChunk weights) from weight i, a multiple of 8, on to `out` in order. Word: uint16_t
// for BF16, else uint32_t for the bits of floats.
template <class Word>
ZIP_AVX2 void decode(const Matrix& m, int64_t i, int64_t groups, const uint8_t*& place, Word* out) {
  alignas(64) uint8_t exponents[kChunk];
  decode_exponents(m, i, groups, place, exponents);
  const __m256i sign = _mm256_set1_epi8(-128), zero = _mm256_setzero_si256();
  const uint8_t* low = m.low + i;
  for (int64_t k = 0; k < groups * kGroup; k += 32) {
    _mm_prefetch(reinterpret_cast<const char*>(low + k + kLowAhead), _MM_HINT_T1);
    const __m256i byte = load(low + k), exponent = load(exponents + k);
    const __m256i top = _mm256_or_si256(_mm256_and_si256(sign, byte),
                                        _mm256_andnot_si256(sign, _mm256_srli_epi16(exponent, 1)));
    const __m256i rest = _mm256_or_si256(_mm256_andnot_si256(sign, byte),
                                         _mm256_and_si256(sign, _mm256_slli_epi16(exponent, 7)));
    const __m256i a = _mm256_unpacklo_epi8(rest, top), b = _mm256_unpackhi_epi8(rest, top);
    const __m256i words[2] = {_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31)};
    __m256i* target = reinterpret_cast<__m256i*>(out + k);
    ZIP_UNROLL for (int h = 0; h < 2; ++h) {
      if constexpr (sizeof(Word) == 2) {
        _mm256_storeu_si256(target + h, words[h]);
      } else {
        const __m256i low4 = _mm256_unpacklo_epi16(zero, words[h]), high4 = _mm256_unpackhi_epi16(zero, words[h]);
        _mm256_storeu_si256(target + 2 * h, _mm256_permute2x128_si256(low4, high4, 0x20));
        _mm256_storeu_si256(target + 2 * h + 1, _mm256_permute2x128_si256(low4, high4, 0x31));
      }
    }
  }
}

// Columns of a group of 64 in the order in which words fall into eight vectors of 8 floats: even and odd ones of 16.
inline int64_t word_column(int64_t k) { return k / 16 * 16 + k % 8 * 2 + k / 8 % 2; }

// The tree of tree_sum over 64 sums in word_column order.
ZIP_AVX2 inline float reduce(const float* sums) {
  __m256 s[4];
  ZIP_UNROLL for (int k = 0; k < 4; ++k)
    s[k] = _mm256_add_ps(_mm256_loadu_ps(sums + 8 * k), _mm256_loadu_ps(sums + kLane + 8 * k));
  const __m256 pairs = _mm256_add_ps(_mm256_add_ps(s[0], s[1]), _mm256_add_ps(s[2], s[3]));
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

// Words i..i+31 to floats: even and odd ones of the first 16, then of the others; +0 from the `rest`-th on.
ZIP_AVX2 inline void widen_32(const uint16_t* words, int64_t rest, __m256 (&w)[4]) {
  uint16_t tail[kLane] = {};
  if (rest < kLane) {
    std::memcpy(tail, words, size_t(rest) * 2);
    words = tail;
  }
  const __m256i upper = _mm256_set1_epi32(int(0xFFFF0000)), a = load(words), b = load(words + 16);
  w[0] = _mm256_castsi256_ps(_mm256_slli_epi32(a, 16)), w[1] = _mm256_castsi256_ps(_mm256_and_si256(a, upper));
  w[2] = _mm256_castsi256_ps(_mm256_slli_epi32(b, 16)), w[3] = _mm256_castsi256_ps(_mm256_and_si256(b, upper));
}

// Words of every other group of 32 from column `begin` on, times T rows of x; kBoth: the groups between them too. The
// registers hold T * 4 sums a half, so two rows of x take the halves one after the other.
template <int T, bool kBoth>
ZIP_AVX2 inline void accumulate(const Part& part, int64_t begin, const float* const (&x)[T], float* kept) {
  constexpr int kHalves = kBoth ? 2 : 1, kVectors = 4 * kHalves;
  __m256 sums[T][kVectors], w[4];
  ZIP_UNROLL for (int k = 0; k < T * kVectors; ++k)
    sums[k / kVectors][k % kVectors] = part.is_first()
        ? _mm256_setzero_ps() : _mm256_loadu_ps(kept + k / kVectors * kSums + 8 * (k % kVectors));
  for (int64_t c = begin; c < part.end; c += kSums)
    ZIP_UNROLL for (int half = 0; half < kHalves; ++half) {
      const int64_t at = c + half * kLane;
      if (half > 0 && at >= part.end) break;
      const uint16_t* words = part.words + (at - part.begin);
      _mm_prefetch(reinterpret_cast<const char*>(words) + kWordsAhead, _MM_HINT_T1);
      widen_32(words, part.end - at, w);
      ZIP_UNROLL for (int k = 0; k < 4 * T; ++k) {
        __m256& sum = sums[k / 4][4 * half + k % 4];
        sum = _mm256_fmadd_ps(w[k % 4], _mm256_load_ps(x[k / 4] + at + 8 * (k % 4)), sum);
      }
    }
  ZIP_UNROLL for (int k = 0; k < T * kVectors; ++k)
    _mm256_storeu_ps(kept + k / kVectors * kSums + 8 * (k % kVectors), sums[k / kVectors][k % kVectors]);
}

// A part of a row times T rows of x (1 or 2) in word_column order.
template <int T>
ZIP_AVX2 void dot_words(const Part& part, const Rows& rows) {
  const float* x[T];
  ZIP_UNROLL for (int t = 0; t < T; ++t) x[t] = rows.x[t];
  if constexpr (T == 1) {
    accumulate<1, true>(part, part.begin, x, part.sums);
  } else {
    accumulate<T, false>(part, part.begin, x, part.sums);
    accumulate<T, false>(part, part.begin + kLane, x, part.sums + kLane);
  }
  if (part.is_last())
    for (int t = 0; t < T; ++t) rows.y[t][part.row - rows.first] = reduce(part.sums + t * kSums);
}

}  // namespace zip::avx2
#endif  // ZIP_X86
