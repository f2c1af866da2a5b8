// CUDA implementations of torch.ops.tokenpool_ext.* on torch's stable ABI. Plain C++: compiled once, whatever the
// architectures. The schemas live in csrc/ops.cpp (library _ops), which must be loaded first.
//
// Nothing here synchronises with the host. Device properties are read once per device.
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <cstdlib>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../host_checks.h"
#include "../tensors.h"
#include "pipeline.h"
#include "workspace.h"

namespace tokenpool {
namespace cuda {
namespace {

struct Device {
  int major = 0;
  int minor = 0;
  int sm_count = 0;
  size_t shared_limit = 0;
};

const Device& device_properties(int index) {
  static std::mutex mutex;
  static std::vector<std::optional<Device>> known;
  const std::lock_guard<std::mutex> lock(mutex);
  if (static_cast<int>(known.size()) <= index) known.resize(index + 1);
  if (!known[index]) {
    const auto read = [&](cudaDeviceAttr attribute) {
      int value = 0;
      const cudaError_t status = cudaDeviceGetAttribute(&value, attribute, index);
      STD_TORCH_CHECK(status == cudaSuccess, "tokenpool_ext: cudaDeviceGetAttribute: ", cudaGetErrorString(status));
      return value;
    };
    known[index] = Device{read(cudaDevAttrComputeCapabilityMajor), read(cudaDevAttrComputeCapabilityMinor),
                          read(cudaDevAttrMultiProcessorCount),
                          static_cast<size_t>(read(cudaDevAttrMaxSharedMemoryPerBlockOptin))};
  }
  return *known[index];
}

// Makes the tensor's device current, and knows its current stream.
struct OnDevice {
  torch::stable::accelerator::DeviceGuard guard;
  int index;
  void* stream = nullptr;

  explicit OnDevice(const Tensor& t) : guard(t.get_device_index()), index(t.get_device_index()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(index, &stream) == 0,
                    "tokenpool_ext: torch did not give the current CUDA stream");
    // This library has a CUDA runtime of its own; make sure that it sees the same device.
    int current = -1;
    if (cudaGetDevice(&current) != cudaSuccess || current != index) {
      const cudaError_t status = cudaSetDevice(index);
      STD_TORCH_CHECK(status == cudaSuccess, "tokenpool_ext: cudaSetDevice: ", cudaGetErrorString(status));
    }
  }
};

void check_launch(int status, const char* op) {
  STD_TORCH_CHECK(status == 0, op, ": a CUDA launch failed: ", cudaGetErrorString(static_cast<cudaError_t>(status)));
}

DType dtype_of(const Tensor& x, const char* op) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      STD_TORCH_CHECK(false, op,
                      ": the CUDA kernels take float32, float16 or bfloat16; use backend=\"reference\" for float64");
  }
  return DType::kFloat32;
}

int to_int(int64_t value, const char* op, const char* name) {
  STD_TORCH_CHECK(value >= 0 && value < (int64_t{1} << 30), op, ": ", name, " must be below 2^30, got ", value);
  return static_cast<int>(value);
}

void check_tokens(const Tensor& t, int64_t dims, const char* op, const char* name) {
  STD_TORCH_CHECK(t.is_cuda() && t.dim() == dims, op, ": ", name, " must be a CUDA tensor with ", dims,
                  " dimensions, got ", t.dim());
}

// Strides of (batch, token, feature) and whether rows may be read 16 bytes at a time.
Tokens tokens_of(const Tensor& t) {
  const int64_t vector = t.scalar_type() == ScalarType::Float ? 4 : 8;
  const void* data = t.data_ptr();
  const bool aligned = t.stride(2) == 1 && t.stride(1) % vector == 0 && t.stride(0) % vector == 0 &&
                       reinterpret_cast<uintptr_t>(data) % 16 == 0;
  return Tokens{data, t.stride(0), t.stride(1), t.stride(2), aligned ? 1 : 0};
}

template <typename T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

// Memory of torch's caching allocator: freed in stream order, and captured by CUDA graphs.
Tensor workspace(const Tensor& like, size_t bytes) {
  return new_tensor(like, {static_cast<int64_t>(bytes) + 1}, ScalarType::Byte);
}

using Clusters = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;  // centers, assignment, mass, medoids, inertia

Clusters run_cluster(const char* op, bool with_medoids, const Tensor& x, const std::optional<Tensor>& weights,
                     const std::optional<Tensor>& mask, const std::optional<Tensor>& counts, const Tensor& start,
                     int64_t num_clusters, int64_t num_iters, bool sort) {
  check_tokens(x, 3, op, "x");
  const int64_t b = x.size(0), n = x.size(1), d = x.size(2), k = num_clusters;
  CudaProblem problem;
  problem.batch = b;
  problem.tokens = to_int(n, op, "the number of tokens");
  problem.features = to_int(d, op, "the number of features");
  problem.clusters = to_int(k, op, "num_clusters");
  problem.iterations = to_int(num_iters, op, "num_iters");
  problem.dtype = dtype_of(x, op);
  problem.with_medoids = with_medoids;
  problem.per_image_k = counts.has_value();
  const auto [by_index, farthest] =
      check_clustering(x, weights, mask, counts, start, k, num_iters, with_medoids, ScalarType::Float, op);
  problem.init_is_centers = !by_index;
  problem.farthest = farthest;

  const OnDevice device(x);
  const bool rows = by_index && !farthest && (k == 1 || start.stride(1) == 1);  // a row may be that of all images
  const Tensor init = rows ? start : dense(start);
  const auto weights_dense = dense(weights), mask_dense = dense(mask), counts_dense = dense(counts);
  const Tensor centers = new_tensor(x, {b, k, d});
  const Tensor assignment = new_tensor(x, {b, n}, ScalarType::Long);
  const Tensor mass = new_tensor(x, {b, k}, ScalarType::Float);
  const Tensor medoids = new_tensor(x, {b, k}, ScalarType::Long);
  const Tensor inertia = new_tensor(x, {b}, ScalarType::Float);
  if (b == 0 || n == 0)
    return {filled(centers, 0), assignment, filled(mass, 0), filled(medoids, -1), filled(inertia, 0)};

  const Device& properties = device_properties(device.index);
  problem.major = properties.major;
  problem.minor = properties.minor;
  problem.sm_count = properties.sm_count;
  problem.shared_limit = properties.shared_limit;
  problem.force_path = forced_path("TOKENPOOL_EXT_CUDA_PATH", kCudaPaths);
  const CudaPlan plan = plan_cuda(problem);
  ClusterCall call{};
  call.shape = Shape{b, problem.tokens, problem.features, problem.clusters};
  call.dtype = problem.dtype;
  call.x = tokens_of(x);
  call.weights = pointer<float>(weights_dense);
  call.mask = pointer<uint8_t>(mask_dense);
  call.counts = pointer<int64_t>(counts_dense);
  call.init = by_index && !farthest ? data<int64_t>(init) : nullptr;
  call.init_stride = init.stride(0);
  call.init_centers = by_index ? nullptr : data<float>(init);
  call.iterations = problem.iterations;
  call.sort = sort ? 1 : 0;
  call.centers = centers.data_ptr();
  call.assignment = data<int64_t>(assignment);
  call.mass = data<float>(mass);
  call.medoids = with_medoids ? data<int64_t>(medoids) : nullptr;
  call.nearest = with_medoids ? nullptr : data<int64_t>(medoids);
  call.inertia = data<float>(inertia);
  const Tensor memory = workspace(x, plan.workspace_bytes);
  check_launch(run_clustering(plan, problem, call, memory.data_ptr(), device.stream), op);
  return {centers, assignment, mass, medoids, inertia};
}

Clusters kmeans(Tensor x, std::optional<Tensor> weights, std::optional<Tensor> mask, std::optional<Tensor> counts,
                Tensor init, int64_t num_clusters, int64_t num_iters, bool sort) {
  return run_cluster("kmeans", false, x, weights, mask, counts, init, num_clusters, num_iters, sort);
}

Clusters kmedoids(Tensor x, std::optional<Tensor> weights, std::optional<Tensor> mask, std::optional<Tensor> counts,
                  Tensor init, int64_t num_clusters, int64_t num_iters, bool sort) {
  return run_cluster("kmedoids", true, x, weights, mask, counts, init, num_clusters, num_iters, sort);
}

// Sums or means over the clusters of a given assignment; x is (B, N, D).
std::tuple<Tensor, Tensor> cluster_sums(const char* op, const Tensor& x, const Tensor& labels,
                                        const std::optional<Tensor>& weights, int64_t num_clusters, MeansMode mode) {
  check_tokens(x, 3, op, mode == MeansMode::kSum ? "grad" : "x");
  const int64_t b = x.size(0), n = x.size(1), d = x.size(2), k = num_clusters;
  STD_TORCH_CHECK(k >= 1, op, ": num_clusters must be at least 1, got ", k);
  check_members(x, labels, weights, ScalarType::Float, op);
  PoolCall call{};
  call.shape = Shape{b, to_int(n, op, "the number of tokens"), to_int(d, op, "the number of features"),
                     to_int(k, op, "num_clusters")};
  call.dtype = dtype_of(x, op);
  call.mode = mode;
  const OnDevice device(x);
  const Tensor assignment = dense(labels);
  const auto weights_dense = dense(weights);
  const Tensor centers = new_tensor(x, {b, k, d}), mass = new_tensor(x, {b, k}, ScalarType::Float);
  if (b == 0 || n == 0) return {filled(centers, 0), filled(mass, 0)};
  const size_t limit = device_properties(device.index).shared_limit;
  const Tensor memory = workspace(x, pool_workspace_bytes(call.shape, limit));
  call.x = tokens_of(x);
  call.assignment = data<int64_t>(assignment);
  call.weights = pointer<float>(weights_dense);
  call.centers = centers.data_ptr();
  call.mass = data<float>(mass);
  check_launch(run_pool(call, limit, memory.data_ptr(), device.stream), op);
  return {centers, mass};
}

std::tuple<Tensor, Tensor> pool(Tensor x, Tensor assignment, std::optional<Tensor> weights, int64_t num_clusters) {
  return cluster_sums("pool", x, assignment, weights, num_clusters, MeansMode::kMean);
}

Tensor unpool_backward(Tensor grad, Tensor assignment, int64_t num_clusters) {
  return std::get<0>(cluster_sums("unpool_backward", grad, assignment, std::nullopt, num_clusters, MeansMode::kSum));
}

std::tuple<Tensor, Tensor> pool_backward(Tensor grad_centers, Tensor x, Tensor centers, Tensor labels,
                                         std::optional<Tensor> weights, Tensor given_mass) {
  const char* op = "pool_backward";
  check_tokens(x, 3, op, "x");
  check_tokens(centers, 3, op, "centers");
  const int64_t b = x.size(0), n = x.size(1), d = x.size(2), k = centers.size(1);
  const DType dtype = dtype_of(x, op);
  check_members(x, labels, weights, ScalarType::Float, op);
  check_pool_backward(x, centers, grad_centers, given_mass, k, ScalarType::Float, op);
  const OnDevice device(x);
  const Tensor assignment = dense(labels), mass = dense(given_mass);
  const auto weights_dense = dense(weights);
  const Tensor grad_x = new_tensor(x, {b, n, d});
  const Tensor grad_weights = new_tensor(x, {b, n}, ScalarType::Float);
  if (b == 0 || n == 0) return {grad_x, grad_weights};
  const Tensor counts = new_tensor(x, {b, k}, ScalarType::Int);
  PoolBackwardArgs args{};
  args.shape = Shape{b, to_int(n, op, "the number of tokens"), to_int(d, op, "the number of features"),
                     to_int(k, op, "the number of clusters")};
  args.x = tokens_of(x);
  args.grad_centers = tokens_of(grad_centers);
  args.centers = tokens_of(centers);
  args.assignment = data<int64_t>(assignment);
  args.weights = pointer<float>(weights_dense);
  args.mass = data<float>(mass);
  args.grad_x = grad_x.data_ptr();
  args.grad_weights = data<float>(grad_weights);
  check_launch(run_pool_backward(dtype, args, data<int>(counts), device.stream), op);
  return {grad_x, grad_weights};
}

Tensor unpool(Tensor centers, Tensor labels) {
  const char* op = "unpool";
  check_tokens(centers, 3, op, "centers");
  STD_TORCH_CHECK(labels.dim() == 2, op, ": assignment must have 2 dimensions, got ", labels.dim());
  const int64_t b = centers.size(0), k = centers.size(1), d = centers.size(2), n = labels.size(1);
  const DType dtype = dtype_of(centers, op);
  check(labels, centers, {b, n}, ScalarType::Long, op, "assignment");
  const OnDevice device(centers);
  const Tensor assignment = dense(labels);
  const Tensor output = new_tensor(centers, {b, n, d});
  if (b == 0 || n == 0) return output;
  UnpoolArgs args{};
  args.shape = Shape{b, to_int(n, op, "the number of tokens"), to_int(d, op, "the number of features"),
                     to_int(k, op, "the number of clusters")};
  args.centers = tokens_of(centers);
  args.assignment = data<int64_t>(assignment);
  args.output = output.data_ptr();
  check_launch(run_unpool(dtype, args, device.stream), op);
  return output;
}

// A (B, H, tokens, d) tensor as Tokens of one head, and the head's stride.
Tokens heads_of(const Tensor& t, int64_t* stride_head) {
  const int64_t vector = t.scalar_type() == ScalarType::Float ? 4 : 8;
  const void* data = t.data_ptr();
  bool aligned = t.stride(3) == 1 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
  for (int64_t axis = 0; axis < 3; ++axis) aligned = aligned && t.stride(axis) % vector == 0;
  *stride_head = t.stride(1);
  return Tokens{data, t.stride(0), t.stride(2), t.stride(3), aligned ? 1 : 0};
}

Tensor attention_received(Tensor q, Tensor k, double scale, std::optional<Tensor> lse) {
  const char* op = "attention_received";
  check_tokens(q, 4, op, "q");
  check_tokens(k, 4, op, "k");
  const int64_t b = q.size(0), h = q.size(1), queries = q.size(2), keys = k.size(2), d = q.size(3);
  const DType dtype = dtype_of(q, op);
  check(k, q, {b, h, keys, d}, q.scalar_type(), op, "k");
  if (lse) check(*lse, q, {b, h, queries}, ScalarType::Float, op, "lse");
  const OnDevice device(q);
  const Tensor received = new_tensor(q, {b, keys}, ScalarType::Float);
  if (b == 0 || h == 0 || queries == 0 || keys == 0) return filled(received, 0);
  const auto lse_dense = dense(lse);
  AttentionArgs args{};
  args.batch = b;
  args.heads = to_int(h, op, "the number of heads");
  args.queries = to_int(queries, op, "the number of queries");
  args.keys = to_int(keys, op, "the number of keys");
  args.features = to_int(d, op, "the number of features");
  args.q = heads_of(q, &args.q_stride_head);
  args.k = heads_of(k, &args.k_stride_head);
  args.scale = static_cast<float>(scale);
  args.lse = pointer<float>(lse_dense);
  args.received = data<float>(received);
  const Tensor memory = workspace(q, attention_workspace_bytes(args));
  check_launch(run_attention_received(dtype, args, memory.data_ptr(), device.stream), op);
  return received;
}

}  // namespace
}  // namespace cuda
}  // namespace tokenpool

STABLE_TORCH_LIBRARY_IMPL(tokenpool_ext, CUDA, m) {
  m.impl("kmeans", TORCH_BOX(&tokenpool::cuda::kmeans));
  m.impl("kmedoids", TORCH_BOX(&tokenpool::cuda::kmedoids));
  m.impl("pool", TORCH_BOX(&tokenpool::cuda::pool));
  m.impl("pool_backward", TORCH_BOX(&tokenpool::cuda::pool_backward));
  m.impl("unpool", TORCH_BOX(&tokenpool::cuda::unpool));
  m.impl("unpool_backward", TORCH_BOX(&tokenpool::cuda::unpool_backward));
  m.impl("attention_received", TORCH_BOX(&tokenpool::cuda::attention_received));
}
