// Means, sums and rows over the list of one cluster's members, by one warp. A lane owns features 4 lane .. 4 lane + 3
// of every 128, and members are added in ascending order.
#pragma once

#include "args_pool.h"
#include "common.cuh"

namespace tokenpool {
namespace cuda {

// share * (v - shift), without overflow of the difference.
__device__ inline float shifted(float share, float v, float shift) {
  return 2.0f * share * (0.5f * v - 0.5f * shift);
}

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
    Sum heavy;
#pragma unroll 1
    for (int m = 0; m < length; ++m) heavy.add(normal_weight(weights, members[m], scale));
    total = heavy.value;
    const float sum = total * inverse;
    mass = sum > FLT_MAX ? FLT_MAX : sum;
  }

  __device__ float weight(int token) const { return weights == nullptr ? 1.0f : normal_weight(weights, token, scale); }
  __device__ float of(int token) const { return weights != nullptr && total > 0.0f ? weight(token) / total : equal; }

  // The place of the first member that counts. A mean is that member plus the mean difference from it: equal members
  // give themselves, to the bit. Members of share 0 are not read.
  __device__ int first(const int* members) const {
    int m = 0;
#pragma unroll 1
    while (m + 1 < length && of(members[m]) == 0.0f) ++m;
    return m;
  }
};

template <typename T>
__device__ inline void weighted_mean4(const Image<T>& image, const int* members, const Shares& shares, int f,
                                      int features, float (&mean)[4]) {
  const int first = shares.first(members);
  float shift[4];
  Sum sum[4];
  load4(image, members[first], f, features, shift);
#pragma unroll 2
  for (int m = first + 1; m < shares.length; ++m) {
    const int token = members[m];
    const float share = shares.of(token);
    if (share == 0.0f) continue;
    float v[4];
    load4(image, token, f, features, v);
#pragma unroll
    for (int e = 0; e < 4; ++e) sum[e].add(shifted(share, v[e], shift[e]));
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) mean[e] = shift[e] + sum[e].value;
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
// apart, with stats: where it goes, token by token, how far the members are, squared and scaled; or null.
template <typename T>
__device__ inline float emit_center(const Image<T>& image, const int* members, const Shares& shares, MeansMode mode,
                                    int medoid, const ImageStats* stats, const float* image_weights, int features,
                                    float* apart, T* out) {
  Sum error;
#pragma unroll 1
  for (int base = 0; base < features; base += 4 * kWarp * kCenterChunks) {
    const int f = base + 4 * lane_index();
    float center[kCenterChunks][4] = {};
    if (mode == MeansMode::kMedoid) {
      load_chunks(image, medoid, f, features, center);
    } else {
      const bool is_mean = mode == MeansMode::kMean;
      const int first = is_mean ? shares.first(members) : -1;
      float shift[kCenterChunks][4] = {};
      Sum sum[kCenterChunks][4];
      if (is_mean) load_chunks(image, members[first], f, features, shift);
#pragma unroll 1
      for (int m = first + 1; m < shares.length; ++m) {
        const float share = is_mean ? shares.of(members[m]) : 1.0f;
        if (share == 0.0f) continue;
        float v[kCenterChunks][4];
        load_chunks(image, members[m], f, features, v);
#pragma unroll
        for (int c = 0; c < kCenterChunks; ++c)
#pragma unroll
          for (int e = 0; e < 4; ++e) sum[c][e].add(is_mean ? shifted(share, v[c][e], shift[c][e]) : v[c][e]);
      }
#pragma unroll
      for (int c = 0; c < kCenterChunks; ++c)
#pragma unroll
        for (int e = 0; e < 4; ++e) center[c][e] = shift[c][e] + sum[c][e].value;
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
      if (w > 0.0f) error.add(w * squares);  // a token of weight 0 may hold anything
      if (apart == nullptr) continue;
      const float sum = warp_sum(squares);
      if (lane_index() == 0) apart[token] = base == 0 ? sum : apart[token] + sum;
    }
  }
  return stats == nullptr ? 0.0f : warp_sum(error.value);
}

// The member nearest to its mean, the lowest on a tie; of two that differ the heavier one, as rounding would break
// every tie of theirs. apart: by emit_center of this warp. The same for every lane.
__device__ inline int nearest_member(const int* members, const Shares& shares, int features, const float* apart) {
  if (features == 0 || shares.length < 2) return members[0];
  __syncwarp();
  Candidate nearest{infinity(), 0};  // by place among the members
#pragma unroll 1
  for (int m = lane_index(); m < shares.length; m += kWarp) nearest = smaller(nearest, Candidate{apart[members[m]], m});
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) nearest = smaller(nearest, shuffle_xor(nearest, offset));
  if (shares.length == 2 && (apart[members[0]] > 0.0f || apart[members[1]] > 0.0f))
    return members[shares.weight(members[1]) > shares.weight(members[0]) ? 1 : 0];
  return members[nearest.index];
}

}  // namespace cuda
}  // namespace tokenpool
