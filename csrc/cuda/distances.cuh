// The matrix from which an image iterates where products in float32 cannot tell its distances apart: groups of tokens
// far from each other, or a token very much longer than the others.
//
// Minus half the squared distance of two tokens stands in for G_il in every formula of cluster.cuh. The shares p of a
// mean add up to 1, so
//   G_ii + ||c_j||^2 - 2 c_j . x_i = sum_l p_l d_il - 1/2 sum_lm p_l p_m d_lm = ||x_i - c_j||^2,
// and the numbers between tokens that are near each other are small, however far they all are from the mean token.
#pragma once

#include "state.cuh"

namespace tokenpool {
namespace cuda {

// Whether distances that add up to `near` can be told apart by products of tokens whose squared norms add up to `far`:
// products are as wrong as the norms are large. A NaN is beyond any arithmetic.
__device__ inline bool resolved(float near, float far) {
  return !(near < 256.0f * FLT_EPSILON * far);
}

// Fills the matrix from the tokens, by this block alone: rare, so it is short rather than fast. Ends with a barrier.
template <typename T, typename Gram>
__device__ inline void fill_with_distances(const Gram& gram, const Image<T>& image, int tokens, int features,
                                           float scale) {
#pragma unroll 1
  for (int i = warp_index(); i < tokens; i += warps_in_block())
#pragma unroll 1
    for (int l = 0; l <= i; ++l) {
      float distance = 0.0f;
#pragma unroll 1
      for (int f = 4 * lane_index(); f < features; f += 4 * kWarp) {
        float left[4], right[4];
        load4(image, i, f, features, left);
        load4(image, l, f, features, right);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float difference = left[e] * scale - right[e] * scale;
          distance = fmaf(difference, difference, distance);
        }
      }
      distance = warp_sum(distance);
      if (lane_index() == 0) gram.set(i, l, -0.5f * distance);
    }
  __syncthreads();
}

}  // namespace cuda
}  // namespace tokenpool
