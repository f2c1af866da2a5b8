// Copies and gradients around a given assignment: unpool, the gradient of pool. One warp per token.
#pragma once

#include "args_pool.h"
#include "common.cuh"

namespace tokenpool {
namespace cuda {

// output[b, i] = centers[b, a_i], zeros where the label is outside [0, K). T is any type of the right size.
template <typename T>
__global__ void __launch_bounds__(256) unpool_kernel(UnpoolArgs a) {
  const int n = a.shape.tokens, k = a.shape.clusters, features = a.shape.features;
  const int64_t work_items = a.shape.batch * n;
  const int64_t step = static_cast<int64_t>(gridDim.x) * warps_in_block();
  for (int64_t work = static_cast<int64_t>(blockIdx.x) * warps_in_block() + warp_index(); work < work_items;
       work += step) {
    const int64_t j = a.assignment[work];
    const T* row =
        static_cast<const T*>(a.centers.data) + work / n * a.centers.stride_batch + j * a.centers.stride_token;
    T* out = static_cast<T*>(a.output) + work * features;
    const bool inside = j >= 0 && j < k;
    for (int f = lane_index(); f < features; f += kWarp) out[f] = inside ? row[f * a.centers.stride_feature] : T{};
  }
}

// Members of each cluster, one block per image.
__global__ void __launch_bounds__(256) count_kernel(CountArgs a) {
  const int n = a.shape.tokens, k = a.shape.clusters;
  for (int64_t b = blockIdx.x; b < a.shape.batch; b += gridDim.x) {
    int* counts = a.counts + b * k;
    for (int j = threadIdx.x; j < k; j += blockDim.x) counts[j] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
      const int64_t j = a.assignment[b * n + i];
      if (j >= 0 && j < k) atomicAdd(&counts[j], 1);
    }
    __syncthreads();
  }
}

// Contract section 6: grad_x_i = (w_i / W) g_{a_i} (1 / count where W is 0), grad_w_i = (x_i - c_{a_i}) . g_{a_i} / W.
// Without weights there is no gradient for them: zeros, and x and the centers are not read.
template <typename T>
__global__ void __launch_bounds__(256) pool_backward_kernel(PoolBackwardArgs a) {
  const int n = a.shape.tokens, k = a.shape.clusters, features = a.shape.features;
  const int64_t work_items = a.shape.batch * n;
  const int64_t step = static_cast<int64_t>(gridDim.x) * warps_in_block();
  for (int64_t work = static_cast<int64_t>(blockIdx.x) * warps_in_block() + warp_index(); work < work_items;
       work += step) {
    const int64_t b = work / n, label = a.assignment[work];
    const int i = static_cast<int>(work % n);
    T* grad_x = static_cast<T*>(a.grad_x) + work * features;
    if (label < 0 || label >= k) {
      for (int f = lane_index(); f < features; f += kWarp) grad_x[f] = from_float<T>(0.0f);
      if (lane_index() == 0) a.grad_weights[work] = 0.0f;
      continue;
    }
    const int j = static_cast<int>(label);
    const Image<T> x(a.x, b), grad(a.grad_centers, b), centers(a.centers, b);
    const float total = a.mass[b * k + j];
    const float w = a.weights == nullptr ? 1.0f : a.weights[work];
    const float share = total > 0.0f ? w / total : 1.0f / static_cast<float>(a.counts[b * k + j]);
    float dot = 0.0f;
    for (int f = 4 * lane_index(); f < features; f += 4 * kWarp) {
      float g[4], v[4], c[4];
      load4(grad, j, f, features, g);
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (f + e < features) grad_x[f + e] = from_float<T>(share * g[e]);
      if (a.weights == nullptr) continue;
      load4(x, i, f, features, v);
      load4(centers, j, f, features, c);
#pragma unroll
      for (int e = 0; e < 4; ++e) dot = fmaf(v[e] - c[e], g[e], dot);
    }
    dot = warp_sum(dot);
    if (lane_index() == 0) a.grad_weights[work] = total > 0.0f ? dot / total : 0.0f;
  }
}

}  // namespace cuda
}  // namespace tokenpool
