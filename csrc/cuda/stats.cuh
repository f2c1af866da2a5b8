// What must be known about an image before products are formed: the power of two that brings max |x| into [1, 2), or 1
// where its square is safe as it is; the same for the weights, the number of valid tokens, and (float32) the mean
// token, which is subtracted because distances between tokens that share a large mean would cancel.
#pragma once

#include "common.cuh"

namespace tokenpool {
namespace cuda {

// One block per (image, 64 tokens): partial maxima and counts. Reads x once.
template <typename T>
__global__ void __launch_bounds__(256, 2) absmax_kernel(StatsArgs a) {
  __shared__ BlockScratch scratch;
  const int chunks = stats_chunks(a.shape.tokens);
  const int64_t work_items = a.shape.batch * chunks;
  for (int64_t work = blockIdx.x; work < work_items; work += gridDim.x) {
    const int64_t b = work / chunks;
    const int first = static_cast<int>(work % chunks) * kStatsChunk;
    const Image<T> image(a.x, b);
    const int64_t row0 = b * a.shape.tokens;
    float largest = 0.0f, largest_light = 0.0f, heaviest = 0.0f;
    int valid = 0, positive = 0;
    for (int r = warp_index(); r < kStatsChunk; r += warps_in_block()) {
      const int i = first + r;
      if (i >= a.shape.tokens || !is_valid(a.mask, row0 + i)) continue;
      const float w = a.weights == nullptr ? 1.0f : a.weights[row0 + i];
      if (a.use_scale) {
        float most = 0.0f;
        for (int f = 4 * lane_index(); f < a.shape.features; f += 4 * kWarp) {
          float v[4];
          load4(image, i, f, a.shape.features, v);
#pragma unroll
          for (int e = 0; e < 4; ++e) most = fmaxf(most, fabsf(v[e]));
        }
        largest = fmaxf(largest, w > 0.0f ? most : 0.0f);
        largest_light = fmaxf(largest_light, w > 0.0f ? 0.0f : most);
      }
      if (lane_index() == 0) {
        valid += 1;
        positive += w > 0.0f;
        heaviest = fmaxf(heaviest, w);
      }
    }
    largest = block_max(largest, scratch);
    largest_light = block_max(largest_light, scratch);
    heaviest = block_max(heaviest, scratch);
    valid = block_sum(valid, scratch);
    positive = block_sum(positive, scratch);
    if (threadIdx.x == 0) a.partials[work] = StatsPartial{largest, largest_light, heaviest, valid, positive};
  }
}

// One block (256 threads) per (image, 32 features): combines the partial maxima, then takes the means of its features.
template <typename T>
__global__ void __launch_bounds__(256, 2) center_kernel(StatsArgs a) {
  __shared__ FeaturePart parts[kMeanWarps * kWarp];
  __shared__ ImageStats shared_stats;
  const int groups = a.mean == nullptr ? 1 : max(1, (a.shape.features + kWarp - 1) / kWarp);
  const int chunks = stats_chunks(a.shape.tokens);
  const int64_t work_items = a.shape.batch * groups;
  for (int64_t work = blockIdx.x; work < work_items; work += gridDim.x) {
    const int64_t b = work / groups;
    const int group = static_cast<int>(work % groups);
    if (warp_index() == 0) {
      float largest = 0.0f, largest_light = 0.0f, heaviest = 0.0f;
      int valid = 0, positive = 0;
      for (int c = lane_index(); c < chunks; c += kWarp) {
        const StatsPartial part = a.partials[b * chunks + c];
        largest = fmaxf(largest, part.max_abs);
        largest_light = fmaxf(largest_light, part.max_abs_light);
        heaviest = fmaxf(heaviest, part.max_weight);
        valid += part.valid;
        positive += part.positive;
      }
      heaviest = warp_max(heaviest);
      valid = warp_sum(valid);
      positive = warp_sum(positive);
      largest = warp_max(positive > 0 ? largest : largest_light);
      if (lane_index() == 0) {
        ImageStats s;
        s.scale = s.inv_scale = 1.0f;
        if (!is_safe(largest * largest)) power_of_two_scale(largest, &s.scale, &s.inv_scale);
        power_of_two_scale(heaviest, &s.weight_scale, &s.inv_weight_scale);
        s.light = light_weight(positive > 0);
        s.counting = positive > 0 ? positive : valid;
        s.clusters = min(a.shape.clusters, valid);
        if (a.counts != nullptr) s.clusters = static_cast<int>(max(int64_t{0}, min(a.counts[b], int64_t{s.clusters})));
        shared_stats = s;
        if (group == 0) a.stats[b] = s;
      }
    }
    __syncthreads();
    if (a.mean != nullptr) {
      const ImageStats stats = shared_stats;
      const Image<T> image(a.x, b);
      const int f = group * kWarp + lane_index();
      const float mean = mean_of_tokens(
          a.shape.tokens, stats.counting, parts,
          [&](int i) {
            const int64_t token = b * a.shape.tokens + i;
            return is_valid(a.mask, token) && normal_weight(a.weights, token, stats.weight_scale) > stats.light;
          },
          [&](int i) { return f < a.shape.features ? image.at(i, f) * stats.scale : 0.0f; });
      if (warp_index() == 0 && f < a.shape.features) a.mean[b * a.shape.features + f] = mean;
    }
    __syncthreads();
  }
}

}  // namespace cuda
}  // namespace tokenpool
