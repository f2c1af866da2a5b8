// The checks of arguments that both libraries make: what memory safety needs (functional.py has validated the rest). A
// failed one throws, naming the op and the argument. `acc` is the dtype of statistics: float32, or float64 for float64.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <optional>
#include <string>

#include "tensors.h"

namespace tokenpool {

// On the device of `like`, of this shape and dtype.
inline void check(const Tensor& t, const Tensor& like, std::initializer_list<int64_t> shape, ScalarType type,
                  const char* op, const char* name) {
  STD_TORCH_CHECK(t.is_cuda() == like.is_cuda() && t.get_device_index() == like.get_device_index(), op, ": ", name,
                  " must be on the device of the first tensor");
  STD_TORCH_CHECK(t.scalar_type() == type, op, ": ", name, " has the wrong dtype");
  STD_TORCH_CHECK(t.dim() == static_cast<int64_t>(shape.size()), op, ": ", name, " must have ", shape.size(),
                  " dimensions, got ", t.dim());
  int64_t axis = 0;
  for (const int64_t size : shape) {
    STD_TORCH_CHECK(t.size(axis) == size, op, ": ", name, " must have size ", size, " along axis ", axis, ", got ",
                    t.size(axis));
    ++axis;
  }
}

// The index in `names` of the path that this environment variable asks for, or -1.
template <size_t N>
int forced_path(const char* variable, const char* const (&names)[N]) {
  const char* asked = std::getenv(variable);
  if (!asked || !*asked) return -1;
  std::string all;
  for (size_t i = 0; i < N; ++i) {
    if (std::string(asked) == names[i]) return static_cast<int>(i);
    all += (i ? ", " : "") + std::string(names[i]);
  }
  STD_TORCH_CHECK(false, variable, " must be one of ", all, ", got ", asked);
  return -1;
}

// x (B, N, D), assignment (B, N), weights (B, N): of pool and its relatives.
inline void check_members(const Tensor& x, const Tensor& assignment, const std::optional<Tensor>& weights,
                          ScalarType acc, const char* op) {
  check(assignment, x, {x.size(0), x.size(1)}, ScalarType::Long, op, "assignment");
  if (weights) check(*weights, x, {x.size(0), x.size(1)}, acc, op, "weights");
}

// What a clustering starts from: token indices (B, K), centers (B, K, D), or neither: (B, 0) indices.
struct Start {
  bool by_index, farthest;
};

// x (B, N, D), weights and mask (B, N), counts (B): of kmeans and kmedoids.
inline Start check_clustering(const Tensor& x, const std::optional<Tensor>& weights, const std::optional<Tensor>& mask,
                              const std::optional<Tensor>& counts, const Tensor& init, int64_t num_clusters,
                              int64_t num_iters, bool medoids, ScalarType acc, const char* op) {
  const int64_t b = x.size(0), n = x.size(1), d = x.size(2), k = num_clusters;
  STD_TORCH_CHECK(k >= 1 && num_iters >= 1, op, ": num_clusters and num_iters must be at least 1, got ", k, " and ",
                  num_iters);
  if (weights) check(*weights, x, {b, n}, acc, op, "weights");
  if (mask) check(*mask, x, {b, n}, ScalarType::Bool, op, "mask");
  if (counts) check(*counts, x, {b}, ScalarType::Long, op, "counts");
  const bool by_index = init.scalar_type() == ScalarType::Long;
  const bool farthest = by_index && init.dim() == 2 && init.size(1) == 0;
  STD_TORCH_CHECK(by_index || !medoids, op, ": init must be token indices");
  if (by_index)
    check(init, x, {b, farthest ? 0 : k}, ScalarType::Long, op, "init");
  else
    check(init, x, {b, k, d}, acc, op, "init");
  return {by_index, farthest};
}

// centers and their gradient (B, K, D), mass (B, K), after check_members: of pool_backward.
inline void check_pool_backward(const Tensor& x, const Tensor& centers, const Tensor& grad_centers, const Tensor& mass,
                                int64_t k, ScalarType acc, const char* op) {
  const int64_t b = x.size(0), d = x.size(2);
  check(centers, x, {b, k, d}, x.scalar_type(), op, "centers");
  check(grad_centers, x, {b, k, d}, x.scalar_type(), op, "grad_centers");
  check(mass, x, {b, k}, acc, op, "mass");
}

}  // namespace tokenpool
