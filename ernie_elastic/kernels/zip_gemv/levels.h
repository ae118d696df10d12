// Instruction sets: which ones this processor and system offer.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu_level.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define ZIP_X86 1
#include <immintrin.h>
#endif

#if defined(ZIP_X86) && defined(__linux__) && (__GNUC__ >= 11 || __clang_major__ >= 12)
#define ZIP_HAS_AMX 1
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace zip {

enum Level { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAmx = 3 };

// Whether the processor has BF16 tiles and the system lets this process use them.
inline bool amx_is_allowed() {
#ifdef ZIP_HAS_AMX
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // of arch_prctl
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// The highest instruction set of this processor that there is code for, at most `wanted` and what the user allows.
inline Level supported_level(int64_t wanted) {
#ifdef ZIP_X86
  static const Level best = [] {
    if (ERNIE_ELASTIC_CPU_CAP < CPU_AVX2) return kPortable;
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("bmi"))
      return kPortable;
    if (ERNIE_ELASTIC_CPU_CAP < CPU_AVX512) return kAvx2;
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi") &&
                      __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("popcnt");
    return !wide ? kAvx2 : amx_is_allowed() ? kAmx : kAvx512;
  }();
  return Level(std::min<int64_t>(best, wanted));
#else
  return Level(std::min<int64_t>(kPortable, wanted));
#endif
}

}  // namespace zip
