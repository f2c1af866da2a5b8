// Nearest center of every token without a matrix of size N x K: a tiled product with the arg-min kept in registers.
//
// Grid: one block of 256 threads per (image, 128 tokens). Eight warps, 4 x 2, each 32 tokens x 32 of the 64 centers
// compared at a time. Half types multiply exact half tokens with centers split in two halves (high + low), so the
// centers keep about twice the digits of the type; float32 uses multiply-adds.
#pragma once

#include "tile.cuh"

namespace tokenpool {
namespace cuda {

// The two warps that share tokens, and the four lanes that share a row, each hold a candidate.
struct AssignScratch {
  Candidate best[2][kBlockTile];
  float square[kBlockTile];
  int owner[kBlockTile];
};

template <typename T>
__global__ void __launch_bounds__(256, 2) assign_kernel(AssignArgs a) {
  TOKENPOOL_DYNAMIC_SHARED(memory);
  __shared__ AssignScratch scratch;
  constexpr DType kType = TypeTraits<T>::kType;
  constexpr int kParts = CenterSplit<T>::kParts;
  const int chunk = stage_chunk(kType), stride = stage_stride(kType, chunk);
  T* rows = reinterpret_cast<T*>(memory);
  T* columns = rows + kBlockTile * stride;
  const int n = a.shape.tokens, k = a.shape.clusters, features = a.shape.features;
  const int panels = (n + kBlockTile - 1) / kBlockTile;
  const int64_t work_items = a.shape.batch * panels;
  const int half = warp_index() % 2, warp_row = warp_index() / 2 * kTile;
  for (int64_t work = blockIdx.x; work < work_items; work += gridDim.x) {
    const int64_t b = work / panels;
    if (a.done[b]) continue;  // the same for the whole block
    const int row0 = static_cast<int>(work % panels) * kBlockTile;
    const Image<T> image(a.x, b);
    const ImageStats stats = a.stats[b];
    const float* mean = a.mean == nullptr ? nullptr : a.mean + b * features;
    const float* centers = a.centers + b * k * features;
    const float* norms = a.norms + b * k;
    Candidate best[2][2];  // rows 16 mi + 8 h + lane / 4
#pragma unroll
    for (int mi = 0; mi < 2; ++mi)
#pragma unroll
      for (int h = 0; h < 2; ++h) best[mi][h] = Candidate{infinity(), INT_MAX};
    float square = 0.0f;  // ||x||^2 of token row0 + threadIdx.x

    for (int j0 = 0; j0 < max(1, stats.clusters); j0 += kAssignClusters) {
      TileAccumulator acc;
      clear(acc);
      for (int k0 = 0; k0 < features; k0 += chunk) {
        stage_rows(rows, image, row0, kBlockTile, n, k0, chunk, features, stats.scale, mean);
        for (int e = threadIdx.x; e < kAssignClusters * chunk; e += blockDim.x) {
          const int j = j0 + e / chunk, f = k0 + e % chunk;
          const float c = j < stats.clusters && f < features ? centers[static_cast<int64_t>(j) * features + f] : 0.0f;
#pragma unroll
          for (int part = 0; part < kParts; ++part)
            columns[(part * kAssignClusters + e / chunk) * stride + e % chunk] = CenterSplit<T>::part(c, part);
        }
        __syncthreads();
        if (j0 == 0 && threadIdx.x < kBlockTile)
          for (int f = 0; f < chunk; ++f) {
            const float v = to_float(rows[threadIdx.x * stride + f]);
            square = fmaf(v, v, square);
          }
#pragma unroll
        for (int part = 0; part < kParts; ++part)
          tile_product(acc, rows + warp_row * stride, columns + (part * kAssignClusters + half * kTile) * stride, stride,
                       chunk);
        __syncthreads();
      }
#pragma unroll
      for (int ni = 0; ni < 4; ++ni)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int j = j0 + half * kTile + tile_column(ni, c);
          if (j >= stats.clusters) continue;
          const float norm = norms[j];
#pragma unroll
          for (int mi = 0; mi < 2; ++mi)
#pragma unroll
            for (int h = 0; h < 2; ++h)
              best[mi][h] = smaller(best[mi][h], Candidate{norm - 2.0f * acc[mi][ni][2 * h + c], j});
        }
    }
#pragma unroll
    for (int mi = 0; mi < 2; ++mi)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        best[mi][h] = smaller(best[mi][h], shuffle_xor(best[mi][h], 1));
        best[mi][h] = smaller(best[mi][h], shuffle_xor(best[mi][h], 2));
        if (lane_index() % 4 == 0) scratch.best[half][warp_row + tile_row(mi, 2 * h)] = best[mi][h];
      }
    if (threadIdx.x < kBlockTile) scratch.owner[threadIdx.x] = INT_MAX;
    __syncthreads();
    if (a.medoids != nullptr)  // a medoid belongs to its own cluster, the lowest if several name it
      for (int j = threadIdx.x; j < stats.clusters; j += blockDim.x) {
        const int m = a.medoids[b * k + j] - row0;
        if (m >= 0 && m < kBlockTile) atomicMin(&scratch.owner[m], j);
      }
    __syncthreads();
    const int r = threadIdx.x, i = row0 + r;
    if (r < kBlockTile && i < n) {
      const Candidate nearest = smaller(scratch.best[0][r], scratch.best[1][r]);
      const bool valid = is_valid(a.mask, b * n + i) && stats.clusters > 0;
      const bool owned = scratch.owner[r] != INT_MAX;
      const int label = owned ? scratch.owner[r] : nearest.index == INT_MAX ? 0 : nearest.index;
      const float cost = normal_weight(a.weights, b * n + i, stats.weight_scale) * (square + nearest.value);
      a.label[b * n + i] = valid ? label : -1;
      a.cost[b * n + i] = valid && !owned && cost > 0.0f ? cost : 0.0f;  // NaN becomes 0
    }
    __syncthreads();
  }
}

}  // namespace cuda
}  // namespace tokenpool
