// The CPU kernels against plain loops in double, without torch or Python: for processors that are only emulated here.
//   tests/aarch64.sh builds and runs it; it prints one line, and ends with status 1 at the first difference.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "../csrc/cpu/api.h"

using namespace tokenpool;

namespace {
int checks = 0;

void expect(bool right, const std::string& what) {
  ++checks;
  if (right) return;
  std::printf("WRONG: %s\n", what.c_str());
  std::exit(1);
}

uint64_t state = 1;
double integer(int least, int most) {  // small ones: exact in every dtype
  state = state * 6364136223846793005ull + 1442695040888963407ull;
  return least + static_cast<int>((state >> 33) % static_cast<uint64_t>(most - least + 1));
}

void serial(int64_t count, Body body, void* context) {
  body(0, count, context);
}

// Numbers of one dtype and the same in double.
struct Data {
  std::vector<double> value;
  std::vector<unsigned char> bytes;
};

size_t item(DType t) {
  return t == DType::Float64 ? 8 : t == DType::Float32 ? 4 : 2;
}

void put(void* to, DType t, double v) {
  const float f = static_cast<float>(v);
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if (t == DType::Float64) std::memcpy(to, &v, 8);
  if (t == DType::Float32) std::memcpy(to, &f, 4);
  uint16_t half = static_cast<uint16_t>(bits >> 16);  // bfloat16
  if (t == DType::Float16)
    half = static_cast<uint16_t>(
        v == 0 ? 0 : (bits >> 16 & 0x8000) | ((bits >> 23 & 255) - 112) << 10 | (bits >> 13 & 0x3ff));
  if (item(t) == 2) std::memcpy(to, &half, 2);
}

double get(const void* from, DType t) {
  double d;
  float f;
  uint16_t half;
  if (t == DType::Float64) return std::memcpy(&d, from, 8), d;
  if (t == DType::Float32) return std::memcpy(&f, from, 4), f;
  std::memcpy(&half, from, 2);
  if (t == DType::Float16) {
    const int exponent = half >> 10 & 31;
    const double m = exponent ? std::ldexp(1024 + (half & 1023), exponent - 25) : std::ldexp(half & 1023, -24);
    return half >> 15 ? -m : m;
  }
  const uint32_t bits = uint32_t(half) << 16;
  return std::memcpy(&f, &bits, 4), f;
}

Data random(int64_t count, DType t, int least = -4, int most = 4) {
  Data made{std::vector<double>(count), std::vector<unsigned char>(count * item(t))};
  for (int64_t i = 0; i < count; ++i) put(&made.bytes[i * item(t)], t, made.value[i] = integer(least, most));
  return made;
}

std::vector<double> read(const std::vector<unsigned char>& bytes, DType t) {
  std::vector<double> found(bytes.size() / item(t));
  for (size_t i = 0; i < found.size(); ++i) found[i] = get(&bytes[i * item(t)], t);
  return found;
}

bool close(double a, double b, double tolerance) {
  return std::abs(a - b) <= tolerance * (1 + std::abs(b));
}

double distance(const double* a, const double* b, int64_t d) {
  double sum = 0;
  for (int64_t f = 0; f < d; ++f) sum += (a[f] - b[f]) * (a[f] - b[f]);
  return sum;
}

void clustering(DType t, int64_t n, int64_t d, int64_t k, CpuPath path, bool medoids) {
  const std::string what = "cluster, dtype " + std::to_string(int(t)) + ", path " + std::to_string(int(path)) +
                           (medoids ? ", medoids, " : ", ") + std::to_string(n) + " tokens";
  const DType acc = t == DType::Float64 ? t : DType::Float32;
  const double tolerance = item(t) == 2 ? 1e-2 : 1e-5;
  const Data x = random(n * d, t), weights = random(n, acc, 1, 3);
  std::vector<int64_t> start(k), label(n), medoid(k);
  for (int64_t j = 0; j < k; ++j) start[j] = (2 * j + 1) * n / (2 * k);
  std::vector<unsigned char> centers(k * d * item(t)), mass(k * item(acc)), inertia(item(acc));
  double before = 0;
  for (int64_t iterations : {1, 5}) {
    ClusterArgs a{};
    a.dtype = t, a.images = 1, a.tokens = n, a.features = d, a.clusters = k, a.iterations = iterations;
    a.x = x.bytes.data(), a.x_image_stride = n * d, a.x_token_stride = d, a.weights = weights.bytes.data();
    a.init_index = start.data(), a.medoids = medoids, a.path = int(path), a.threads = 1, a.parallel_for = serial;
    a.centers = centers.data(), a.assignment = label.data(), a.mass = mass.data(), a.inertia = inertia.data();
    a.medoid_index = medoid.data();
    kernels().cluster(a);
    std::vector<double> sum(k * d), total(k);
    double loss = 0;
    for (int64_t i = 0; i < n; ++i) {
      expect(label[i] >= 0 && label[i] < k, what + ": range");
      total[label[i]] += weights.value[i];
      for (int64_t f = 0; f < d; ++f) sum[label[i] * d + f] += weights.value[i] * x.value[i * d + f];
      if (iterations > 1) continue;  // the first: nearest start, ties to the lowest
      int64_t nearest = 0;
      for (int64_t j = 1; j < k; ++j)
        if (distance(&x.value[i * d], &x.value[start[j] * d], d) <
            distance(&x.value[i * d], &x.value[start[nearest] * d], d))
          nearest = j;
      expect(label[i] == nearest, what + ": nearest start");
    }
    const std::vector<double> c = read(centers, t), m = read(mass, acc);
    for (int64_t j = 0; j < k; ++j) {
      expect(m[j] == total[j], what + ": mass");
      expect(medoid[j] >= 0 && medoid[j] < n && label[medoid[j]] == j, what + ": medoid is a member");
      for (int64_t f = 0; f < d; ++f)
        expect(close(c[j * d + f], medoids ? x.value[medoid[j] * d + f] : sum[j * d + f] / total[j], tolerance),
               what + ": center");
    }
    for (int64_t i = 0; i < n; ++i)
      for (int64_t f = 0, j = label[i]; f < d; ++f) {
        const double to = medoids ? x.value[medoid[j] * d + f] : sum[j * d + f] / total[j];
        loss += weights.value[i] * (x.value[i * d + f] - to) * (x.value[i * d + f] - to);
      }
    const double got = read(inertia, acc)[0];
    expect(close(got, loss, 1e-4), what + ": inertia");
    expect(iterations == 1 || got <= before * 1.00001, what + ": inertia rose");
    before = got;
  }
}

void assigning(DType t, int64_t n, int64_t d, int64_t k) {
  const DType acc = t == DType::Float64 ? t : DType::Float32;
  const Data x = random(n * d, t), centers = random(k * d, acc);
  std::vector<int64_t> label(n);
  AssignArgs a{};
  a.dtype = t, a.images = 1, a.tokens = n, a.features = d, a.clusters = k, a.x = x.bytes.data();
  a.x_image_stride = n * d, a.x_token_stride = d, a.centers = centers.bytes.data(), a.threads = 1;
  a.parallel_for = serial, a.assignment = label.data();
  kernels().assign(a);
  for (int64_t i = 0; i < n; ++i) {
    int64_t nearest = 0;
    for (int64_t j = 1; j < k; ++j)
      if (distance(&x.value[i * d], &centers.value[j * d], d) <
          distance(&x.value[i * d], &centers.value[nearest * d], d))
        nearest = j;
    expect(label[i] == nearest, "assign");
  }
}

void pooling(DType t, int64_t n, int64_t d, int64_t k) {
  const DType acc = t == DType::Float64 ? t : DType::Float32;
  const double tolerance = item(t) == 2 ? 1e-2 : 1e-5;
  const Data x = random(n * d, t), grad = random(k * d, t);
  std::vector<int64_t> label(n);
  for (int64_t i = 0; i < n; ++i) label[i] = i < k ? i : int64_t(integer(-1, int(k) - 1));
  std::vector<unsigned char> centers(k * d * item(t)), mass(k * item(acc)), back(n * d * item(t));
  PoolArgs a{};
  a.dtype = t, a.images = 1, a.tokens = n, a.features = d, a.clusters = k, a.x = x.bytes.data();
  a.x_image_stride = n * d, a.x_token_stride = d, a.assignment = label.data(), a.threads = 1;
  a.parallel_for = serial, a.centers = centers.data(), a.mass = mass.data();
  kernels().pool(a);
  std::vector<double> sum(k * d), total(k);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t f = 0; f < d && label[i] >= 0; ++f)
      sum[label[i] * d + f] += x.value[i * d + f], total[label[i]] += f == 0;
  const std::vector<double> c = read(centers, t);
  for (int64_t e = 0; e < k * d; ++e) expect(close(c[e], sum[e] / total[e / d], tolerance), "pool");
  a.centers_image_stride = a.grad_image_stride = k * d, a.centers_row_stride = a.grad_row_stride = d;
  a.grad_x = back.data(), a.grad_centers = grad.bytes.data();
  kernels().unpool(a);
  std::vector<double> got = read(back, t);
  for (int64_t e = 0; e < n * d; ++e) expect(got[e] == (label[e / d] < 0 ? 0 : c[label[e / d] * d + e % d]), "unpool");
  kernels().pool_backward(a);
  got = read(back, t);
  for (int64_t e = 0; e < n * d; ++e) {
    const int64_t j = label[e / d];
    expect(close(got[e], j < 0 ? 0 : grad.value[j * d + e % d] / total[j], tolerance), "pool_backward");
  }
}

void attention(DType t, int64_t n, int64_t d) {
  const DType acc = t == DType::Float64 ? t : DType::Float32;
  const Data q = random(2 * n * d, t, -2, 2), k = random(2 * n * d, t, -2, 2);
  std::vector<unsigned char> partial(2 * n * item(acc)), received(n * item(acc));
  AttentionArgs a{};
  a.dtype = t, a.images = 1, a.heads = 2, a.queries = n, a.keys = n, a.width = d, a.q = q.bytes.data();
  a.k = k.bytes.data(), a.scale = 1 / std::sqrt(double(d)), a.threads = 1, a.parallel_for = serial;
  a.partial = partial.data(), a.received = received.data();
  for (int64_t* strides : {a.q_strides, a.k_strides}) strides[0] = 2 * n * d, strides[1] = n * d, strides[2] = d;
  kernels().attention_received(a);
  std::vector<double> want(n), row(n);
  for (int64_t i = 0; i < 2 * n; ++i) {
    double all = 0;
    for (int64_t j = 0; j < n; ++j) {
      double dot = 0;
      for (int64_t f = 0; f < d; ++f) dot += q.value[i * d + f] * k.value[(i / n * n + j) * d + f];
      all += row[j] = std::exp(dot * a.scale);
    }
    for (int64_t j = 0; j < n; ++j) want[j] += row[j] / all / double(2 * n);
  }
  const std::vector<double> got = read(received, acc);
  for (int64_t j = 0; j < n; ++j)
    expect(std::abs(got[j] - want[j]) <= 1e-5 * want[j] + 1e-9, "attention_received: " + std::to_string(got[j]));
}
}  // namespace

int main() {
  for (DType t : {DType::Float32, DType::Float64, DType::BFloat16, DType::Float16}) {
    for (int64_t n : {20, 197}) {
      for (CpuPath path : {CpuPath::kGram, CpuPath::kDirect, CpuPath::kGrouped})
        for (bool medoids : {false, true}) clustering(t, n, 37, n / 3, path, medoids);
      assigning(t, n, 37, 50);
      pooling(t, n, 37, 9);
      attention(t, n, 24);
    }
  }
  std::printf("%s kernels: %d values right\n", kernels().name, checks);
}
