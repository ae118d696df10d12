// Threads: those of an OpenMP runtime that is already loaded, or new ones.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace zip {

// Below this many weights per thread a thread costs more than it saves.
constexpr int64_t kWeightsPerThread = 1 << 17;

// An OpenMP runtime's entry point: runs function(data) on `threads` threads at once. Given by zip_use_openmp.
using OpenMp = void (*)(void (*function)(void*), void* data, unsigned threads, unsigned flags);
inline std::atomic<OpenMp> openmp{nullptr};

// Runs step() on `threads` threads at once (fewer when they cannot start).
template <class Step>
void on_threads(int64_t threads, Step step) {
  if (threads <= 1) return step();
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

// Splits [0, count) into one part per thread; work(begin, end).
template <class Work>
void parallel(int64_t count, int64_t weights, int threads, Work work) {
  const int64_t parts = std::min<int64_t>({int64_t(threads), count, weights / kWeightsPerThread});
  if (parts <= 1) return work(int64_t(0), count);
  std::atomic<int64_t> next{0};
  on_threads(parts, [&] {
    for (int64_t part = next++; part < parts; part = next++) work(count * part / parts, count * (part + 1) / parts);
  });
}

}  // namespace zip
