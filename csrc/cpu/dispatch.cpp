#include <cstdlib>
#include <stdexcept>
#include <string>

#include "api.h"
#include "interrupt.h"

namespace tokenpool {

std::atomic<bool (*)()> interrupt_check{nullptr};

namespace {
#if defined(__x86_64__)
bool runs_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

bool runs_avx512() {
  return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni");
}
#endif

const Kernels* choose(const std::string& asked) {
#if defined(__x86_64__)
  if (asked == "avx512" || (asked.empty() && runs_avx512())) {
    if (!runs_avx512())
      throw std::runtime_error("TOKENPOOL_EXT_CPU_ISA=avx512: this processor has no AVX-512 (F, BW, DQ, VL, VNNI)");
    return &kernels_avx512;
  }
  if (asked == "avx2" || (asked.empty() && runs_avx2())) {
    if (!runs_avx2()) throw std::runtime_error("TOKENPOOL_EXT_CPU_ISA=avx2: this processor has no AVX2, FMA and F16C");
    return &kernels_avx2;
  }
#endif
  if (!asked.empty() && asked != "baseline")
    throw std::runtime_error("TOKENPOOL_EXT_CPU_ISA must be baseline, avx2 or avx512, got " + asked);
  return &kernels_baseline;
}
}  // namespace

const Kernels& kernels() {
  const char* asked = std::getenv("TOKENPOOL_EXT_CPU_ISA");
  if (asked && *asked) return *choose(asked);
  static const Kernels* best = choose("");
  return *best;
}

}  // namespace tokenpool
