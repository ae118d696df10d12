// RMSNorm over rows of float32, forward and backward, each in one pass over memory; and RMSNorm of heads followed by
// their rotation, from [B, T, A, C] to [B, A, T, C].
//
// Rows are cut into chunks that the OpenMP threads torch has loaded (GOMP_parallel, handed in as an address) take one
// by one. A chunk has its own partial sum of the weight's gradient and they are added in order, so results do not
// depend on who took which chunk.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>

#include "cpu_level.h"

namespace {

using OpenMp = void (*)(void (*)(void*), void*, unsigned, unsigned);
OpenMp openmp = nullptr;
constexpr int LANES = 16;  // separate sums, since a compiler may not reorder one

struct Call {
  const float* x;
  const float* weight;
  const float* grad;
  float* scale;       // one number a row: 1 / rms
  float* out;         // forward: the result; backward: the gradient of x
  float* partial;     // backward: the weight's gradient, one row a chunk
  int64_t rows, size, chunk, threads;
  float eps;
  // Rotation alone: cos and sin [B, T, size / 2], and the lengths of T and A.
  const float* cos;
  const float* sin;
  int64_t positions, heads;
};

// The row of [B, A, T, size] that row (b, t, a) of [B, T, A, size] becomes.
int64_t turned_row(const Call& c, int64_t row) {
  const int64_t place = row / c.heads, head = row % c.heads;
  return (place / c.positions * c.heads + head) * c.positions + place % c.positions;
}

float sum(const float* lane) {
  float total = 0.0f;
  for (int i = 0; i < LANES; ++i) total += lane[i];
  return total;
}

FOR_EVERY_CPU void forward_rows(const Call& c, int64_t begin, int64_t end) {
  const int64_t whole = c.size - c.size % LANES;
  for (int64_t row = begin; row < end; ++row) {
    const float* x = c.x + row * c.size;
    float* out = c.out + row * c.size;
    float lane[LANES] = {};
    for (int64_t j = 0; j < whole; j += LANES)
      for (int i = 0; i < LANES; ++i) lane[i] += x[j + i] * x[j + i];
    float square = sum(lane);
    for (int64_t j = whole; j < c.size; ++j) square += x[j] * x[j];
    const float scale = 1.0f / std::sqrt(square / static_cast<float>(c.size) + c.eps);
    if (c.scale) c.scale[row] = scale;
    for (int64_t j = 0; j < c.size; ++j) out[j] = x[j] * scale * c.weight[j];
  }
}

FOR_EVERY_CPU void backward_rows(const Call& c, int64_t begin, int64_t end) {
  const int64_t whole = c.size - c.size % LANES;
  float* weight_grad = c.partial + begin / c.chunk * c.size;
  std::fill(weight_grad, weight_grad + c.size, 0.0f);
  for (int64_t row = begin; row < end; ++row) {
    const float* x = c.x + row * c.size;
    const float* grad = c.grad + row * c.size;
    float* out = c.out + row * c.size;
    const float scale = c.scale[row];
    float lane[LANES] = {};
    for (int64_t j = 0; j < whole; j += LANES)
      for (int i = 0; i < LANES; ++i) {
        const float product = grad[j + i] * x[j + i] * scale;
        weight_grad[j + i] += product;
        lane[i] += product * c.weight[j + i];
      }
    float shared = sum(lane);
    for (int64_t j = whole; j < c.size; ++j) {
      const float product = grad[j] * x[j] * scale;
      weight_grad[j] += product;
      shared += product * c.weight[j];
    }
    shared /= static_cast<float>(c.size);
    for (int64_t j = 0; j < c.size; ++j) out[j] = scale * (grad[j] * c.weight[j] - x[j] * scale * shared);
  }
}

FOR_EVERY_CPU void forward_turned(const Call& c, int64_t begin, int64_t end) {
  const int64_t half = c.size / 2;
  for (int64_t row = begin; row < end; ++row) {
    const float* x = c.x + row * c.size;
    const float* cos = c.cos + row / c.heads * half;
    const float* sin = c.sin + row / c.heads * half;
    float* out = c.out + turned_row(c, row) * c.size;
    float square = 0.0f;
    for (int64_t j = 0; j < c.size; ++j) square += x[j] * x[j];
    const float scale = 1.0f / std::sqrt(square / static_cast<float>(c.size) + c.eps);
    if (c.scale) c.scale[row] = scale;
    for (int64_t j = 0; j < half; ++j) {
      const float even = x[2 * j] * scale * c.weight[2 * j], odd = x[2 * j + 1] * scale * c.weight[2 * j + 1];
      out[2 * j] = even * cos[j] - odd * sin[j];
      out[2 * j + 1] = odd * cos[j] + even * sin[j];
    }
  }
}

FOR_EVERY_CPU void backward_turned(const Call& c, int64_t begin, int64_t end) {
  const int64_t half = c.size / 2;
  float* weight_grad = c.partial + begin / c.chunk * c.size;
  std::fill(weight_grad, weight_grad + c.size, 0.0f);
  for (int64_t row = begin; row < end; ++row) {
    const float* x = c.x + row * c.size;
    const float* grad = c.grad + turned_row(c, row) * c.size;
    const float* cos = c.cos + row / c.heads * half;
    const float* sin = c.sin + row / c.heads * half;
    float* out = c.out + row * c.size;
    const float scale = c.scale[row];
    float shared = 0.0f;
    for (int64_t j = 0; j < half; ++j) {
      const float even = grad[2 * j] * cos[j] + grad[2 * j + 1] * sin[j];
      const float odd = grad[2 * j + 1] * cos[j] - grad[2 * j] * sin[j];
      const float even_product = even * x[2 * j] * scale, odd_product = odd * x[2 * j + 1] * scale;
      weight_grad[2 * j] += even_product;
      weight_grad[2 * j + 1] += odd_product;
      out[2 * j] = even * c.weight[2 * j];
      out[2 * j + 1] = odd * c.weight[2 * j + 1];
      shared += even_product * c.weight[2 * j] + odd_product * c.weight[2 * j + 1];
    }
    shared /= static_cast<float>(c.size);
    for (int64_t j = 0; j < c.size; ++j) out[j] = scale * (out[j] - x[j] * scale * shared);
  }
}

struct Job {
  const Call* call;
  void (*work)(const Call&, int64_t, int64_t);
  std::atomic<int64_t> next{0};
};

void take_chunks(void* data) {
  Job& job = *static_cast<Job*>(data);
  const Call& c = *job.call;
  for (int64_t begin; (begin = job.next.fetch_add(c.chunk)) < c.rows;)
    job.work(c, begin, std::min(begin + c.chunk, c.rows));
}

void run(const Call& call, void (*work)(const Call&, int64_t, int64_t)) {
  Job job{&call, work};
  if (call.threads > 1 && call.rows > call.chunk)
    openmp(take_chunks, &job, static_cast<unsigned>(call.threads), 0);
  else
    take_chunks(&job);
}

}  // namespace

extern "C" {

int64_t norm_abi() { return 2; }

int64_t norm_level() { return clone_level(); }

void norm_use(void* gomp_parallel) { openmp = reinterpret_cast<OpenMp>(gomp_parallel); }

// scale may be null: nothing is kept for a backward. cos and sin null: RMSNorm alone, out [rows, size]; else out is
// [B, heads, positions, size].
void norm_forward(const float* x, const float* weight, float* scale, float* out, const float* cos, const float* sin,
                  int64_t rows, int64_t size, int64_t chunk, int64_t threads, float eps, int64_t positions,
                  int64_t heads) {
  run(Call{x, weight, nullptr, scale, out, nullptr, rows, size, chunk, threads, eps, cos, sin, positions, heads},
      cos ? forward_turned : forward_rows);
}

// partial: [number of chunks, size]; weight_grad [size] is written.
void norm_backward(const float* grad, const float* x, const float* weight, float* scale, float* x_grad, float* partial,
                   float* weight_grad, const float* cos, const float* sin, int64_t rows, int64_t size, int64_t chunk,
                   int64_t threads, int64_t positions, int64_t heads) {
  run(Call{x, weight, grad, scale, x_grad, partial, rows, size, chunk, threads, 0.0f, cos, sin, positions, heads},
      cos ? backward_turned : backward_rows);
  std::fill(weight_grad, weight_grad + size, 0.0f);
  for (int64_t begin = 0; begin < rows; begin += chunk) {
    const float* part = partial + begin / chunk * size;
    for (int64_t j = 0; j < size; ++j) weight_grad[j] += part[j];
  }
}
}
