// Peak rates of this machine, all threads at once: fused multiply-adds in registers, and a plain copy.
// Usage: rates THREADS SECONDS COPY_MIB  -> one JSON object on stdout.
// Compiled by bench/floor.py with -mavx512f or -mavx2 -mfma, as the processor has them.
#include <immintrin.h>

#include <time.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;
constexpr int kAccumulators = 12;  // >= FMA latency (4) x FMA units (2), fits the 16 AVX2 registers
constexpr int kSteps = 20000;      // FMAs an accumulator between two looks at the clock

#if defined(__AVX512F__)
constexpr int kFloats = 16;
using VecF = __m512;
using VecD = __m512d;
inline VecF set(float v) {
  return _mm512_set1_ps(v);
}
inline VecD set(double v) {
  return _mm512_set1_pd(v);
}
inline VecF fma(VecF a, VecF b, VecF c) {
  return _mm512_fmadd_ps(a, b, c);
}
inline VecD fma(VecD a, VecD b, VecD c) {
  return _mm512_fmadd_pd(a, b, c);
}
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int kFloats = 8;
using VecF = __m256;
using VecD = __m256d;
inline VecF set(float v) {
  return _mm256_set1_ps(v);
}
inline VecD set(double v) {
  return _mm256_set1_pd(v);
}
inline VecF fma(VecF a, VecF b, VecF c) {
  return _mm256_fmadd_ps(a, b, c);
}
inline VecD fma(VecD a, VecD b, VecD c) {
  return _mm256_fmadd_pd(a, b, c);
}
#else
constexpr int kFloats = 1;
using VecF = float;
using VecD = double;
inline VecF set(float v) {
  return v;
}
inline VecD set(double v) {
  return v;
}
inline VecF fma(VecF a, VecF b, VecF c) {
  return __builtin_fmaf(a, b, c);
}
inline VecD fma(VecD a, VecD b, VecD c) {
  return __builtin_fma(a, b, c);
}
#endif

// Flops done by one thread until the deadline; acc *= 0.5, += 0.5 converges to 1, so no denormals and no overflow.
template <typename Scalar, typename Vec>
double fma_loop(Clock::time_point deadline) {
  Vec acc[kAccumulators];
  for (int i = 0; i < kAccumulators; ++i) acc[i] = set(Scalar(i + 1));
  const Vec half = set(Scalar(0.5));
  double flops = 0;
  do {
    for (int step = 0; step < kSteps; ++step) {
#pragma GCC unroll 12
      for (int i = 0; i < kAccumulators; ++i) acc[i] = fma(acc[i], half, half);
    }
    flops += 2.0 * kSteps * kAccumulators * kFloats * sizeof(float) / sizeof(Scalar);
  } while (Clock::now() < deadline);
  for (int i = 0; i < kAccumulators; ++i) asm volatile("" : : "x"(acc[i]));  // keep the work
  return flops;
}

// CPU time of the calling thread: equals elapsed time on an idle machine, and is not fooled by a busy one.
double thread_seconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return now.tv_sec + 1e-9 * now.tv_nsec;
}

// Sum over threads of work / seconds.
double rate(int threads, const std::function<double(int)>& work) {
  std::vector<double> rates(threads);
  std::vector<std::thread> pool;
  std::atomic<int> waiting{threads};
  for (int t = 0; t < threads; ++t) {
    pool.emplace_back([&, t] {
      --waiting;
      while (waiting.load() > 0) std::this_thread::yield();
      const double start = thread_seconds();
      const double done = work(t);
      rates[t] = done / (thread_seconds() - start);
    });
  }
  double total = 0;
  for (int t = 0; t < threads; ++t) {
    pool[t].join();
    total += rates[t];
  }
  return total;
}

}  // namespace

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::atoi(argv[1]) : 1;
  const double seconds = argc > 2 ? std::atof(argv[2]) : 0.3;
  const size_t bytes = size_t(argc > 3 ? std::atoi(argv[3]) : 256) << 20;
  const auto span = std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));

  const double f32 = rate(threads, [&](int) { return fma_loop<float, VecF>(Clock::now() + span); });
  const double f64 = rate(threads, [&](int) { return fma_loop<double, VecD>(Clock::now() + span); });

  const size_t part = bytes / threads / 64 * 64;
  std::vector<std::vector<char>> from(threads), to(threads);
  for (int t = 0; t < threads; ++t) {
    from[t].assign(part, char(1 + t));
    to[t].assign(part, 0);
  }
  const double copied = rate(threads, [&](int t) {
    double moved = 0;
    const auto deadline = Clock::now() + span;
    do {
      std::memcpy(to[t].data(), from[t].data(), part);
      asm volatile("" : : "r"(to[t].data()) : "memory");
      moved += 2.0 * part;  // read + written
    } while (Clock::now() < deadline);
    return moved;
  });

  std::printf(
      "{\"threads\": %d, \"vector_bits\": %d, \"fma_float32_gflops\": %.2f, "
      "\"fma_float64_gflops\": %.2f, \"copy_gbytes\": %.3f}\n",
      threads, kFloats * 32, f32 * 1e-9, f64 * 1e-9, copied * 1e-9);
  return 0;
}
