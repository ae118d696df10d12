// Instruction sets that our code may use: the processor's, at most what ERNIE_ELASTIC_CPU allows (native.py).
#pragma once

#define CPU_PORTABLE 0
#define CPU_AVX2 1
#define CPU_AVX512 2
#define CPU_ANY 99

#ifndef ERNIE_ELASTIC_CPU_CAP
#define ERNIE_ELASTIC_CPU_CAP CPU_ANY
#endif

// Before a function that the compiler vectorises: one version of it for every instruction set, chosen when it is loaded.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && \
    ERNIE_ELASTIC_CPU_CAP >= CPU_AVX2
#define CPU_CLONES 1
#if ERNIE_ELASTIC_CPU_CAP >= CPU_AVX512
#define FOR_EVERY_CPU __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_EVERY_CPU __attribute__((target_clones("avx2", "default")))
#endif
#else
#define FOR_EVERY_CPU
#endif

// Which version runs.
inline int clone_level() {
#ifdef CPU_CLONES
  if (ERNIE_ELASTIC_CPU_CAP >= CPU_AVX512 && __builtin_cpu_supports("avx512f")) return CPU_AVX512;
  return __builtin_cpu_supports("avx2") ? CPU_AVX2 : CPU_PORTABLE;
#else
  return CPU_PORTABLE;
#endif
}
