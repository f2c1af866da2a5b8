// Schemas of torch.ops.tokenpool_ext.* and their CPU implementations, on torch's stable ABI (one binary for every torch
// from 2.11 on). Arguments were validated in Python (functional.py); here only what memory safety needs is checked
// again.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/macros/Macros.h>

#include <cstdlib>
#include <exception>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>

#include "cpu/api.h"
#include "host_checks.h"
#include "tensors.h"

namespace tokenpool {
namespace {

DType dtype_of(const Tensor& x, const char* op) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return DType::Float32;
    case ScalarType::Double:
      return DType::Float64;
    case ScalarType::BFloat16:
      return DType::BFloat16;
    case ScalarType::Half:
      return DType::Float16;
    default:
      STD_TORCH_CHECK(false, op, ": tokens must be float32, float64, bfloat16 or float16");
  }
  return DType::Float32;
}

ScalarType acc_of(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The tensor with features side by side (batch and token strides are free).
Tensor feature_rows(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  if (t.size(last) <= 1 || t.stride(last) == 1) return t;
  return side_by_side(t);
}

void run_parallel(int64_t count, Body body, void* context) {
  std::mutex lock;
  std::exception_ptr failure;  // the first: torch would only say that parallel_for failed
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    try {
      body(begin, end, context);
    } catch (...) {
      const std::lock_guard<std::mutex> guard(lock);
      if (!failure) failure = std::current_exception();
    }
  });
  if (failure) std::rethrow_exception(failure);
}

int num_threads() {
  return static_cast<int>(torch::stable::get_num_threads());
}

Tensor new_output(const Tensor& like, int64_t images, int64_t rows, int64_t features) {
  Tensor out = new_tensor(like, {images, rows, features});
  prefer_large_pages(out.data_ptr(), out.numel() * static_cast<int64_t>(out.element_size()));
  return out;
}

using Clusters = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;  // centers, assignment, mass, medoids, inertia

Clusters run_cluster(const char* op, bool medoids, const Tensor& tokens, const std::optional<Tensor>& weights,
                     const std::optional<Tensor>& mask, const std::optional<Tensor>& counts, const Tensor& start,
                     int64_t num_clusters, int64_t num_iters, bool sort) {
  STD_TORCH_CHECK(tokens.is_cpu() && tokens.dim() == 3, op, ": x must be a CPU tensor of shape (B, N, D)");
  const int64_t B = tokens.size(0), N = tokens.size(1), D = tokens.size(2), K = num_clusters;
  STD_TORCH_CHECK(N < (int64_t(1) << 31) && K < (int64_t(1) << 31), op, ": more than 2^31 tokens or clusters an image");
  const ScalarType acc = acc_of(tokens);
  const auto [by_index, farthest] =
      check_clustering(tokens, weights, mask, counts, start, K, num_iters, medoids, acc, op);
  const Tensor x = feature_rows(tokens), init = dense(start);
  const auto weights_dense = dense(weights), mask_dense = dense(mask), counts_dense = dense(counts);

  Tensor centers = new_output(x, B, K, D);
  Tensor assignment = new_tensor(x, {B, N}, ScalarType::Long);
  Tensor mass = new_tensor(x, {B, K}, acc);
  Tensor medoid_index = new_tensor(x, {B, K}, ScalarType::Long);
  Tensor inertia = new_tensor(x, {B}, acc);

  ClusterArgs a{};
  a.dtype = dtype_of(x, op);
  a.images = B;
  a.tokens = N;
  a.features = D;
  a.clusters = K;
  a.iterations = num_iters;
  a.x = x.data_ptr();
  a.x_image_stride = x.stride(0);
  a.x_token_stride = x.stride(1);
  a.weights = pointer<void>(weights_dense);
  a.mask = pointer<bool>(mask_dense);
  a.counts = pointer<int64_t>(counts_dense);
  a.init_index = by_index && !farthest ? static_cast<const int64_t*>(init.data_ptr()) : nullptr;
  a.init_centers = by_index ? nullptr : init.data_ptr();
  a.medoids = medoids;
  a.sort = sort;
  a.path = forced_path("TOKENPOOL_EXT_CPU_PATH", kCpuPaths);
  a.threads = num_threads();
  a.parallel_for = run_parallel;
  a.centers = centers.data_ptr();
  a.assignment = static_cast<int64_t*>(assignment.data_ptr());
  a.mass = mass.data_ptr();
  a.medoid_index = static_cast<int64_t*>(medoid_index.data_ptr());
  a.inertia = inertia.data_ptr();
  if (B > 0) kernels().cluster(a);
  return {centers, assignment, mass, medoid_index, inertia};
}

Clusters kmeans_cpu(Tensor x, std::optional<Tensor> weights, std::optional<Tensor> mask, std::optional<Tensor> counts,
                    Tensor init, int64_t num_clusters, int64_t num_iters, bool sort) {
  return run_cluster("kmeans", false, x, weights, mask, counts, init, num_clusters, num_iters, sort);
}

Clusters kmedoids_cpu(Tensor x, std::optional<Tensor> weights, std::optional<Tensor> mask, std::optional<Tensor> counts,
                      Tensor init, int64_t num_clusters, int64_t num_iters, bool sort) {
  return run_cluster("kmedoids", true, x, weights, mask, counts, init, num_clusters, num_iters, sort);
}

Tensor assign_cpu(Tensor tokens, Tensor given, std::optional<Tensor> mask) {
  const char* op = "assign";
  STD_TORCH_CHECK(tokens.is_cpu() && tokens.dim() == 3 && given.dim() == 3, op,
                  ": x must be a CPU tensor of shape (B, N, D), centers of shape (B, K, D)");
  const int64_t B = tokens.size(0), N = tokens.size(1), D = tokens.size(2), K = given.size(1);
  STD_TORCH_CHECK(K >= 1 && N < (int64_t(1) << 31) && K < (int64_t(1) << 31), op,
                  ": no center, or more than 2^31 tokens or clusters an image");
  check(given, tokens, {B, K, D}, acc_of(tokens), op, "centers");
  if (mask) check(*mask, tokens, {B, N}, ScalarType::Bool, op, "mask");
  const Tensor x = feature_rows(tokens), centers = dense(given);
  const auto mask_dense = dense(mask);
  Tensor assignment = new_tensor(x, {B, N}, ScalarType::Long);
  AssignArgs a{};
  a.dtype = dtype_of(x, op);
  a.images = B;
  a.tokens = N;
  a.features = D;
  a.clusters = K;
  a.x = x.data_ptr();
  a.x_image_stride = x.stride(0);
  a.x_token_stride = x.stride(1);
  a.centers = centers.data_ptr();
  a.mask = pointer<bool>(mask_dense);
  a.threads = num_threads();
  a.parallel_for = run_parallel;
  a.assignment = static_cast<int64_t*>(assignment.data_ptr());
  if (B > 0) kernels().assign(a);
  return assignment;
}

PoolArgs pool_args(const Tensor& x, const Tensor& assignment, const std::optional<Tensor>& weights, int64_t clusters,
                   const char* op) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 3, op, ": x must be a CPU tensor of shape (B, N, D)");
  STD_TORCH_CHECK(clusters >= 0 && x.size(1) < (int64_t(1) << 31) && clusters < (int64_t(1) << 31), op,
                  ": more than 2^31 tokens or clusters an image");
  check_members(x, assignment, weights, acc_of(x), op);
  PoolArgs a{};
  a.dtype = dtype_of(x, op);
  a.images = x.size(0);
  a.tokens = x.size(1);
  a.features = x.size(2);
  a.clusters = clusters;
  a.x = x.data_ptr();
  a.x_image_stride = x.stride(0);
  a.x_token_stride = x.stride(1);
  a.assignment = static_cast<const int64_t*>(assignment.data_ptr());
  a.weights = pointer<void>(weights);
  a.threads = num_threads();
  a.parallel_for = run_parallel;
  return a;
}

std::tuple<Tensor, Tensor> pool_cpu(Tensor tokens, Tensor labels, std::optional<Tensor> weights, int64_t num_clusters) {
  const Tensor x = feature_rows(tokens), assignment = dense(labels);
  const auto weights_dense = dense(weights);
  PoolArgs a = pool_args(x, assignment, weights_dense, num_clusters, "pool");
  Tensor centers = new_output(x, a.images, num_clusters, a.features);
  Tensor mass = new_tensor(x, {a.images, num_clusters}, acc_of(x));
  a.centers = centers.data_ptr();
  a.mass = mass.data_ptr();
  if (a.images > 0) kernels().pool(a);
  return {centers, mass};
}

std::tuple<Tensor, Tensor> pool_backward_cpu(Tensor grad, Tensor tokens, Tensor means, Tensor labels,
                                             std::optional<Tensor> weights, Tensor masses) {
  const char* op = "pool_backward";
  const Tensor x = feature_rows(tokens), assignment = dense(labels), centers = feature_rows(means),
               grad_centers = feature_rows(grad), mass = dense(masses);
  const auto weights_dense = dense(weights);
  const int64_t K = centers.dim() == 3 ? centers.size(1) : 0;
  PoolArgs a = pool_args(x, assignment, weights_dense, K, op);
  check_pool_backward(x, centers, grad_centers, mass, K, acc_of(x), op);
  Tensor grad_x = new_output(x, a.images, a.tokens, a.features);
  Tensor grad_weights = weights_dense ? new_tensor(x, {a.images, a.tokens}, acc_of(x))
                                      : filled(new_tensor(x, {a.images, a.tokens}, acc_of(x)), 0);
  a.centers = centers.data_ptr();
  a.centers_image_stride = centers.stride(0);
  a.centers_row_stride = centers.stride(1);
  a.mass = mass.data_ptr();
  a.grad_centers = grad_centers.data_ptr();
  a.grad_image_stride = grad_centers.stride(0);
  a.grad_row_stride = grad_centers.stride(1);
  a.grad_x = grad_x.data_ptr();
  a.grad_weights = weights_dense ? grad_weights.data_ptr() : nullptr;
  if (a.images > 0) kernels().pool_backward(a);
  return {grad_x, grad_weights};
}

Tensor unpool_cpu(Tensor means, Tensor labels) {
  const char* op = "unpool";
  STD_TORCH_CHECK(means.is_cpu() && means.dim() == 3 && labels.dim() == 2, op,
                  ": centers must be a CPU tensor of shape (B, K, D), assignment of shape (B, N)");
  const Tensor centers = feature_rows(means), assignment = dense(labels);
  const int64_t B = centers.size(0), N = assignment.size(1), D = centers.size(2);
  check(assignment, centers, {B, N}, ScalarType::Long, op, "assignment");
  Tensor out = new_output(centers, B, N, D);
  PoolArgs a{};
  a.dtype = dtype_of(centers, op);
  a.images = B;
  a.tokens = N;
  a.features = D;
  a.clusters = centers.size(1);
  a.assignment = static_cast<const int64_t*>(assignment.data_ptr());
  a.threads = num_threads();
  a.parallel_for = run_parallel;
  a.centers = centers.data_ptr();
  a.centers_image_stride = centers.stride(0);
  a.centers_row_stride = centers.stride(1);
  a.grad_x = out.data_ptr();
  if (B > 0) kernels().unpool(a);
  return out;
}

Tensor unpool_backward_cpu(Tensor grad, Tensor labels, int64_t num_clusters) {
  const Tensor g = feature_rows(grad), assignment = dense(labels);
  PoolArgs a = pool_args(g, assignment, std::nullopt, num_clusters, "unpool_backward");
  Tensor out = new_output(g, a.images, num_clusters, a.features);
  a.plain_sum = true;
  a.centers = out.data_ptr();
  if (a.images > 0) kernels().pool(a);
  return out;
}

Tensor attention_received_cpu(Tensor queries, Tensor keys, double scale, std::optional<Tensor> lse) {
  const char* op = "attention_received";
  STD_TORCH_CHECK(queries.is_cpu() && queries.dim() == 4 && keys.dim() == 4, op,
                  ": q and k must be CPU tensors of shape (B, H, N, d)");
  const Tensor q = feature_rows(queries), k = feature_rows(keys);
  check(k, q, {q.size(0), q.size(1), k.size(2), q.size(3)}, q.scalar_type(), op, "k");
  if (lse) check(*lse, q, {q.size(0), q.size(1), q.size(2)}, acc_of(q), op, "lse");
  const auto lse_dense = dense(lse);
  AttentionArgs a{};
  a.dtype = dtype_of(q, op);
  a.images = q.size(0);
  a.heads = q.size(1);
  a.queries = q.size(2);
  a.keys = k.size(2);
  a.width = q.size(3);
  a.q = q.data_ptr();
  a.k = k.data_ptr();
  for (int axis = 0; axis < 3; ++axis) {
    a.q_strides[axis] = q.stride(axis);
    a.k_strides[axis] = k.stride(axis);
  }
  a.lse = pointer<void>(lse_dense);
  a.scale = scale;
  a.threads = num_threads();
  a.parallel_for = run_parallel;
  Tensor partial = new_tensor(q, {a.images, a.heads, a.keys}, acc_of(q));
  Tensor received = new_tensor(q, {a.images, a.keys}, acc_of(q));
  a.partial = partial.data_ptr();
  a.received = received.data_ptr();
  if (a.images > 0 && a.keys > 0) kernels().attention_received(a);
  return received;
}

}  // namespace
}  // namespace tokenpool

STABLE_TORCH_LIBRARY(tokenpool_ext, m) {
  for (const char* name : {"kmeans", "kmedoids"})
    m.def((name + std::string("(Tensor x, Tensor? weights, Tensor? mask, Tensor? counts, Tensor init, SymInt "
                              "num_clusters, int num_iters, bool sort) -> (Tensor centers, Tensor assignment, Tensor "
                              "mass, Tensor medoids, Tensor inertia)"))
              .c_str());
  m.def("assign(Tensor x, Tensor centers, Tensor? mask) -> Tensor");
  m.def("pool(Tensor x, Tensor assignment, Tensor? weights, SymInt num_clusters) -> (Tensor centers, Tensor mass)");
  m.def(
      "pool_backward(Tensor grad_centers, Tensor x, Tensor centers, Tensor assignment, Tensor? weights, Tensor mass)"
      " -> (Tensor grad_x, Tensor grad_weights)");
  m.def("unpool(Tensor centers, Tensor assignment) -> Tensor");
  m.def("unpool_backward(Tensor grad, Tensor assignment, SymInt num_clusters) -> Tensor");
  m.def("attention_received(Tensor q, Tensor k, float scale, Tensor? lse) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(tokenpool_ext, CPU, m) {
  m.impl("kmeans", TORCH_BOX(&tokenpool::kmeans_cpu));
  m.impl("kmedoids", TORCH_BOX(&tokenpool::kmedoids_cpu));
  m.impl("assign", TORCH_BOX(&tokenpool::assign_cpu));
  m.impl("pool", TORCH_BOX(&tokenpool::pool_cpu));
  m.impl("pool_backward", TORCH_BOX(&tokenpool::pool_backward_cpu));
  m.impl("unpool", TORCH_BOX(&tokenpool::unpool_cpu));
  m.impl("unpool_backward", TORCH_BOX(&tokenpool::unpool_backward_cpu));
  m.impl("attention_received", TORCH_BOX(&tokenpool::attention_received_cpu));
}
