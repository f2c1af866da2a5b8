// Where a clustering's time goes: the phases of the CPU kernels, one thread, best of many, random tokens.
// Compiled and run by `python -m bench.profile_cpu N D K`.
#include <time.h>

#include <cstdio>

#if defined(__AVX512F__)
#include "cpu/kernels_avx512.cpp"
#else
#include "cpu/kernels_avx2.cpp"
#endif

std::atomic<bool (*)()> tokenpool::interrupt_check{nullptr};  // nobody asks

using namespace tokenpool;
using namespace tokenpool::TP_ISA;

static double now() {  // microseconds of CPU time
  timespec t;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
  return t.tv_sec * 1e6 + t.tv_nsec * 1e-3;
}

template <class F>
static double best(F f) {
  double least = 1e18;
  for (int i = 0; i < 40; ++i) {
    const double start = now();
    f();
    least = std::min(least, now() - start);
  }
  return least;
}

__attribute__((noinline)) static float multiply_adds(long n) {  // twelve independent chains in registers
  Vec<float> a[12];
  for (int i = 0; i < 12; ++i) a[i] = splat(1.0f + i);
  Vec<float> x = splat(0.9999f), y = splat(1e-4f);
  for (long k = 0; k < n; ++k) {
#pragma GCC unroll 12
    for (int i = 0; i < 12; ++i) a[i] = a[i] * x + y;
    asm volatile("" : "+v"(x));
  }
  float sum = 0;
  for (int i = 0; i < 12; ++i) sum += lane_sum<float>(a[i]);
  return sum;
}

struct Profile : Clustering<float> {
  Profile(const ClusterArgs& args, Watch& watch) : Clustering<float>(args, false, watch) {}

  void phases(double floor) {
    run(0, 1);
    std::printf("  whole call       %8.1f us  %.2f x floor, %s path\n", best([&] { run(0, 1); }),
                best([&] { run(0, 1); }) / floor,
                gram_path_         ? "gram"
                : this->group_ > 1 ? "streamed"
                                   : "direct");
    std::printf("  mean, scale      %8.1f\n", best([&] { measure(); }));
    if (gram_path_) {
      std::printf("  pack             %8.1f\n", best([&] {
                    for (int64_t p = 0; p < padded_ / P; ++p) pack(p * P, packed_ + p * P * a.features);
                  }));
      const int64_t panels = padded_ / P;
      std::printf("  Gram product     %8.1f\n",
                  best([&] { gram_tiles(packed_, a.features, n_, 0, panels * (panels + 1) / 2, gram_, row_stride_); }));
      std::printf("  mirror           %8.1f\n", best([&] { mirror(n_, gram_, row_stride_); }));
      std::printf("  one assignment   %8.1f\n", best([&] { assign_gram(); }));
    } else {
      begin(0, 1);
      std::printf("  pack, multiply   %8.1f  (floor %.1f)\n", best([&] { assign_first(1); }), floor * 2 * k_ / n_);
      repair_empty(n_, k_, weight_, best_, ascending_, label_, count_);
      mark_changes(0);
      group_members();
      std::printf("  first update     %8.1f\n", best([&] { update_direct(true); }));
      std::memcpy(previous_, label_, size_t(n_) * sizeof(I));
      std::printf("  bounds           %8.1f  (nothing moved since the last)\n",
                  best([&] { assign_bounded(previous_); }));
    }
    run(0, 1);
    std::printf("  means, inertia   %8.1f\n", best([&] { finish(); }));
  }
};

int main(int argc, char** argv) {
  const int64_t N = argc > 1 ? std::atol(argv[1]) : 256, D = argc > 2 ? std::atol(argv[2]) : 384,
                K = argc > 3 ? std::atol(argv[3]) : 128;
  volatile float sink;
  const long rounds = 100000;
  const double rate =
      rounds * 12 * kLanes<float> * 2 / best([&] { sink = multiply_adds(rounds); });  // flops a microsecond
  (void)sink;
  std::vector<float> x(N * D), centers(K * D), mass(K), inertia(1);
  std::vector<int64_t> start(K), assignment(N), medoids(K);
  unsigned seed = 1;
  for (float& v : x) v = float((seed = seed * 1664525u + 1013904223u) >> 8) / (1 << 24);
  for (int64_t j = 0; j < K; ++j) start[j] = j * N / K;
  ClusterArgs a{};
  a.images = 1;
  a.tokens = N;
  a.features = D;
  a.clusters = K;
  a.iterations = 5;
  a.x = x.data();
  a.x_token_stride = D;
  a.init_index = start.data();
  a.path = argc > 4 ? std::atoi(argv[4]) : -1;  // 0: gram, 1: direct, 2: streamed
  a.threads = 1;
  a.centers = centers.data();
  a.assignment = assignment.data();
  a.mass = mass.data();
  a.medoid_index = medoids.data();
  a.inertia = inertia.data();
  const double floor = double(N) * N * D / rate;
  std::printf("%s: %ld tokens x %ld features -> %ld clusters, 5 iterations; peak %.1f GFLOP/s, floor N^2 D %.1f us\n",
              TP_STRING(TP_ISA), long(N), long(D), long(K), rate / 1e3, floor);
  Watch watch;
  Profile(a, watch).phases(floor);
}
