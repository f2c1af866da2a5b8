// Means, sums and rows over the list of one cluster's members, by one warp. A lane owns features 4 lane .. 4 lane + 3
// of every 128, and members are added in ascending order.
#pragma once

#include "common.cuh"

namespace tokenpool {
namespace cuda {

// p_l = w_l / W of one cluster's members, robust for weights of any magnitude.
struct Shares {
  const float* weights;  // of the image, or null
  float scale;           // power of two
  float total;           // of the scaled weights
  float mass;            // of the weights themselves
  float equal;           // p of every member where all weigh the same: without weights, or where all are 0
  int length;

  __device__ Shares(const float* image_weights, const int* members, int count) : weights(image_weights), length(count) {
    scale = 1.0f;
    total = mass = static_cast<float>(length);
    equal = 1.0f / total;
    if (weights == nullptr) return;
    float heaviest = 0.0f;
#pragma unroll 1
    for (int m = lane_index(); m < length; m += kWarp) heaviest = fmaxf(heaviest, weights[members[m]]);
    float inverse;
    power_of_two_scale(warp_max(heaviest), &scale, &inverse);
    total = 0.0f;
#pragma unroll 1
    for (int m = 0; m < length; ++m) total += normal_weight(weights, members[m], scale);
    const float sum = total * inverse;
    mass = sum > FLT_MAX ? FLT_MAX : sum;
  }

  __device__ float weight(int token) const { return weights == nullptr ? 1.0f : normal_weight(weights, token, scale); }
  __device__ float of(int token) const { return weights != nullptr && total > 0.0f ? weight(token) / total : equal; }
};

template <typename T>
__device__ inline void weighted_mean4(const Image<T>& image, const int* members, const Shares& shares, int f,
                                      int features, float (&mean)[4]) {
#pragma unroll
  for (int e = 0; e < 4; ++e) mean[e] = 0.0f;
#pragma unroll 2
  for (int m = 0; m < shares.length; ++m) {
    const int token = members[m];
    const float share = shares.of(token);
    float v[4];
    load4(image, token, f, features, v);
#pragma unroll
    for (int e = 0; e < 4; ++e) mean[e] = fmaf(share, v[e], mean[e]);
  }
}

constexpr int kCenterChunks = 3;  // of 128 features that a warp sums at a time: 384 features in one go

// Sum of ((v - c) * scale)^2, without overflow on the way. kScaled: scale is not 1.
template <bool kScaled>
__device__ inline float squared_distance(const float (&v)[kCenterChunks][4], const float (&center)[kCenterChunks][4],
                                         float scale) {
  float sum = 0.0f;
#pragma unroll
  for (int c = 0; c < kCenterChunks; ++c)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float difference = kScaled ? v[c][e] * scale - center[c][e] * scale : v[c][e] - center[c][e];
      sum = fmaf(difference, difference, sum);
    }
  return sum;
}

// Writes one row of the centers, aligned as rows of features are. Returns sum_i w_i ||(x_i - c) * scale||^2 over the
// members, w in units of stats.weight_scale, to every lane (0 without stats). medoid: token to copy in kMedoid mode.
template <typename T>
__device__ inline float emit_center(const Image<T>& image, const int* members, const Shares& shares, MeansMode mode,
                                    int medoid, const ImageStats* stats, const float* image_weights, int features,
                                    T* out) {
  float error = 0.0f;
#pragma unroll 1
  for (int f = 4 * lane_index(); f < features; f += 4 * kWarp * kCenterChunks) {
    float center[kCenterChunks][4] = {};
    if (mode == MeansMode::kMedoid) {
      load_chunks(image, medoid, f, features, center);
    } else {
#pragma unroll 2
      for (int m = 0; m < shares.length; ++m) {
        const float share = mode == MeansMode::kMean ? shares.of(members[m]) : 1.0f;
        float v[kCenterChunks][4];
        load_chunks(image, members[m], f, features, v);
#pragma unroll
        for (int c = 0; c < kCenterChunks; ++c)
#pragma unroll
          for (int e = 0; e < 4; ++e) center[c][e] = fmaf(share, v[c][e], center[c][e]);
      }
    }
#pragma unroll
    for (int c = 0; c < kCenterChunks; ++c) {
      const int at = f + 4 * kWarp * c;
      Four<T> row;
#pragma unroll
      for (int e = 0; e < 4; ++e) row.value[e] = from_float<T>(center[c][e]);
      if (mode == MeansMode::kMedoid) {  // as it is, to the bit
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (at + e < features) row.value[e] = image.raw(medoid, at + e);
      }
      if (features % 4 == 0) {
        if (at < features) *reinterpret_cast<Four<T>*>(out + at) = row;
      } else {
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (at + e < features) out[at + e] = row.value[e];
      }
    }
    if (stats == nullptr) continue;
#pragma unroll 1
    for (int m = 0; m < shares.length; ++m) {
      const int token = members[m];
      const float w = normal_weight(image_weights, token, stats->weight_scale);
      float v[kCenterChunks][4];
      load_chunks(image, token, f, features, v);
      const float squares = stats->scale == 1.0f ? squared_distance<false>(v, center, 1.0f)
                                                 : squared_distance<true>(v, center, stats->scale);
      error = fmaf(w, squares, error);
    }
  }
  return stats == nullptr ? 0.0f : warp_sum(error);
}

// Sum of part(j) over all clusters by one warp, in a fixed order; every lane gets it.
template <typename Part>
__device__ inline float sum_of_parts(int clusters, Part part) {
  float sum = 0.0f;
#pragma unroll 1
  for (int j = lane_index(); j < clusters; j += kWarp) sum += part(j);
  return warp_sum(sum);
}

}  // namespace cuda
}  // namespace tokenpool
