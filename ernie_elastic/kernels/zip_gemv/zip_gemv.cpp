// Decode and fused decode + GEMV of the CPU run-time layout (reference.py defines it), called through ctypes.
//
// Plain C ABI, no dependency but the C++17 standard library. One binary serves every x86-64 (AVX-512 or AVX2 code is
// chosen at run time) and, by the portable loops, any other little-endian processor. A product decodes the high bytes
// of a part of a row (or of a few short rows) into L1, writes the fallbacks over them, and joins both byte streams in
// registers while it multiplies.
// Every function returns 0, or -1 when an argument or a fallback list is out of range (zip_experts: -2 for its own
// arguments).

#include <atomic>
#include <cmath>
#include <thread>
#include <vector>

#include "avx2.h"
#include "avx512.h"
#include "layout.h"

namespace zip {
namespace {

// Below this many weights per thread a thread costs more than it saves.
constexpr int64_t kWeightsPerThread = 1 << 17;

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

// Calls tile(Int<T>, t) for tiles of T rows of x, T at most kTile, that cover p.m.
template <int kTile, class Tile>
void for_tiles(int64_t m, Tile tile) {
  int64_t t = 0;
  for (; t + kTile <= m; t += kTile) tile(Int<kTile>{}, t);
  if constexpr (kTile > 2)
    if (t + 2 <= m) {
      tile(Int<2>{}, t);
      t += 2;
    }
  if (t < m) tile(Int<1>{}, t);
}

// low: the low bytes of the part's first row; high: true high bytes from its column part.begin on.
void dot_streams(Level level, const uint8_t* low, const uint8_t* high, const Product& p, const Part& part) {
  [[maybe_unused]] const int64_t origin = part.begin;
#ifdef ZIP_X86
  if (level == kAvx512)
    return for_tiles<avx512::kTile>(p.m, [&](auto tile, int64_t t) {
      avx512::dot<tile()>(avx512::Streams{low, high, origin}, p, part, t);
    });
  if (level == kAvx2)
    return for_tiles<avx2::kTile>(p.m, [&](auto tile, int64_t t) {
      avx2::dot<tile()>(avx2::Streams{low, high, origin}, p, part, t);
    });
#endif
  (void)level;
  const auto weight = [&](int64_t r, int64_t c) {
    const int64_t i = r * part.columns + c;
    return widen(uint16_t(low[i] | high[i - origin] << 8));
  };
  dot_portable(weight, p, part);
}

// The same for plain BF16 words.
void dot_words(Level level, const uint16_t* words, const Product& p, const Part& part) {
#ifdef ZIP_X86
  if (level == kAvx512)
    return for_tiles<avx512::kTile>(
        p.m, [&](auto tile, int64_t t) { avx512::dot<tile()>(avx512::Words{words}, p, part, t); });
  if (level == kAvx2)
    return for_tiles<avx2::kTile>(
        p.m, [&](auto tile, int64_t t) { avx2::dot<tile()>(avx2::Words{words}, p, part, t); });
#endif
  (void)level;
  dot_portable([&](int64_t r, int64_t c) { return widen(words[r * part.columns + c]); }, p, part);
}

// True high bytes of the flat range [first, last) to `high`. False when the lists are damaged.
bool decode_high(const Matrix& w, Level level, int64_t first, int64_t last, uint8_t* high) {
  const auto simd = [&]([[maybe_unused]] int64_t from, [[maybe_unused]] int64_t to) {
#ifdef ZIP_X86
    if (level == kAvx512) avx512::decode_high(w, from, to, high + (from - first));
    else avx2::decode_high(w, from, to, high + (from - first));
#endif
  };
  decode_range(w, level, first, last, simd, [&](int64_t i) { high[i - first] = w.high_at(i); });
  return patch_fallbacks<1>(w, first, last, high);
}

// Walks the rows begin..end in the parts of a product: kChunk columns of a long row, or several short rows.
struct Walk {
  int64_t columns, end, row, column = 0;

  int64_t rows() const { return std::min(std::max<int64_t>(1, kChunk / columns), end - row); }
  int64_t stop() const { return columns <= kChunk ? columns : std::min(columns, column + kChunk); }
  int64_t first() const { return row * columns + column; }                    // flat range of the part's weights
  int64_t last() const { return (row + rows() - 1) * columns + stop(); }
  bool done() const { return row >= end; }
  Walk next() const {
    return stop() < columns ? Walk{columns, end, row, stop()} : Walk{columns, end, row + rows(), 0};
  }
};

// Rows begin..end of w times p.x into y, whose first column is row y_row. False when the lists are damaged.
bool multiply_rows(const Matrix& w, const Product& p, int64_t begin, int64_t end, int64_t y_row) {
  const Level level = supported_level(w.level);
  alignas(64) uint8_t buffers[2 * kChunk];
  std::vector<float> sums(size_t(p.m * kSums));
  uint8_t *now = buffers, *later = now + kChunk;
  Walk at{w.columns, end, begin};
  if (!at.done() && !decode_high(w, level, at.first(), at.last(), now)) return false;
  while (!at.done()) {
    // The next part is decoded before this one is used: bytes just written one by one are slow to read as vectors.
    const Walk next = at.next();
    if (!next.done() && !decode_high(w, level, next.first(), next.last(), later)) return false;
    const Part part{at.rows(), at.column, at.stop(), w.columns, sums.data(), p.y + (at.row - y_row)};
    dot_streams(level, w.low + at.row * w.columns, now, p, part);
    std::swap(now, later);
    at = next;
  }
  return true;
}

// An OpenMP runtime's entry point: runs function(data) on `threads` threads at once. Given by zip_use_openmp.
using OpenMp = void (*)(void (*function)(void*), void* data, unsigned threads, unsigned flags);
std::atomic<OpenMp> openmp{nullptr};

// Runs step() on `threads` threads at once: those of OpenMP when given, else new ones (fewer when they cannot start).
template <class Step>
void on_threads(int64_t threads, Step step) {
  if (const OpenMp run = openmp.load()) {
    run([](void* data) { (*static_cast<Step*>(data))(); }, &step, unsigned(threads), 0);
    return;
  }
  std::vector<std::thread> pool;
  try {
    while (int64_t(pool.size()) + 1 < threads) pool.emplace_back(step);
  } catch (...) {  // the threads that run do the work
  }
  step();
  for (auto& thread : pool) thread.join();
}

// Splits [0, count) into one part per thread; work(begin, end) returns false on damaged input.
template <class Work>
bool parallel(int64_t count, int64_t weights, int threads, Work work) {
  const int64_t parts = std::min<int64_t>({int64_t(threads), count, weights / kWeightsPerThread});
  if (parts <= 1) return work(int64_t(0), count);
  std::atomic<int64_t> next{0};
  std::atomic<bool> good{true};
  on_threads(parts, [&] {
    for (int64_t part = next++; part < parts; part = next++)
      if (!work(count * part / parts, count * (part + 1) / parts)) good = false;
  });
  return good;
}

// x permuted for the vector code, padded with zeros to whole groups and aligned; p points at it afterwards.
std::vector<float> prepare_x(Product& p, Level level, int64_t columns, [[maybe_unused]] bool streams) {
  std::vector<float> ready;
#ifdef ZIP_X86
  if (level != kPortable) {
    const int64_t padded = (columns + kSums - 1) / kSums * kSums;
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

// y [number, stop - start] = x [number, columns] times the transpose of rows start..stop. False when damaged.
bool multiply(const Matrix& m, const float* x, int64_t number, int64_t start, int64_t stop, int threads, float* y) {
  Product p{x, number, m.columns, y, stop - start};
  const std::vector<float> ready = prepare_x(p, supported_level(m.level), m.columns, true);
  return parallel(stop - start, (stop - start) * m.columns, threads, [&](int64_t begin, int64_t end) {
    return multiply_rows(m, p, start + begin, start + end, start);
  });
}

// A mixture of experts whose matrices lie below each other: expert e has rows [2 * width * e, ...) of gate_up, gate
// half first, and rows [hidden * e, ...) of down.
struct Experts {
  const Matrix& gate_up;
  const Matrix& down;
  int64_t hidden, width, top_k;
  int threads;

  // Adds weight * expert(x) of the pairs (token * top_k + slot) of one expert to y.
  bool add(int64_t expert, const std::vector<int64_t>& pairs, const float* x, const float* weights, float* y) const {
    const int64_t count = int64_t(pairs.size());
    std::vector<float> in(size_t(count * hidden)), both(size_t(count * 2 * width)), inner(size_t(count * width));
    for (int64_t i = 0; i < count; ++i)
      std::copy_n(x + pairs[size_t(i)] / top_k * hidden, hidden, in.data() + i * hidden);
    const int64_t first = expert * 2 * width;
    if (!multiply(gate_up, in.data(), count, first, first + 2 * width, threads, both.data())) return false;
    for (int64_t i = 0; i < count; ++i)
      for (int64_t j = 0; j < width; ++j) {
        const float gate = both[size_t(i * 2 * width + j)], up = both[size_t(i * 2 * width + width + j)];
        inner[size_t(i * width + j)] = gate / (1.0f + std::exp(-gate)) * up;
      }
    if (!multiply(down, inner.data(), count, expert * hidden, (expert + 1) * hidden, threads, in.data())) return false;
    for (int64_t i = 0; i < count; ++i) {
      const float weight = weights[pairs[size_t(i)]];
      float* out = y + pairs[size_t(i)] / top_k * hidden;
      for (int64_t j = 0; j < hidden; ++j) out[j] += weight * in[size_t(i * hidden + j)];
    }
    return true;
  }
};

}  // namespace
}  // namespace zip

extern "C" {

int zip_abi() { return 4; }

// Use the threads of an OpenMP runtime from now on (its GOMP_parallel), or threads of our own when null.
void zip_use_openmp(void* parallel) { zip::openmp = reinterpret_cast<zip::OpenMp>(parallel); }

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
      const int64_t first = which[k] * columns;
      if (!zip::decode_any(*m, first, first + columns, out + k * row_bytes, is_float)) return false;
    }
    return true;
  });
  return good ? 0 : -1;
}

// y [number, stop - start] = x [number, columns] times the transpose of rows start..stop.
int zip_matmul(const zip::Matrix* m, const float* x, int64_t number, int64_t start, int64_t stop, int threads,
               float* y) {
  if (start < 0 || stop < start || stop > m->rows) return -1;
  return zip::multiply(*m, x, number, start, stop, threads, y) ? 0 : -1;
}

// y [number, hidden] = sum over the slots of weights * down(silu(gate) * up) of expert ids, in increasing order of the
// experts; ids of `experts` and more are left out. ids and weights [number, top_k].
int zip_experts(const zip::Matrix* gate_up, const zip::Matrix* down, int64_t experts, const float* x, int64_t number,
                const int64_t* ids, const float* weights, int64_t top_k, int threads, float* y) {
  const int64_t hidden = gate_up->columns, width = down->columns;
  if (gate_up->rows != experts * 2 * width || down->rows != experts * hidden) return -2;
  const zip::Experts layer{*gate_up, *down, hidden, width, top_k, threads};
  std::vector<std::vector<int64_t>> pairs(static_cast<size_t>(experts));
  for (int64_t i = 0; i < number * top_k; ++i) {
    if (ids[i] < 0) return -2;
    if (ids[i] < experts) pairs[size_t(ids[i])].push_back(i);
  }
  std::fill_n(y, number * hidden, 0.0f);
  for (int64_t e = 0; e < experts; ++e)
    if (!pairs[size_t(e)].empty() && !layer.add(e, pairs[size_t(e)], x, weights, y)) return -1;
  return 0;
}

// The plain twin: y [number, rows] = x [number, columns] times the transpose of BF16 w [rows, columns].
int zip_bf16_matmul(const uint16_t* w, int64_t rows, int64_t columns, int64_t level, const float* x, int64_t number,
                    int threads, float* y) {
  const zip::Level chosen = zip::supported_level(level);
  zip::Product p{x, number, columns, y, rows};
  const std::vector<float> ready = zip::prepare_x(p, chosen, columns, false);
  zip::parallel(rows, rows * columns, threads, [&](int64_t begin, int64_t end) {
    std::vector<float> sums(size_t(number * zip::kSums));
    const int64_t step = std::max<int64_t>(1, zip::kChunk / columns);  // rows that stay in L1 for all tiles of x
    for (int64_t r = begin; r < end; r += step) {
      const zip::Part part{std::min(step, end - r), 0, columns, columns, sums.data(), y + r};
      zip::dot_words(chosen, w + r * columns, p, part);
    }
    return true;
  });
  return 0;
}

}  // extern "C"
