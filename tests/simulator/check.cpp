// Runs every kernel on small shapes from exactly sized heap buffers and prints one line of checksums per case.
// Built plainly, with ThreadSanitizer and with AddressSanitizer; the test compares the lines. Argument "reverse" runs
// blocks and threads in the opposite order, which must change nothing.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

extern "C" {
void sim_set_reverse(int reverse);
int sim_cluster(const int64_t* n, const void* const* p);
int sim_pool(const int64_t* n, const void* const* p);
int sim_pool_backward(const int64_t* n, const void* const* p);
int sim_unpool(const int64_t* n, const void* const* p);
int sim_attention_received(const int64_t* n, float scale, const void* const* p);
}

namespace {

uint64_t state = 1;
uint32_t next() {
  return static_cast<uint32_t>((state = state * 6364136223846793005ull + 1442695040888963407ull) >> 33);
}
float uniform() {
  return static_cast<float>(next() % 2000) / 1000.0f - 1.0f;
}

// A buffer of exactly `bytes`, so that one byte too far is an error.
struct Buffer {
  explicit Buffer(size_t size) : bytes(size), memory(new unsigned char[size]) { std::memset(memory.get(), 0xff, size); }
  size_t bytes;
  std::unique_ptr<unsigned char[]> memory;
  template <typename T>
  T* as() {
    return reinterpret_cast<T*>(memory.get());
  }
  uint64_t checksum() const {
    uint64_t sum = 1469598103934665603ull;
    for (size_t i = 0; i < bytes; ++i) sum = (sum ^ memory[i]) * 1099511628211ull;
    return sum;
  }
};

// float32 (0), float16 (1) or bfloat16 (2); values are multiples of 1/8 in [-4, 4), exact in all three.
Buffer random_tokens(int64_t count, int dtype) {
  Buffer buffer(static_cast<size_t>(count) * (dtype == 0 ? 4 : 2));
  for (int64_t i = 0; i < count; ++i) {
    const float v = static_cast<float>(static_cast<int>(next() % 64) - 32) / 8.0f;
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    if (dtype == 0) {
      buffer.as<float>()[i] = v;
    } else if (dtype == 2) {
      buffer.as<uint16_t>()[i] = static_cast<uint16_t>(bits >> 16);
    } else {
      const int exponent = static_cast<int>(bits >> 23 & 255) - 127 + 15;
      buffer.as<uint16_t>()[i] =
          static_cast<uint16_t>((bits >> 16 & 0x8000) | (v == 0 ? 0 : exponent << 10 | (bits >> 13 & 1023)));
    }
  }
  return buffer;
}

int failures = 0;
void report(const char* name, int status, std::initializer_list<const Buffer*> outputs) {
  std::printf("%s", name);
  for (const Buffer* b : outputs) std::printf(" %016llx", static_cast<unsigned long long>(b->checksum()));
  std::printf("\n");
  if (status < 0) ++failures;
}

enum class Start { kIndices, kCenters, kFarthest };

void cluster_case(int path, int dtype, bool medoids, bool masked, Start begin, int n, int d, int k, int64_t limit) {
  const int b = 3;
  state = static_cast<uint64_t>(1 + path + 10 * dtype + 100 * n + 1000 * masked);
  Buffer x = random_tokens(int64_t{b} * n * d, dtype), weights(4 * b * n), mask(b * n), counts(8 * b), init(8 * b * k);
  Buffer start(4 * b * k * d), centers(size_t(b) * k * d * (dtype == 0 ? 4 : 2)), assignment(8 * b * n),
      mass(4 * b * k);
  Buffer chosen(8 * b * k), inertia(4 * b);
  for (int i = 0; i < b * n; ++i) weights.as<float>()[i] = next() % 5 == 0 ? 0.0f : uniform() + 1.0f;
  for (int i = 0; i < b * n; ++i) mask.as<uint8_t>()[i] = i / n == 2 ? 0 : next() % 4 != 0;  // the last image is empty
  for (int i = 0; i < b; ++i) counts.as<int64_t>()[i] = 1 + next() % k;
  for (int i = 0; i < b * k; ++i) init.as<int64_t>()[i] = next() % (i % 3 == 0 ? 2 : n);  // duplicates: repairs
  for (int i = 0; i < b * k * d; ++i) start.as<float>()[i] = uniform();
  const int64_t numbers[19] = {b,       n, d, k,     dtype, int64_t{n} * d, d, 1, d % 8 == 0, 3, masked,
                               medoids, 9, 0, limit, path,  masked ? 2 : 0, 0, k};
  const void* pointers[11] = {x.as<void>(),
                              masked ? weights.as<void>() : nullptr,
                              masked ? mask.as<void>() : nullptr,
                              masked ? counts.as<void>() : nullptr,
                              begin == Start::kIndices ? init.as<void>() : nullptr,
                              begin == Start::kCenters ? start.as<void>() : nullptr,
                              centers.as<void>(),
                              assignment.as<void>(),
                              mass.as<void>(),
                              chosen.as<void>(),
                              inertia.as<void>()};
  const int taken = sim_cluster(numbers, pointers);
  char name[128];
  std::snprintf(name, sizeof(name), "cluster path=%d dtype=%d medoids=%d masked=%d start=%d n=%d d=%d k=%d", taken,
                dtype, medoids, masked, static_cast<int>(begin), n, d, k);
  report(name, taken == path ? 0 : -1, {&centers, &assignment, &mass, &chosen, &inertia});
}

void pool_case(int dtype, int n, int d, int k, int64_t limit) {
  const int b = 2;
  state = static_cast<uint64_t>(7 + n);
  const size_t size = dtype == 0 ? 4 : 2;
  Buffer x = random_tokens(int64_t{b} * n * d, dtype), g = random_tokens(int64_t{b} * k * d, dtype), labels(8 * b * n);
  Buffer weights(4 * b * n), centers(b * k * d * size), sums(b * k * d * size), mass(4 * b * k), back(b * n * d * size);
  Buffer grad_x(b * n * d * size), grad_w(4 * b * n);
  for (int i = 0; i < b * n; ++i)
    labels.as<int64_t>()[i] = static_cast<int64_t>(next() % (k + 3)) - 1;  // -1, k and k + 1 too
  for (int i = 0; i < b * n; ++i) weights.as<float>()[i] = next() % 3 == 0 ? 0.0f : uniform() + 1.0f;
  const int64_t rows = int64_t{n} * d, crows = int64_t{k} * d, aligned = d % 8 == 0;
  const int64_t pool[11] = {b, n, d, k, dtype, rows, d, 1, aligned, 0, limit},
                sum[11] = {b, n, d, k, dtype, rows, d, 1, aligned, 2, limit};
  const void* pool_p[5] = {x.as<void>(), labels.as<void>(), weights.as<void>(), centers.as<void>(), mass.as<void>()};
  const void* sum_p[5] = {x.as<void>(), labels.as<void>(), nullptr, sums.as<void>(), nullptr};
  int status = sim_pool(pool, pool_p) | sim_pool(sum, sum_p);
  const int64_t unpool[9] = {b, n, d, k, dtype, crows, d, 1, aligned};
  const void* unpool_p[3] = {centers.as<void>(), labels.as<void>(), back.as<void>()};
  status |= sim_unpool(unpool, unpool_p);
  const int64_t grad[17] = {b, n, d, k, dtype, rows, d, 1, aligned, crows, d, 1, aligned, crows, d, 1, aligned};
  const void* grad_p[8] = {x.as<void>(),       g.as<void>(),    centers.as<void>(), labels.as<void>(),
                           weights.as<void>(), mass.as<void>(), grad_x.as<void>(),  grad_w.as<void>()};
  status |= sim_pool_backward(grad, grad_p);
  char name[96];
  std::snprintf(name, sizeof(name), "pool dtype=%d n=%d d=%d k=%d limit=%d", dtype, n, d, k, static_cast<int>(limit));
  report(name, status ? -1 : 0, {&centers, &mass, &sums, &back, &grad_x, &grad_w});
}

void attention_case(int dtype, int h, int queries, int keys, int d) {
  const int b = 2;
  state = 11;
  Buffer q = random_tokens(int64_t{b} * h * queries * d, dtype), k = random_tokens(int64_t{b} * h * keys * d, dtype);
  Buffer out(4 * b * keys);
  const int64_t numbers[16] = {b,
                               h,
                               queries,
                               keys,
                               d,
                               dtype,
                               int64_t{h} * queries * d,
                               d,
                               1,
                               d % 8 == 0,
                               int64_t{queries} * d,
                               int64_t{h} * keys * d,
                               d,
                               1,
                               d % 8 == 0,
                               int64_t{keys} * d};
  const void* pointers[4] = {q.as<void>(), k.as<void>(), nullptr, out.as<void>()};
  const int status = sim_attention_received(numbers, 0.125f, pointers);
  char name[96];
  std::snprintf(name, sizeof(name), "attention dtype=%d h=%d q=%d k=%d d=%d", dtype, h, queries, keys, d);
  report(name, status ? -1 : 0, {&out});
}

}  // namespace

int main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  sim_set_reverse(argc > 1 && std::string(argv[1]) == "reverse");
  constexpr int kPaths = 4;
  for (int path = 0; path < kPaths; ++path)
    for (int dtype : {0, 2})
      for (bool medoids : {false, true}) {
        const bool masked = medoids == (dtype == 0);  // every pair of the three occurs
        cluster_case(path, dtype, medoids, masked, Start::kIndices, masked ? 21 : 37, dtype ? 24 : 9, 6, 0);
      }
  for (int path = 0; path < kPaths; ++path) {
    cluster_case(path, 1, false, true, Start::kCenters, 19, 16, 5, 0);
    cluster_case(path, path % 2 ? 0 : 2, path == 1, true, Start::kFarthest, 35, 12, 7, 0);
  }
  cluster_case(1, 2, false, false, Start::kIndices, 130, 8, 66,
               0);  // more than one 128-row tile, more than 64 clusters
  cluster_case(2, 2, true, true, Start::kIndices, 131, 8, 67, 2048);  // counters of the sort in global memory
  cluster_case(2, 0, false, false, Start::kFarthest, 135, 5, 3, 0);   // more than one block a step
  cluster_case(1, 2, false, true, Start::kIndices, 1025, 2, 4,
               0);  // too wide for groups of threads that share the clusters
  for (int path : {0, 3})
    cluster_case(path, 0, false, true, Start::kIndices, 70, 40, 33, 0);  // chunks; rows of 32 x 32 tiles
  for (int dtype : {0, 1, 2}) pool_case(dtype, 41, dtype == 1 ? 8 : 13, 6, 99 * 1024);
  pool_case(2, 70, 6, 40, 1024);
  attention_case(0, 2, 130, 66, 12);
  attention_case(2, 1, 33, 70, 16);
  std::printf("failures %d\n", failures);
  return failures != 0;
}
