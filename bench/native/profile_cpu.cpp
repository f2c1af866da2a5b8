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

struct Profile {
  static constexpr int P = kPanel<float>;

  explicit Profile(const ClusterArgs& args)
      : a(args), tokens(args, false), gram(tokens, centers, assigned), direct(tokens, centers, assigned) {}

  void phases(double floor) {
    Watch watch;
    Clustering<float> clustering(a, false, watch);
    const auto whole = [&] { clustering.run(0, 1); };
    const double least = best(whole);
    begin();
    Measure<float> measure(tokens);
    const bool grouped = center_group(tokens.n, centers.k, sizeof(float), a.path) > 1;
    std::printf("  whole call       %8.1f us  %.2f x floor, %s path\n", least, least / floor,
                kCpuPaths[int(clustering.on_gram() ? CpuPath::kGram
                              : grouped            ? CpuPath::kGrouped
                                                   : CpuPath::kDirect)]);
    std::printf("  mean, scale      %8.1f\n", best([&] { measure.run(); }));
    if (clustering.on_gram())
      gram_phases();
    else
      direct_phases(floor);
  }

 private:
  void begin() {
    tokens.take(0);
    centers.take(tokens.arena, std::min(a.clusters, tokens.n), a.clusters);
    assigned.take(tokens.arena, tokens.padded, a.clusters);
    for (int64_t j = 0; j < centers.k; ++j) centers.medoid[j] = int32_t(a.init_index[j]);
    centers.row = tokens.arena.take<float>(centers.k * a.features);
    Measure<float>(tokens).run();
  }

  void group_and_report() {
    repair_empty(tokens.n, centers.k, tokens.weight, assigned.best, tokens.ascending, assigned.label, assigned.count);
    assigned.mark_changes(tokens.n, centers.k, true);
    assigned.group_members(tokens, centers.k);
    std::printf("  means, inertia   %8.1f\n", best([&] { Result<float>(tokens, centers, assigned).write(); }));
  }

  void gram_phases() {
    const int64_t panels = tokens.padded / P, stride = tokens.padded;
    Buffer<float> packed(tokens.padded * a.features), product(tokens.padded * stride);
    std::printf("  pack             %8.1f\n", best([&] {
                  for (int64_t p = 0; p < panels; ++p) tokens.pack(p * P, packed + p * P * a.features);
                }));
    std::printf("  Gram product     %8.1f\n", best([&] {
                  gram_tiles<float>(packed, a.features, tokens.n, 0, panels * (panels + 1) / 2, product, stride);
                }));
    std::printf("  mirror           %8.1f\n", best([&] { mirror<float>(tokens.n, product, stride); }));
    gram.build(1);
    gram.start();
    std::printf("  one assignment   %8.1f\n", best([&] { gram.assign(); }));
    group_and_report();
  }

  void direct_phases(double floor) {
    direct.start();
    std::printf("  pack, multiply   %8.1f  (floor %.1f)\n", best([&] { direct.assign_first(1); }),
                floor * 2 * centers.k / tokens.n);
    group_and_report();
    std::printf("  first update     %8.1f\n", best([&] { direct.update(true); }));
    std::swap(assigned.label, assigned.previous);
    std::printf("  bounds           %8.1f  (nothing moved since the last)\n",
                best([&] { direct.assign_bounded(assigned.previous); }));
  }

  const ClusterArgs& a;
  Tokens<float> tokens;
  Centers<float> centers;
  Assignment<float> assigned;
  GramPath<float> gram;
  DirectPath<float> direct;
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
  a.path = argc > 4 ? std::atoi(argv[4]) : -1;  // 0: gram, 1: direct, 2: grouped
  a.threads = 1;
  a.centers = centers.data();
  a.assignment = assignment.data();
  a.mass = mass.data();
  a.medoid_index = medoids.data();
  a.inertia = inertia.data();
  const double floor = double(N) * N * D / rate;
  std::printf("%s: %ld tokens x %ld features -> %ld clusters, 5 iterations; peak %.1f GFLOP/s, floor N^2 D %.1f us\n",
              TP_STRING(TP_ISA), long(N), long(D), long(K), rate / 1e3, floor);
  Profile(a).phases(floor);
}
