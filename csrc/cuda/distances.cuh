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
  constexpr int kSide = 4;  // a warp measures kSide x kSide pairs at a time
  const int blocks = (tokens + kSide - 1) / kSide;
#pragma unroll 1
  for (int row = warp_index(); row < blocks; row += warps_in_block())
#pragma unroll 1
    for (int column = 0; column <= row; ++column) {
      float distance[kSide][kSide] = {};
#pragma unroll 1
      for (int f = 4 * lane_index(); f < features; f += 4 * kWarp) {
        float left[kSide][4];
#pragma unroll
        for (int r = 0; r < kSide; ++r) load4(image, min(kSide * row + r, tokens - 1), f, features, left[r]);
#pragma unroll
        for (int c = 0; c < kSide; ++c) {
          float right[4];
          load4(image, min(kSide * column + c, tokens - 1), f, features, right);
#pragma unroll
          for (int r = 0; r < kSide; ++r)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const float difference = left[r][e] * scale - right[e] * scale;
              distance[r][c] = fmaf(difference, difference, distance[r][c]);
            }
        }
      }
#pragma unroll
      for (int r = 0; r < kSide; ++r)
#pragma unroll
        for (int c = 0; c < kSide; ++c) {
          const int i = kSide * row + r, l = kSide * column + c;
          const float sum = warp_sum(distance[r][c]);
          if (lane_index() == 0 && i < tokens && l <= i) gram.set(i, l, -0.5f * sum);
        }
    }
  __syncthreads();
}

}  // namespace cuda
}  // namespace tokenpool
