// How one block prepares an image on the paths "resident" and "spread". Both follow one rule, so that an image's result
// does not depend on which of the two ran: the product is formed without scaling first, and only if its diagonal leaves
// the safe range (is_safe) is it redone with the image scaled by a power of two. Scaling by powers of two changes no
// rounding, so the rule is invisible.
#pragma once

#include "state.cuh"
#include "tile.cuh"

namespace tokenpool {
namespace cuda {

// Fills `weight`; the scale of the tokens stays 1. Ends with a barrier.
__device__ inline ImageStats measure_image(const IterationArgs& a, const int64_t* counts, int64_t image, float* weight,
                                           BlockScratch& scratch) {
  const int n = a.shape.tokens;
  float heaviest = 0.0f;
  int valid = 0, positive = 0;
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += blockDim.x)
    if (is_valid(a.mask, image * n + i)) {
      const float w = a.weights == nullptr ? 1.0f : a.weights[image * n + i];
      heaviest = fmaxf(heaviest, w);
      ++valid;
      positive += w > 0.0f;
    }
  ImageStats stats;
  heaviest = block_max(heaviest, scratch);
  valid = block_sum(valid, scratch);
  positive = block_sum(positive, scratch);
  stats.light = light_weight(positive > 0);
  stats.counting = positive > 0 ? positive : valid;
  power_of_two_scale(heaviest, &stats.weight_scale, &stats.inv_weight_scale);
  stats.scale = stats.inv_scale = 1.0f;
  stats.clusters = min(a.shape.clusters, valid);
  if (counts != nullptr)
    stats.clusters = static_cast<int>(max(int64_t{0}, min(counts[image], int64_t{stats.clusters})));
  load_weights(a, image, stats.weight_scale, weight);
  __syncthreads();
  return stats;
}

// A warp's products, rows and columns from (row0, column0), into the packed triangle: what lies in it.
template <int kRows, int kColumns>
__device__ inline void store_tile(float* gram, const float (&acc)[kRows][kColumns][4], int row0, int column0,
                                  int tokens) {
  const int lane = thread_index_anew() % kWarp, column = column0 + tile_column(0, 0, lane);
#pragma unroll
  for (int mi = 0; mi < kRows; ++mi)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int i = row0 + tile_row(mi, 2 * r, lane), last = i < tokens ? i - column : -1;
      float* to = gram + PackedGram::row(i) + column;
#pragma unroll
      for (int ni = 0; ni < kColumns; ++ni)
#pragma unroll
        for (int c = 0; c < 2; ++c)
          if (8 * ni + c <= last) to[8 * ni + c] = acc[mi][ni][2 * r + c];
    }
}

// Whether G, formed without scaling, must be formed again; sets the scale. The same for the whole block. Ends with a
// barrier when it says yes.
template <typename Gram, typename T>
__device__ inline bool must_scale(const Gram& gram, const Image<T>& image, const float* weight, int tokens,
                                  int features, ImageStats& stats, BlockScratch& scratch) {
  float largest = 0.0f;
#pragma unroll 1
  for (int i = threadIdx.x; i < tokens; i += blockDim.x) {
    const float square = gram(i, i);
    if (weight[i] > stats.light) largest = fmaxf(largest, square == square ? square : infinity());
  }
  largest = block_max(largest, scratch);
  if (is_safe(largest)) return false;
  float absolute = 0.0f;
#pragma unroll 1
  for (int i = warp_index(); i < tokens; i += warps_in_block())
#pragma unroll 1
    for (int f = lane_index(); f < features && weight[i] > stats.light; f += kWarp)
      absolute = fmaxf(absolute, fabsf(image.at(i, f)));
  power_of_two_scale(block_max(absolute, scratch), &stats.scale, &stats.inv_scale);
  __syncthreads();
  return stats.scale != 1.0f;
}

}  // namespace cuda
}  // namespace tokenpool
