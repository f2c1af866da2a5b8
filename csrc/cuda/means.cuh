// Per-cluster sums over lists of members: the returned centers, and the centers of the next iteration when the
// tokens are too many for a Gram matrix. One warp per (image, cluster); a lane owns features 4 lane .. 4 lane + 3 of
// every 128, and members are added in ascending order.
#pragma once

#include "args_pool.h"
#include "args_streaming.h"
#include "sums.cuh"

namespace tokenpool {
namespace cuda {

template <typename T>
__global__ void __launch_bounds__(128, 5) means_kernel(MeansArgs a) {
  const int n = a.shape.tokens, k = a.shape.clusters, features = a.shape.features;
  const int64_t work_items = a.shape.batch * k;
  const int64_t step = static_cast<int64_t>(gridDim.x) * warps_in_block();
  for (int64_t work = static_cast<int64_t>(blockIdx.x) * warps_in_block() + warp_index(); work < work_items;
       work += step) {
    const int64_t b = work / k;
    const Image<T> image(a.x, b);
    const float* weights = a.weights == nullptr ? nullptr : a.weights + b * n;
    const int* members = a.order + b * n + a.segment_start[work];
    const Shares shares(weights, members, a.segment_length[work]);
    T* out = static_cast<T*>(a.centers) + work * features;
    float error = 0.0f;
    int chosen = -1;
    if (shares.length == 0) {
      for (int f = lane_index(); f < features; f += kWarp) out[f] = from_float<T>(0.0f);
    } else {
      const int medoid = a.mode == MeansMode::kMedoid ? static_cast<int>(a.medoids[work]) : 0;
      const ImageStats* stats = a.stats == nullptr ? nullptr : a.stats + b;
      float* apart = a.nearest == nullptr ? nullptr : a.apart + b * n;
      error = emit_center(image, members, shares, a.mode, medoid, stats, weights, features, apart, out);
      if (apart != nullptr) chosen = nearest_member(members, shares, features, apart);
    }
    bool last = false;
    if (lane_index() == 0) {
      if (a.nearest != nullptr) a.nearest[work] = chosen;
      if (a.mass != nullptr) a.mass[work] = shares.length == 0 ? 0.0f : shares.mass;
      if (a.inertia_parts != nullptr) {
        a.inertia_parts[work] = error;
        last = is_last_to_arrive(a.arrived + b, k);
      }
    }
    if (__shfl_sync(kAllLanes, static_cast<int>(last), 0)) {  // this warp finished the image
      const float sum = sum_by_warp(k, [&](int j) { return __ldcg(a.inertia_parts + b * k + j); });
      if (lane_index() == 0) a.inertia[b] = unscale_inertia(sum, a.stats[b].inv_scale, a.stats[b].inv_weight_scale);
    }
  }
}

// First centers of the streaming path, in scaled and centred units: given tokens or given centers. Clears `done` and
// `arrived`.
template <typename T>
__global__ void __launch_bounds__(128, 4) gather_kernel(GatherArgs a) {
  constexpr int kParts = CenterSplit<T>::kParts;
  const int columns = center_columns(TypeTraits<T>::kType, a.shape.features);
  const int n = a.shape.tokens, k = a.shape.clusters, features = a.shape.features;
  const int64_t work_items = a.shape.batch * k;
  const int64_t step = static_cast<int64_t>(gridDim.x) * warps_in_block();
  for (int64_t work = static_cast<int64_t>(blockIdx.x) * warps_in_block() + warp_index(); work < work_items;
       work += step) {
    const int64_t b = work / k;
    if (a.only != nullptr && !a.only[b]) continue;
    const Image<T> image(a.x, b);
    const float scale = a.stats[b].scale;
    const float* mean = a.mean == nullptr ? nullptr : a.mean + b * features;
    int64_t token = 0;
    if (a.init != nullptr) token = max(int64_t{0}, min(a.init[b * a.init_stride + work % k], int64_t{n - 1}));
    T* row = static_cast<T*>(a.split) + work * kParts * columns;
    for (int f = features + lane_index(); f < columns; f += kWarp)
#pragma unroll
      for (int part = 0; part < kParts; ++part) row[part * columns + f] = from_float<T>(0.0f);
    float norm = 0.0f;
    for (int f = lane_index(); f < features; f += kWarp) {
      const float value =
          a.init != nullptr ? image.at(static_cast<int>(token), f) : a.init_centers[work * features + f];
      const float c = CenterSplit<T>::representable(in_units(value, scale, mean, f));
#pragma unroll
      for (int part = 0; part < kParts; ++part) row[part * columns + f] = CenterSplit<T>::part(c, part);
      norm = fmaf(c, c, norm);
    }
    norm = warp_sum(norm);
    if (lane_index() == 0) {
      a.norms[work] = norm;
      if (a.medoids != nullptr) a.medoids[work] = static_cast<int>(token);
      if (work % k == 0) a.done[b] = a.arrived[b] = 0;
    }
  }
}

// Features f .. f+3 of a row of centers as `assign` reads them. f is a multiple of 4, within the row.
template <typename T>
__device__ inline void store_split4(T* row, int columns, int f, const float (&c)[4]) {
#pragma unroll
  for (int part = 0; part < CenterSplit<T>::kParts; ++part) {
    Four<T> four;
#pragma unroll
    for (int e = 0; e < 4; ++e) four.value[e] = CenterSplit<T>::part(c[e], part);
    *reinterpret_cast<Four<T>*>(row + part * columns + f) = four;
  }
}

// Next centers of the streaming path: means, or the members nearest to them (K-Medoids).
template <typename T>
__global__ void __launch_bounds__(128, 4) update_kernel(UpdateArgs a) {
  const int columns = center_columns(TypeTraits<T>::kType, a.shape.features);
  const int n = a.shape.tokens, k = a.shape.clusters, features = a.shape.features;
  const int64_t work_items = a.shape.batch * k;
  const int64_t step = static_cast<int64_t>(gridDim.x) * warps_in_block();
  for (int64_t work = static_cast<int64_t>(blockIdx.x) * warps_in_block() + warp_index(); work < work_items;
       work += step) {
    const int64_t b = work / k;
    const int length = a.segment_length[work];
    if (a.done[b] || length == 0) continue;
    const Image<T> image(a.x, b);
    const float* weights = a.weights == nullptr ? nullptr : a.weights + b * n;
    const int* members = a.order + b * n + a.segment_start[work];
    const float scale = a.stats[b].scale;
    const float* mean = a.mean == nullptr ? nullptr : a.mean + b * features;
    T* row = static_cast<T*>(a.split) + work * CenterSplit<T>::kParts * columns;
    float* center = a.means == nullptr ? nullptr : a.means + work * features;
    const Shares shares(weights, members, length);
    float norm = 0.0f;
    for (int f = 4 * lane_index(); f < features; f += 4 * kWarp) {
      float c[4];
      weighted_mean4(image, members, shares, f, features, c);
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (f + e < features) {
          c[e] = in_units(c[e], scale, mean, f + e);
          if (a.medoids == nullptr)
            c[e] = CenterSplit<T>::representable(c[e]);
          else
            center[f + e] = c[e];
          norm = fmaf(c[e], c[e], norm);
        } else {
          c[e] = 0.0f;
        }
      if (a.medoids == nullptr) store_split4(row, columns, f, c);
    }
    norm = warp_sum(norm);
    if (a.medoids != nullptr) {
      __syncwarp();  // every lane reads back only what it wrote, but keep the order plain
      int chosen = members[0];
      if (shares.total > 0.0f) {
        float best = infinity();
        for (int m = 0; m < length; ++m) {
          const int token = members[m];
          if (!(shares.weight(token) > 0.0f)) continue;  // what weighs nothing moves nothing
          float distance = 0.0f;
          if (length == 2) {  // decided on the weights: the two distances differ by rounding only
            distance = -shares.weight(token);
          } else {
            for (int f = 4 * lane_index(); f < features; f += 4 * kWarp) {
              float v[4];
              load4(image, token, f, features, v);
#pragma unroll
              for (int e = 0; e < 4; ++e)
                if (f + e < features) {
                  const float difference = in_units(v[e], scale, mean, f + e) - center[f + e];
                  distance = fmaf(difference, difference, distance);
                }
            }
            distance = warp_sum(distance);
          }
          if (distance < best) {
            best = distance;
            chosen = token;
          }
        }
      }
      norm = 0.0f;
      for (int f = 4 * lane_index(); f < features; f += 4 * kWarp) {
        float c[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (f + e < features) {
            c[e] = CenterSplit<T>::representable(in_units(image.at(chosen, f + e), scale, mean, f + e));
            norm = fmaf(c[e], c[e], norm);
          }
        store_split4(row, columns, f, c);
      }
      norm = warp_sum(norm);
      if (lane_index() == 0) a.medoids[work] = chosen;
    }
    if (lane_index() == 0) a.norms[work] = norm;
  }
}

}  // namespace cuda
}  // namespace tokenpool
