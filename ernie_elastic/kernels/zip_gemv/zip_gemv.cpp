// The CPU run-time layout (reference.py defines it): packing, decoding, fused decode + product. Called through ctypes.
//
// Plain C ABI, no dependency but the C++17 standard library. One binary serves every x86-64 (AVX-512 or AVX2 code is
// chosen at run time) and, by the portable loops, any other little-endian processor. With AVX-512, weights are decoded
// in the registers that multiply them; otherwise, and for rows that are not whole groups of 64, a part of a row is
// decoded into L1 and multiplied as plain words. Threads share rows, never sums.
// Every function returns 0, or -1 when an argument is out of range.

#include "experts.h"
#include "layout.h"
#include "pack.h"
#include "product.h"
#include "threads.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace zip {
namespace {

template <class Word>
void decode_range(const Matrix& m, int64_t first, int64_t last, Word* out) {
  if (first >= last) return;
  const uint8_t* place = fallbacks_from(m, first);
  decode(m, first, last, place, out);
}

void decode_any(const Matrix& m, int64_t first, int64_t last, uint8_t* out, int is_float) {
  if (is_float) decode_range(m, first, last, reinterpret_cast<uint32_t*>(out));
  else decode_range(m, first, last, reinterpret_cast<uint16_t*>(out));
}

// x in the order of the kernels and the addresses of its rows and of y's.
struct Prepared {
  Lines lines;
  std::vector<const float*> x;

  Prepared(const float* rows, int64_t number, int64_t columns, Order order) : lines(number * padded(columns)) {
    const Permutation permutation(order);
    for (int64_t t = 0; t < number; ++t) {
      permutation.apply(rows + t * columns, columns, lines.at(t * padded(columns)));
      x.push_back(lines.at(t * padded(columns)));
    }
  }
};

std::vector<float*> rows_of(float* y, int64_t number, int64_t stride) {
  std::vector<float*> rows;
  for (int64_t t = 0; t < number; ++t) rows.push_back(y + t * stride);
  return rows;
}

}  // namespace
}  // namespace zip

extern "C" {

int zip_abi() { return 5; }

// Use the threads of an OpenMP runtime from now on (its GOMP_parallel), or threads of our own when null.
void zip_use_openmp(void* parallel) { zip::openmp = reinterpret_cast<zip::OpenMp>(parallel); }

// Asks for large pages behind the whole ones of [start, start + bytes): some percent more speed from memory.
void zip_advise_large_pages(uint8_t* start, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t(2) << 20;
  const uintptr_t from = (reinterpret_cast<uintptr_t>(start) + kPage - 1) / kPage * kPage;
  const uintptr_t to = (reinterpret_cast<uintptr_t>(start) + uintptr_t(bytes)) / kPage * kPage;
  if (from < to) (void)madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#endif
  (void)start, (void)bytes;
}

int zip_level() { return zip::supported_level(zip::kAmx); }

// Exponents of `parts` runs of tiles of `count` words: found [parts, 256].
int zip_count_exponents(const uint16_t* words, int64_t count, int64_t parts, int64_t* found) {
  const int64_t tiles = (count + zip::kTile - 1) / zip::kTile;
  std::atomic<int64_t> next{0};
  zip::on_threads(parts, [&] {
    for (int64_t part = next++; part < parts; part = next++) {
      zip::Histogram own{};
      const int64_t end = std::min(count, tiles * (part + 1) / parts * zip::kTile);
      zip::count_exponents(words, tiles * part / parts * zip::kTile, end, own);
      std::copy(own.begin(), own.end(), found + 256 * part);
    }
  });
  return 0;
}

// Packs the same parts. code: exponent -> code, 0 for fallbacks. before [parts]: fallbacks before each part; offsets'
// last entry is the caller's. level: the highest instruction set to use.
int zip_pack(const uint16_t* words, int64_t count, int64_t parts, int64_t level, const uint8_t* code,
             const int64_t* before, uint8_t* low, uint8_t* codes, int64_t* offsets, uint8_t* fallbacks) {
  const int64_t tiles = (count + zip::kTile - 1) / zip::kTile;
  const zip::Packer packer{words, code, low, codes};
  std::atomic<int64_t> next{0};
  zip::on_threads(parts, [&] {
    for (int64_t part = next++; part < parts; part = next++)
      packer.tiles(zip::supported_level(level), tiles * part / parts, tiles * (part + 1) / parts, count, before[part],
                   fallbacks + before[part], offsets);
  });
  return 0;
}

// Whether the offsets agree with the codes, so that nothing is read beyond the fallbacks: every other function relies
// on it. fallback_bytes: the length of the array.
int zip_check(const zip::Matrix* m, int64_t fallback_bytes, int threads) {
  const int64_t tiles = m->tiles();
  if (m->offsets[0] != 0 || m->offsets[tiles] != fallback_bytes - 64) return -1;
  std::atomic<int> bad{0};
  zip::parallel(tiles, m->count(), threads, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t i = t * zip::kTile, stop = std::min(m->count(), i + zip::kTile);
      if (m->offsets[t + 1] - m->offsets[t] != zip::count_fallbacks(*m, i, stop)) bad = 1;
    }
  });
  return bad ? -1 : 0;
}

// Rows start..stop to out: [stop - start, columns] of BF16, or of float32 when is_float.
int zip_unpack(const zip::Matrix* m, int64_t start, int64_t stop, int is_float, int threads, uint8_t* out) {
  if (start < 0 || stop < start || stop > m->rows) return -1;
  const int64_t first = start * m->columns, count = (stop - start) * m->columns;
  const int64_t tiles = (count + zip::kTile - 1) / zip::kTile;
  zip::parallel(tiles, count, threads, [&](int64_t begin, int64_t end) {
    const int64_t from = begin * zip::kTile, to = std::min(count, end * zip::kTile);
    zip::decode_any(*m, first + from, first + to, out + from * (is_float ? 4 : 2), is_float);
  });
  return 0;
}

// The named rows to out: [number, columns].
int zip_unpack_rows(const zip::Matrix* m, const int64_t* which, int64_t number, int is_float, int threads,
                    uint8_t* out) {
  const int64_t columns = m->columns, row_bytes = columns * (is_float ? 4 : 2);
  for (int64_t k = 0; k < number; ++k)
    if (which[k] < 0 || which[k] >= m->rows) return -1;
  zip::parallel(number, number * columns, threads, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k)
      zip::decode_any(*m, which[k] * columns, (which[k] + 1) * columns, out + k * row_bytes, is_float);
  });
  return 0;
}

// y [number, stop - start] = x [number, columns] times the transpose of rows start..stop.
int zip_matmul(const zip::Matrix* m, const float* x, int64_t number, int64_t start, int64_t stop, int threads,
               float* y) {
  if (start < 0 || stop < start || stop > m->rows) return -1;
#ifdef ZIP_HAS_AMX
  if (zip::uses_tiles(zip::supported_level(m->level), m->columns, number)) {
    const auto source = [&](int64_t begin) {
      const int64_t row = start + begin;
      return zip::amx::Packed(*m, row, zip::fallbacks_from(*m, row * m->columns));
    };
    zip::multiply_by_tiles(source, stop - start, m->columns, x, number, threads, y);
    return 0;
  }
#endif
  const zip::Prepared ready(x, number, m->columns, zip::order_of(zip::supported_level(m->level), zip::is_fused(*m)));
  zip::parallel(stop - start, (stop - start) * m->columns, threads, [&](int64_t begin, int64_t end) {
    std::vector<float*> rows = zip::rows_of(y + begin, number, stop - start);
    zip::multiply_rows(*m, start + begin, start + end, number, ready.x.data(), rows.data());
  });
  return 0;
}

// y [number, hidden] = sum over the slots of weights * down(silu(gate) * up) of expert ids, in increasing order of the
// experts; ids of `experts` and more are left out. ids and weights [number, top_k].
int zip_experts(const zip::Matrix* gate_up, const zip::Matrix* down, int64_t experts, const float* x, int64_t number,
                const int64_t* ids, const float* weights, int64_t top_k, int threads, float* y) {
  const int64_t hidden = gate_up->columns, width = down->columns;
  if (gate_up->rows != experts * 2 * width || down->rows != experts * hidden) return -1;
  std::vector<std::vector<int64_t>> pairs(static_cast<size_t>(experts));
  for (int64_t i = 0; i < number * top_k; ++i) {
    if (ids[i] < 0) return -1;
    if (ids[i] < experts) pairs[size_t(ids[i])].push_back(i);
  }
  std::vector<zip::Experts::Routed> routed;
  for (int64_t e = 0; e < experts; ++e)
    if (!pairs[size_t(e)].empty()) routed.push_back({e, std::move(pairs[size_t(e)]), {}, {}});
  std::fill_n(y, number * hidden, 0.0f);
  zip::Experts{*gate_up, *down, hidden, width, top_k}.run(routed, x, number, weights, threads, y);
  return 0;
}

// The plain twin: y [number, rows] = x [number, columns] times the transpose of BF16 w [rows, columns].
int zip_bf16_matmul(const uint16_t* w, int64_t rows, int64_t columns, int64_t level, const float* x, int64_t number,
                    int threads, float* y) {
  const zip::Level chosen = zip::supported_level(level);
#ifdef ZIP_HAS_AMX
  if (zip::uses_tiles(chosen, columns, number)) {
    const auto source = [&](int64_t begin) { return zip::amx::Plain(w + begin * columns, columns); };
    zip::multiply_by_tiles(source, rows, columns, x, number, threads, y);
    return 0;
  }
#endif
  const zip::Prepared ready(x, number, columns, zip::order_of(chosen, false));
  zip::parallel(rows, rows * columns, threads, [&](int64_t begin, int64_t end) {
    std::vector<float> sums(size_t(zip::kMaxTile * zip::kSums));
    std::vector<float*> out = zip::rows_of(y + begin, number, rows);
    int64_t row = begin;
#ifdef ZIP_X86
    for (; number == 1 && chosen >= zip::kAvx512 && row + zip::kPlainRows <= end; row += zip::kPlainRows)
      zip::avx512::dot_words<zip::kPlainRows, 1>(
          zip::Part{w + row * columns, 0, columns, columns, row, nullptr},
          zip::Rows{ready.x.data(), out.data(), 1, begin});
#endif
    for (; row < end; ++row)
      zip::for_tiles(number, ready.x.data(), out.data(), begin, [&](const zip::Rows& of, int64_t) {
        zip::dot_words(chosen, zip::Part{w + row * columns, 0, columns, columns, row, sums.data()}, of);
      });
  });
  return 0;
}

// Reads `bytes` bytes with all threads, for measuring the bandwidth of memory: returns a sum of what it read.
uint64_t zip_read(const uint8_t* data, int64_t bytes, int threads) {
  std::atomic<uint64_t> total{0};
  zip::parallel(bytes / zip::kLineBlock, bytes, threads, [&](int64_t begin, int64_t end) {
    total += zip::read_lines(data + begin * zip::kLineBlock, end - begin);
  });
  return total;
}

}  // extern "C"
