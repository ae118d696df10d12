// AVX-512 (F, BW, VL, VBMI) code: the same results as avx2.h, bit for bit, with half the instructions.
#pragma once
#include "layout.h"

#ifdef ZIP_X86
#define ZIP_AVX512 __attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512vbmi")))

namespace zip::avx512 {

constexpr int64_t kGroup = 64;  // weights decoded at once
constexpr int64_t kSlack = 0;   // code bytes read beyond the last group (the load is masked)
constexpr int kTile = 4;        // rows of x that share decoded weights in registers

// Byte tables of the shuffles below, filled once.
struct Indices {
  alignas(64) uint8_t spread[64];  // the three code bytes of each 8 weights to the start of a 64-bit lane
  alignas(64) uint8_t fields[64];  // bit offsets 0, 3, .. 21 within each 64-bit lane
  alignas(64) uint8_t words[64];   // low byte, high byte, ... of 32 weights held as 32 low and 32 high bytes
  alignas(64) uint8_t even[64];    // the same as the upper halves of 16 floats: weights 0, 2, .. 30
  alignas(64) uint8_t odd[64];     // weights 1, 3, .. 31
  alignas(64) uint8_t first[64];   // weights 0..15
  alignas(64) uint8_t second[64];  // weights 16..31

  Indices() {
    for (int k = 0; k < 64; ++k) {
      spread[k] = uint8_t(k % 8 < 3 ? 3 * (k / 8) + k % 8 : 63);
      fields[k] = uint8_t(3 * (k % 8));
      words[k] = uint8_t(k / 2 + 32 * (k % 2));
      const int lane = k / 4, high = k % 4 == 3 ? 32 : 0;
      even[k] = uint8_t(2 * lane + high);
      odd[k] = uint8_t(2 * lane + 1 + high);
      first[k] = uint8_t(lane + high);
      second[k] = uint8_t(16 + lane + high);
    }
  }
};

inline const Indices& indices() {
  static const Indices all;
  return all;
}

constexpr uint64_t kUpperHalves = 0xCCCCCCCCCCCCCCCCull;  // bytes 2 and 3 of every float

ZIP_AVX512 inline __m512i load_table(const uint8_t* table) {
  int64_t eight;
  std::memcpy(&eight, table, 8);
  return _mm512_set1_epi64(eight);
}

// High bytes of 64 weights in order. The look-up uses 6 bits of each field: the table is repeated 8 times.
ZIP_AVX512 inline __m512i high_bytes(const uint8_t* codes, __m512i table, __m512i spread, __m512i fields) {
  const __m512i raw = _mm512_zextsi256_si512(_mm256_maskz_loadu_epi8(0xFFFFFFu, codes));
  return _mm512_permutexvar_epi8(_mm512_multishift_epi64_epi8(fields, _mm512_permutexvar_epi8(spread, raw)), table);
}

// 32 low bytes below 32 high bytes.
ZIP_AVX512 inline __m512i join(__m256i low, __m256i high) {
  return _mm512_inserti64x4(_mm512_zextsi256_si512(low), high, 1);
}

ZIP_AVX512 inline __m256i load(const void* place) { return _mm256_loadu_si256(static_cast<const __m256i*>(place)); }

ZIP_AVX512 inline void decode_bf16(const Matrix& m, int64_t begin, int64_t end, uint16_t* out) {
  const __m512i table = load_table(m.table), spread = _mm512_load_si512(indices().spread);
  const __m512i fields = _mm512_load_si512(indices().fields), words = _mm512_load_si512(indices().words);
  for (int64_t i = begin; i < end; i += kGroup) {
    const __m512i high = high_bytes(m.codes + 3 * (i / 8), table, spread, fields);
    const __m512i a = join(load(m.low + i), _mm512_castsi512_si256(high));
    const __m512i b = join(load(m.low + i + 32), _mm512_extracti64x4_epi64(high, 1));
    _mm512_storeu_si512(out + (i - begin), _mm512_permutexvar_epi8(words, a));
    _mm512_storeu_si512(out + (i - begin) + 32, _mm512_permutexvar_epi8(words, b));
  }
}

ZIP_AVX512 inline void decode_fp32(const Matrix& m, int64_t begin, int64_t end, uint32_t* out) {
  const __m512i table = load_table(m.table), spread = _mm512_load_si512(indices().spread);
  const __m512i fields = _mm512_load_si512(indices().fields);
  const __m512i first = _mm512_load_si512(indices().first), second = _mm512_load_si512(indices().second);
  for (int64_t i = begin; i < end; i += kGroup) {
    const __m512i high = high_bytes(m.codes + 3 * (i / 8), table, spread, fields);
    const __m512i a = join(load(m.low + i), _mm512_castsi512_si256(high));
    const __m512i b = join(load(m.low + i + 32), _mm512_extracti64x4_epi64(high, 1));
    uint32_t* place = out + (i - begin);
    _mm512_storeu_si512(place, _mm512_maskz_permutexvar_epi8(kUpperHalves, first, a));
    _mm512_storeu_si512(place + 16, _mm512_maskz_permutexvar_epi8(kUpperHalves, second, a));
    _mm512_storeu_si512(place + 32, _mm512_maskz_permutexvar_epi8(kUpperHalves, first, b));
    _mm512_storeu_si512(place + 48, _mm512_maskz_permutexvar_epi8(kUpperHalves, second, b));
  }
}

ZIP_AVX512 inline void decode_high(const Matrix& m, int64_t begin, int64_t end, uint8_t* out) {
  const __m512i table = load_table(m.table), spread = _mm512_load_si512(indices().spread);
  const __m512i fields = _mm512_load_si512(indices().fields);
  for (int64_t i = begin; i < end; i += kGroup) {
    const uint8_t* codes = m.codes + 3 * (i / 8);
    _mm_prefetch(reinterpret_cast<const char*>(codes + kCodesAhead), _MM_HINT_T1);
    _mm512_storeu_si512(out + (i - begin), high_bytes(codes, table, spread, fields));
  }
}

// Columns of a group of 32 in the order of two vectors of 16 floats: even columns, then odd ones.
inline int64_t column(int64_t k) { return k % 16 * 2 + k / 16; }

// The tree of tree_sum over sums whose halves are in `column` order.
ZIP_AVX512 inline float reduce(const __m512 (&s)[4]) {
  const __m512 pairs = _mm512_add_ps(_mm512_add_ps(s[0], s[2]), _mm512_add_ps(s[1], s[3]));
  const __m256 upper = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(pairs), 1));
  const __m256 a = _mm256_add_ps(_mm512_castps512_ps256(pairs), upper);
  __m128 c = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  c = _mm_add_ps(c, _mm_movehl_ps(c, c));
  return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}

// Rows of weights as two byte streams or as BF16 words; load32 gives weights i..i+31: all of them when kWhole, else +0
// for those not `inside`.
struct Streams {
  const uint8_t *low, *high;  // high[0] belongs to low[origin]
  int64_t origin;
  struct Constants {
    __m512i even, odd;
  };

  ZIP_AVX512 static Constants constants() {
    return {_mm512_load_si512(indices().even), _mm512_load_si512(indices().odd)};
  }
  template <bool kWhole>
  ZIP_AVX512 void load32(int64_t i, __mmask32 inside, const Constants& k, __m512 (&w)[2]) const {
    const uint8_t *l = low + i, *h = high + (i - origin);
    _mm_prefetch(reinterpret_cast<const char*>(l + kLowAhead), _MM_HINT_T1);
    const __m512i both = kWhole ? join(load(l), load(h))
                                : join(_mm256_maskz_loadu_epi8(inside, l), _mm256_maskz_loadu_epi8(inside, h));
    w[0] = _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi8(kUpperHalves, k.even, both));
    w[1] = _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi8(kUpperHalves, k.odd, both));
  }
};

struct Words {
  const uint16_t* words;
  struct Constants {
    __m512i upper;
  };

  ZIP_AVX512 static Constants constants() { return {_mm512_set1_epi32(int(0xFFFF0000))}; }
  template <bool kWhole>
  ZIP_AVX512 void load32(int64_t i, __mmask32 inside, const Constants& k, __m512 (&w)[2]) const {
    _mm_prefetch(reinterpret_cast<const char*>(words + i) + kWordsAhead, _MM_HINT_T1);
    const __m512i all = kWhole ? _mm512_loadu_si512(words + i) : _mm512_maskz_loadu_epi16(inside, words + i);
    w[0] = _mm512_castsi512_ps(_mm512_slli_epi32(all, 16));
    w[1] = _mm512_castsi512_ps(_mm512_and_si512(all, k.upper));
  }
};

// sums += the 64 weights from i on times T rows of x.
template <bool kWhole, int T, class Weights>
ZIP_AVX512 inline void accumulate(const Weights& weights, const typename Weights::Constants& constants, int64_t i,
                                  uint64_t inside, const float* x, int64_t stride, __m512 (&sums)[T][4]) {
  __m512 w[2];
  ZIP_UNROLL for (int half = 0; half < 2; ++half) {
    weights.template load32<kWhole>(i + half * kLane, __mmask32(inside >> (half * kLane)), constants, w);
    ZIP_UNROLL for (int k = 0; k < 2 * T; ++k) {
      __m512& sum = sums[k / 2][2 * half + k % 2];
      sum = _mm512_fmadd_ps(w[k % 2], _mm512_load_ps(x + k / 2 * stride + half * kLane + 16 * (k % 2)), sum);
    }
  }
}

// The part times rows t..t+T-1 of x, which is in `column` order, aligned and padded to whole groups.
template <int T, class Weights>
ZIP_AVX512 void dot(const Weights& weights, const Product& p, const Part& part, int64_t t) {
  const auto constants = Weights::constants();
  const int64_t begin = part.begin, end = part.end, columns = part.columns, rows = part.rows;
  const int64_t stride = p.stride, ldy = p.ldy;
  const bool first = part.is_first(), last = part.is_last();
  const float* x = p.x + t * stride;
  float *kept = part.sums + t * kSums, *y = part.y + t * ldy;
  for (int64_t r = 0; r < rows; ++r) {
    __m512 sums[T][4];
    ZIP_UNROLL for (int k = 0; k < 4 * T; ++k)
      sums[k / 4][k % 4] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(kept + k / 4 * kSums + 16 * (k % 4));
    int64_t c = begin;
    for (; c + kSums <= end; c += kSums)
      accumulate<true, T>(weights, constants, r * columns + c, ~0ull, x + c, stride, sums);
    if (c < end)
      accumulate<false, T>(weights, constants, r * columns + c, (1ull << (end - c)) - 1, x + c, stride, sums);
    if (last) {
      ZIP_UNROLL for (int k = 0; k < T; ++k) y[k * ldy + r] = reduce(sums[k]);
    } else {
      ZIP_UNROLL for (int k = 0; k < 4 * T; ++k)
        _mm512_storeu_ps(kept + k / 4 * kSums + 16 * (k % 4), sums[k / 4][k % 4]);
    }
  }
}

}  // namespace zip::avx512
#endif  // ZIP_X86
