// Decode and fused decode + GEMV of the CPU run-time layout (reference.py defines it), called through ctypes.
//
// Plain C ABI, no dependency but the C++17 standard library. One binary serves every x86-64 (AVX-512 or AVX2 code is
// chosen at run time) and, by the portable loops, any other little-endian processor. A product decodes the high bytes
// of a few rows into L1, writes the fallbacks over them, then joins both byte streams in registers.
// Every function returns 0, or -1 when an argument or a fallback list is out of range.

#include <thread>
#include <vector>

#include "avx2.h"
#include "avx512.h"
#include "layout.h"

namespace zip {
namespace {

// Below this many weights per thread a thread costs more than it saves.
constexpr int64_t kWeightsPerThread = 1 << 19;
constexpr int64_t kShortRow = 1024;  // columns

// Decodes the flat range [begin, end): whole groups by `simd(level, from, to)`, the rest by `scalar(i)`.
template <class Simd, class Scalar>
void decode_range(const Matrix& m, Level level, int64_t begin, int64_t end, Simd simd, Scalar scalar) {
  int64_t i = begin;
#ifdef ZIP_X86
  if (level != kPortable) {
    const int64_t group = level == kAvx512 ? avx512::kGroup : avx2::kGroup;
    const int64_t slack = level == kAvx512 ? avx512::kSlack : avx2::kSlack;
    for (const int64_t aligned = std::min(end, (begin + 7) / 8 * 8); i < aligned; ++i) scalar(i);
    const int64_t readable = std::min(end, (m.code_bytes() - slack) / 3 * 8);
    const int64_t groups = (readable - i) / group;
    if (groups > 0) {
      simd(i, i + groups * group);
      i += groups * group;
    }
  }
#endif
  for (; i < end; ++i) scalar(i);
}

// Weights first..last to `out`: BF16 words (kBytes 2) or float32 (kBytes 4). False when the lists are damaged.
template <int kBytes>
bool decode(const Matrix& m, int64_t first, int64_t last, uint8_t* out) {
  using Word = std::conditional_t<kBytes == 2, uint16_t, uint32_t>;
  const Level level = supported_level(m.level);
  for (int64_t begin = first; begin < last;) {  // a segment at a time, so that fallbacks meet decoded lines in L1
    const int64_t end = std::min(last, (begin / kSegment + 1) * kSegment);
    Word* place = reinterpret_cast<Word*>(out) + (begin - first);
    const auto simd = [&]([[maybe_unused]] int64_t from, [[maybe_unused]] int64_t to) {
#ifdef ZIP_X86
      Word* target = place + (from - begin);
      if constexpr (kBytes == 2) {
        if (level == kAvx512) avx512::decode_bf16(m, from, to, target);
        else avx2::decode_bf16(m, from, to, target);
      } else {
        if (level == kAvx512) avx512::decode_fp32(m, from, to, target);
        else avx2::decode_fp32(m, from, to, target);
      }
#endif
    };
    const auto scalar = [&](int64_t i) {
      place[i - begin] = Word(Word(m.low[i] | m.high_at(i) << 8) << (kBytes == 4 ? 16 : 0));
    };
    decode_range(m, level, begin, end, simd, scalar);
    if (!patch_fallbacks<kBytes>(m, begin, end, reinterpret_cast<uint8_t*>(place))) return false;
    begin = end;
  }
  return true;
}

bool decode_any(const Matrix& m, int64_t first, int64_t last, uint8_t* out, int is_float) {
  return is_float ? decode<4>(m, first, last, out) : decode<2>(m, first, last, out);
}

template <int N>
using Int = std::integral_constant<int, N>;

// Calls tile(Int<R>, Int<T>, row, t) for tiles of R rows and T rows of x (T at most kTile) that cover rows and p.m. Two
// rows at once share loads of x and hide the latency of the FMA. kPairs: registers suffice for pairs with T > 1. A single
// row of x takes pairs of short rows only: long ones are bound by memory, which serves one stream better than two.
template <int kTile, bool kPairs, class Tile>
void for_tiles(int64_t rows, int64_t columns, int64_t m, Tile tile) {
  int64_t t = 0;
  const auto rows_of = [&](bool pairs, auto width) {
    int64_t r = 0;
    if constexpr (kPairs || width() == 1)
      for (; pairs && r + 2 <= rows; r += 2) tile(Int<2>{}, width, r, t);
    for (; r < rows; ++r) tile(Int<1>{}, width, r, t);
    t += width();
  };
  while (t + kTile <= m) rows_of(true, Int<kTile>{});
  if constexpr (kTile > 2)
    if (t + 2 <= m) rows_of(true, Int<2>{});
  if (t < m) rows_of(columns <= kShortRow, Int<1>{});
}

// `rows` adjacent rows of weights as two byte streams, times all rows of x; y: the first row's place in y.
void dot_streams(Level level, const uint8_t* low, const uint8_t* high, int64_t rows, int64_t columns, const Product& p,
                 float* y) {
#ifdef ZIP_X86
  if (level == kAvx512)
    return for_tiles<avx512::kTile, true>(rows, columns, p.m, [&](auto tall, auto wide, int64_t r, int64_t t) {
      const avx512::Streams w{low + r * columns, high + r * columns};
      avx512::dot<tall(), wide()>(w, p.x + t * p.stride, p.stride, columns, y + t * p.ldy + r, p.ldy);
    });
  if (level == kAvx2)
    return for_tiles<avx2::kTile, false>(rows, columns, p.m, [&](auto tall, auto wide, int64_t r, int64_t t) {
      const avx2::Streams w{low + r * columns, high + r * columns};
      avx2::dot<tall(), wide()>(w, p.x + t * p.stride, p.stride, columns, y + t * p.ldy + r, p.ldy);
    });
#endif
  (void)level;
  for (int64_t r = 0; r < rows; ++r) {
    const uint8_t *l = low + r * columns, *h = high + r * columns;
    dot_portable([&](int64_t c) { return widen(uint16_t(l[c] | h[c] << 8)); }, p, columns, y + r);
  }
}

// The same for plain BF16 words.
void dot_words(Level level, const uint16_t* words, int64_t rows, int64_t columns, const Product& p, float* y) {
#ifdef ZIP_X86
  if (level == kAvx512)
    return for_tiles<avx512::kTile, true>(rows, columns, p.m, [&](auto tall, auto wide, int64_t r, int64_t t) {
      const avx512::Words w{words + r * columns};
      avx512::dot<tall(), wide()>(w, p.x + t * p.stride, p.stride, columns, y + t * p.ldy + r, p.ldy);
    });
  if (level == kAvx2)
    return for_tiles<avx2::kTile, false>(rows, columns, p.m, [&](auto tall, auto wide, int64_t r, int64_t t) {
      const avx2::Words w{words + r * columns};
      avx2::dot<tall(), wide()>(w, p.x + t * p.stride, p.stride, columns, y + t * p.ldy + r, p.ldy);
    });
#endif
  (void)level;
  for (int64_t r = 0; r < rows; ++r)
    dot_portable([&](int64_t c) { return widen(words[r * columns + c]); }, p, columns, y + r);
}

// Rows begin..end of w times p.x into y, whose first column is row y_row. False when the lists are damaged.
bool multiply_rows(const Matrix& w, const Product& p, int64_t begin, int64_t end, int64_t y_row) {
  const Level level = supported_level(w.level);
  const int64_t columns = w.columns, step = std::max<int64_t>(2, kSegment / columns / 2 * 2);
  std::vector<uint8_t> scratch(size_t(step * columns));
  uint8_t* high = scratch.data();
  for (int64_t row = begin; row < end; row += step) {
    const int64_t stop = std::min(end, row + step), first = row * columns, last = stop * columns;
    const auto simd = [&]([[maybe_unused]] int64_t from, [[maybe_unused]] int64_t to) {
#ifdef ZIP_X86
      if (level == kAvx512) avx512::decode_high(w, from, to, high + (from - first));
      else avx2::decode_high(w, from, to, high + (from - first));
#endif
    };
    decode_range(w, level, first, last, simd, [&](int64_t i) { high[i - first] = w.high_at(i); });
    if (!patch_fallbacks<1>(w, first, last, high)) return false;
#ifdef ZIP_X86
    const int64_t met = w.offsets[last / kBlock];
    for (int64_t ahead = 0; ahead < 256; ahead += 64) {
      _mm_prefetch(reinterpret_cast<const char*>(w.positions + met + ahead), _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(w.highs + met + ahead), _MM_HINT_T0);
    }
#endif
    dot_streams(level, w.low + first, high, stop - row, columns, p, p.y + (row - y_row));
  }
  return true;
}

// Splits [0, count) over threads; work(begin, end) returns false on damaged input. The caller's thread takes the last
// part, and what is left when a thread cannot be started.
template <class Work>
bool parallel(int64_t count, int64_t weights, int threads, Work work) {
  const int64_t parts = std::min<int64_t>({int64_t(threads), count, weights / kWeightsPerThread});
  if (parts <= 1) return work(int64_t(0), count);
  std::vector<char> good(size_t(parts), 1);
  std::vector<std::thread> pool;
  int64_t begin = 0;
  for (int64_t part = 0; part + 1 < parts; ++part) {
    const int64_t end = count * (part + 1) / parts;
    try {
      pool.emplace_back([&work, &good, part, begin, end] { good[size_t(part)] = work(begin, end); });
    } catch (...) {
      break;
    }
    begin = end;
  }
  good[size_t(parts - 1)] = work(begin, count);
  for (auto& thread : pool) thread.join();
  return std::all_of(good.begin(), good.end(), [](char ok) { return ok != 0; });
}

// x permuted for the vector code, padded with zeros to whole groups and aligned; p points at it afterwards.
std::vector<float> prepare_x(Product& p, Level level, int64_t columns, [[maybe_unused]] bool streams) {
  std::vector<float> ready;
#ifdef ZIP_X86
  if (level != kPortable) {
    const int64_t padded = (columns + kLane - 1) / kLane * kLane;
    int64_t order[kLane];
    for (int64_t k = 0; k < kLane; ++k)
      order[k] = level == kAvx512 ? avx512::column(k) : streams ? avx2::stream_column(k) : avx2::word_column(k);
    ready.resize(size_t(p.m * padded + 16));
    float* start = ready.data() + (64 - reinterpret_cast<uintptr_t>(ready.data()) % 64) % 64 / sizeof(float);
    for (int64_t t = 0; t < p.m; ++t)
      for (int64_t base = 0; base < columns; base += kLane)
        for (int64_t k = 0; k < kLane; ++k)
          if (base + order[k] < columns) start[t * padded + base + k] = p.x[t * columns + base + order[k]];
    p.x = start;
    p.stride = padded;
  }
#endif
  (void)level;
  return ready;
}

}  // namespace
}  // namespace zip

extern "C" {

int zip_abi() { return 2; }
int zip_level() { return zip::supported_level(zip::kAvx512); }

// Rows start..stop to out: [stop - start, columns] of BF16, or of float32 when is_float.
int zip_unpack(const zip::Matrix* m, int64_t start, int64_t stop, int is_float, int threads, uint8_t* out) {
  if (start < 0 || stop < start || stop > m->rows) return -1;
  const int64_t first = start * m->columns, count = (stop - start) * m->columns;
  const int64_t segments = (count + zip::kSegment - 1) / zip::kSegment;
  const bool good = zip::parallel(segments, count, threads, [&](int64_t begin, int64_t end) {
    const int64_t from = begin * zip::kSegment, to = std::min(count, end * zip::kSegment);
    return zip::decode_any(*m, first + from, first + to, out + from * (is_float ? 4 : 2), is_float);
  });
  return good ? 0 : -1;
}

// The named rows to out: [number, columns].
int zip_unpack_rows(const zip::Matrix* m, const int64_t* which, int64_t number, int is_float, int threads,
                    uint8_t* out) {
  const int64_t columns = m->columns, row_bytes = columns * (is_float ? 4 : 2);
  const bool good = zip::parallel(number, number * columns, threads, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      if (which[k] < 0 || which[k] >= m->rows) return false;
      if (!zip::decode_any(*m, which[k] * columns, (which[k] + 1) * columns, out + k * row_bytes, is_float)) return false;
    }
    return true;
  });
  return good ? 0 : -1;
}

// y [number, stop - start] = x [number, columns] times the transpose of rows start..stop.
int zip_matmul(const zip::Matrix* m, const float* x, int64_t number, int64_t start, int64_t stop, int threads,
               float* y) {
  if (start < 0 || stop < start || stop > m->rows) return -1;
  zip::Product p{x, number, m->columns, y, stop - start};
  const std::vector<float> ready = zip::prepare_x(p, zip::supported_level(m->level), m->columns, true);
  const bool good = zip::parallel(stop - start, (stop - start) * m->columns, threads, [&](int64_t begin, int64_t end) {
    return zip::multiply_rows(*m, p, start + begin, start + end, start);
  });
  return good ? 0 : -1;
}

// The plain twin: y [number, rows] = x [number, columns] times the transpose of BF16 w [rows, columns].
int zip_bf16_matmul(const uint16_t* w, int64_t rows, int64_t columns, int64_t level, const float* x, int64_t number,
                    int threads, float* y) {
  const zip::Level chosen = zip::supported_level(level);
  zip::Product p{x, number, columns, y, rows};
  const std::vector<float> ready = zip::prepare_x(p, chosen, columns, false);
  zip::parallel(rows, rows * columns, threads, [&](int64_t begin, int64_t end) {
    const int64_t step = std::max<int64_t>(2, zip::kSegment / columns / 2 * 2);  // rows that stay in L1 for all of x
    for (int64_t r = begin; r < end; r += step)
      zip::dot_words(chosen, w + r * columns, std::min(step, end - r), columns, p, y + r);
    return true;
  });
  return 0;
}

}  // extern "C"
