// How one block prepares an image on the paths "resident" and "spread". Both follow one rule, so that an image's result
// does not depend on which of the two ran: the product is formed without scaling first, and only if its diagonal leaves
// the safe range [2^-40, 2^80] is it redone with the image scaled by a power of two. Scaling by powers of two changes no
// rounding, so the rule is invisible.
#pragma once

#include "state.cuh"

namespace tokenpool {
namespace cuda {

// Fills `weight`; the scale of the tokens stays 1. Ends with a barrier.
__device__ inline ImageStats measure_image(const IterationArgs& a, const int64_t* counts, int64_t image, float* weight,
                                           BlockScratch& scratch) {
  const int n = a.shape.tokens;
  float heaviest = 0.0f;
  int valid = 0;
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += blockDim.x)
    if (is_valid(a.mask, image * n + i)) {
      heaviest = fmaxf(heaviest, a.weights == nullptr ? 1.0f : a.weights[image * n + i]);
      ++valid;
    }
  ImageStats stats;
  heaviest = block_max(heaviest, scratch);
  stats.valid = block_sum(valid, scratch);
  power_of_two_scale(heaviest, &stats.weight_scale, &stats.inv_weight_scale);
  stats.scale = stats.inv_scale = 1.0f;
  stats.clusters = min(a.shape.clusters, stats.valid);
  if (counts != nullptr) stats.clusters = static_cast<int>(max(int64_t{0}, min(counts[image], int64_t{stats.clusters})));
  load_weights(a, image, stats.weight_scale, weight);
  __syncthreads();
  return stats;
}

// Whether G, formed without scaling, must be formed again; sets the scale. The same for the whole block. Ends with a
// barrier when it says yes.
template <typename T>
__device__ inline bool must_scale(const PackedGram& gram, const Image<T>& image, const float* weight, int tokens,
                                  int features, ImageStats& stats, BlockScratch& scratch) {
  float largest = 0.0f;
#pragma unroll 1
  for (int i = threadIdx.x; i < tokens; i += blockDim.x) {
    const float square = gram(i, i);
    if (weight[i] >= 0.0f) largest = fmaxf(largest, square == square ? square : infinity());
  }
  largest = block_max(largest, scratch);
  if (largest >= 0x1p-40f && largest <= 0x1p80f) return false;
  float absolute = 0.0f;
#pragma unroll 1
  for (int i = warp_index(); i < tokens; i += warps_in_block())
#pragma unroll 1
    for (int f = lane_index(); f < features && weight[i] >= 0.0f; f += kWarp)
      absolute = fmaxf(absolute, fabsf(image.at(i, f)));
  power_of_two_scale(block_max(absolute, scratch), &stats.scale, &stats.inv_scale);
  __syncthreads();
  return stats.scale != 1.0f;
}

}  // namespace cuda
}  // namespace tokenpool
