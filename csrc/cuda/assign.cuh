// Nearest center of every token without a matrix of size N x K: a tiled product with the arg-min kept in registers.
//
// Grid: one block of 256 threads per (image, 128 tokens). Eight warps, 4 x 2, each 32 tokens x 32 of the 64 centers
// compared at a time. Half types multiply exact half tokens with centers split in two halves (high + low, already so in
// memory), so the centers keep about twice the digits of the type; float32 uses multiply-adds. While a chunk of
// features multiplies, the next one's copies are on their way; with keep_tokens the tokens are read with the first
// centers only.
#pragma once

#include "args_streaming.h"
#include "distances.cuh"
#include "tile.cuh"

namespace tokenpool {
namespace cuda {

// The two warps that share tokens, and the four lanes that share a row, each hold a candidate.
struct AssignScratch {
  Candidate best[2][kBlockTile];
  float square[kBlockTile];
  int owner[kBlockTile];
  float near[kBlockTile / kWarp], far[kBlockTile / kWarp];
  int last;
  int unresolved;
};

// acc += a b^T of one chunk for every part of the centers: the tokens' fragments are loaded once.
template <typename T>
__device__ inline void assign_product(TileAccumulator& acc, const T* a, int a_stride, const T* b) {
  constexpr int kChunk = stage_chunk(TypeTraits<T>::kType), kStride = stage_stride(TypeTraits<T>::kType, kChunk);
  constexpr int kBytes = sizeof(T);
  const SharedAddress left = left_matrices(a, a_stride), right = right_matrices(b, kStride);
#pragma unroll
  for (int k = 0; k < kChunk; k += 16) {
    uint32_t fa[2][4];
#pragma unroll
    for (int mi = 0; mi < 2; ++mi) load_matrices(fa[mi], left + kBytes * (16 * mi * a_stride + k));
#pragma unroll
    for (int part = 0; part < CenterSplit<T>::kParts; ++part)
      multiply_fragments<T>(acc, fa, right + kBytes * (part * kAssignClusters * kStride + k), kBytes * kStride);
  }
}

__device__ inline void assign_product(TileAccumulator& acc, const float* a, int a_stride, const float* b) {
  constexpr int kChunk = stage_chunk(DType::kFloat32);
  tile_product(acc, a, a_stride, b, stage_stride(DType::kFloat32, kChunk), kChunk);
}

// The nearest centers of the block's tokens by differences, into scratch.best. Each warp measures four tokens at a
// time.
template <typename T>
__device__ inline void nearest_by_differences(AssignScratch& scratch, const Image<T>& image, const T* centers,
                                              int clusters, int row0, int tokens, int features, float scale) {
  constexpr int kTokens = 4, kParts = CenterSplit<T>::kParts;
  const int width = center_columns(TypeTraits<T>::kType, features);
#pragma unroll 1
  for (int r0 = kTokens * warp_index(); r0 < kBlockTile; r0 += kTokens * warps_in_block()) {
    Candidate best[kTokens];
#pragma unroll
    for (int t = 0; t < kTokens; ++t) best[t] = Candidate{infinity(), INT_MAX};
#pragma unroll 1
    for (int j = 0; j < clusters; ++j) {
      const T* center = centers + static_cast<int64_t>(j) * kParts * width;
      float distance[kTokens] = {};
#pragma unroll 1
      for (int f = 4 * lane_index(); f < features; f += 4 * kWarp) {
        float c[4] = {};
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          const Four<T> four = *reinterpret_cast<const Four<T>*>(center + part * width + f);
#pragma unroll
          for (int e = 0; e < 4; ++e) c[e] += to_float(four.value[e]);
        }
#pragma unroll
        for (int t = 0; t < kTokens; ++t) {
          float v[4];
          load4(image, min(row0 + r0 + t, tokens - 1), f, features, v);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const float difference = v[e] * scale - c[e];
            distance[t] = fmaf(difference, difference, distance[t]);
          }
        }
      }
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        const float sum = warp_sum(distance[t]);
        if (sum < best[t].value) best[t] = Candidate{sum, j};
      }
    }
    if (lane_index() == 0)
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        scratch.best[0][r0 + t] = best[t];
        scratch.best[1][r0 + t] = Candidate{infinity(), INT_MAX};
      }
  }
}

// After the last of an image's blocks: can float32 resolve it? `near` and `far`: of this thread's token. By all threads
// of a block; ends without a barrier.
__device__ inline void decide_resolution(const AssignArgs& a, AssignScratch& scratch, int64_t work, int64_t image,
                                         int panels, float near, float far) {
  near = warp_sum(near);
  far = warp_sum(far);
  if (lane_index() == 0 && warp_index() < kBlockTile / kWarp) {
    scratch.near[warp_index()] = near;
    scratch.far[warp_index()] = far;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    near = far = 0.0f;
    for (int w = 0; w < kBlockTile / kWarp; ++w) {
      near += scratch.near[w];
      far += scratch.far[w];
    }
    a.near_far[2 * work] = near;
    a.near_far[2 * work + 1] = far;
    scratch.last = is_last_to_arrive(a.arrived + image, panels);
  }
  __syncthreads();
  if (!scratch.last) return;
  if (warp_index() == 0) {
    const float* sums = a.near_far + 2 * image * panels;
    near = sum_by_warp(panels, [&](int p) { return __ldcg(sums + 2 * p); });
    far = sum_by_warp(panels, [&](int p) { return __ldcg(sums + 2 * p + 1); });
    if (lane_index() == 0) a.unresolved[image] = scratch.unresolved = !resolved(near, far);
  }
  __syncthreads();
  if (scratch.unresolved && a.mean != nullptr)
    for (int f = threadIdx.x; f < a.shape.features; f += blockDim.x) a.mean[image * a.shape.features + f] = 0.0f;
}

template <typename T>
__global__ void __launch_bounds__(256, 2) assign_kernel(AssignArgs a) {
  TOKENPOOL_DYNAMIC_SHARED(memory);
  __shared__ AssignScratch scratch;
  constexpr DType kType = TypeTraits<T>::kType;
  constexpr int kParts = CenterSplit<T>::kParts;
  constexpr int kVector = RowVector<T>::kCount;
  constexpr int kChunk = stage_chunk(kType), kStride = stage_stride(kType, kChunk);
  constexpr int kColumns = kParts * kAssignClusters * kStride;  // elements of one chunk of 64 centers
  const int n = a.shape.tokens, k = a.shape.clusters, features = a.shape.features;
  const int width = center_columns(kType, features);
  const int row_stride = a.keep_tokens ? stage_stride(kType, width) : kStride;
  T* columns = reinterpret_cast<T*>(memory);
  T* rows = columns + 2 * kColumns;
  const int panels = assign_panels(n);
  const int64_t work_items = a.shape.batch * panels;
  const int half = warp_index() % 2, warp_row = warp_index() / 2 * kTile;
  for (int64_t work = blockIdx.x; work < work_items; work += gridDim.x) {
    const int64_t b = work / panels;
    if (a.done[b]) continue;  // the same for the whole block
    const bool exact = a.pass != AssignPass::kFirst && a.unresolved[b];
    if (a.pass == AssignPass::kAgain && !exact) continue;
    const int row0 = static_cast<int>(work % panels) * kBlockTile;
    const Image<T> image(a.x, b);
    const ImageStats stats = a.stats[b];
    const float* mean = a.mean == nullptr ? nullptr : a.mean + b * features;
    const T* centers = static_cast<const T*>(a.split) + b * k * kParts * width;
    const float* norms = a.norms + b * k;
    float square = 0.0f;  // ||x||^2 of token row0 + threadIdx.x, unless distances are whole
    if (exact) {
      nearest_by_differences(scratch, image, centers, stats.clusters, row0, n, features, stats.scale);
    } else {
      Candidate best[2][2];  // rows 16 mi + 8 h + lane / 4
#pragma unroll
      for (int mi = 0; mi < 2; ++mi)
#pragma unroll
        for (int h = 0; h < 2; ++h) best[mi][h] = Candidate{infinity(), INT_MAX};

      // Where the tokens of chunk k0 are, and the copies of one step: 64 centers, and the tokens unless they stay.
      const auto tokens_at = [&](int k0, int turn) {
        return a.keep_tokens ? rows + k0 : rows + turn * kBlockTile * kStride;
      };
      const auto fetch = [&](int j0, int k0, int turn) {
        constexpr int kVectors = kChunk / kVector;  // of a row; a thread keeps its column
        const unsigned thread = thread_index_anew(), column = thread % kVectors * kVector;
#pragma unroll
        for (int row = 0; row < kAssignClusters; row += 256 / kVectors) {
          const int r = row + static_cast<int>(thread / kVectors),
                    j = min(j0 + r, k - 1);  // rows beyond the last are compared by none
          const SharedAddress to = shared_address(columns + turn * kColumns + r * kStride + column);
          const T* from = centers + static_cast<int64_t>(j) * kParts * width + k0 + column;
#pragma unroll
          for (int part = 0; part < kParts; ++part)
            copy_async(to + sizeof(T) * part * kAssignClusters * kStride, from + part * width);
        }
        if (j0 == 0 || !a.keep_tokens)
          begin_rows(tokens_at(k0, turn), row_stride, image, row0, kBlockTile, n, k0, kChunk, features);
      };
      int turn = 0;
      fetch(0, 0, turn);
      for (int j0 = 0; j0 < max(1, stats.clusters); j0 += kAssignClusters) {
        TileAccumulator acc;
        clear(acc);
        for (int k0 = 0; k0 < width; k0 += kChunk, turn ^= 1) {
          const T* tokens = tokens_at(k0, turn);
          wait_for_copies();
          if ((j0 == 0 || !a.keep_tokens) && (stats.scale != 1.0f || mean != nullptr))
            scale_rows(tokens_at(k0, turn), row_stride, row0, kBlockTile, n, k0, kChunk, features, stats.scale, mean);
          __syncthreads();  // this step's rows are there, and nobody reads the last step's any more
          if (k0 + kChunk < width)
            fetch(j0, k0 + kChunk, turn ^ 1);
          else if (j0 + kAssignClusters < stats.clusters)
            fetch(j0 + kAssignClusters, 0, turn ^ 1);
          if (j0 == 0 && threadIdx.x < kBlockTile)
#pragma unroll 1
            for (int f = 0; f < kChunk; f += kVector) {
              const RowVector<T> v = *reinterpret_cast<const RowVector<T>*>(tokens + threadIdx.x * row_stride + f);
#pragma unroll
              for (int e = 0; e < kVector; ++e) square = fmaf(to_float(v.value[e]), to_float(v.value[e]), square);
            }
          assign_product(acc, tokens + warp_row * row_stride, row_stride,
                         columns + turn * kColumns + half * kTile * kStride);
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
              for (int h = 0; h < 2; ++h) {  // j ascends here: a tie stays with the lowest
                const float distance = norm - 2.0f * acc[mi][ni][2 * h + c];
                if (distance < best[mi][h].value) best[mi][h] = Candidate{distance, j};
              }
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
    float near = 0.0f, far = 0.0f;
    if (r < kBlockTile && i < n) {
      const Candidate nearest = smaller(scratch.best[0][r], scratch.best[1][r]);
      const bool valid = is_valid(a.mask, b * n + i) && stats.clusters > 0;
      const bool owned = scratch.owner[r] != INT_MAX;
      const int label = owned ? scratch.owner[r] : nearest.index == INT_MAX ? 0 : nearest.index;
      const float weight = normal_weight(a.weights, b * n + i, stats.weight_scale), distance = square + nearest.value;
      const float cost = weight * distance;
      if (valid && weight > 0.0f) {
        near = distance < 0.0f ? 0.0f : distance;
        far = square;
      }
      a.label[b * n + i] = valid ? label : -1;
      a.cost[b * n + i] = valid && !owned && cost > 0.0f ? cost : 0.0f;  // NaN becomes 0
    }
    if (a.pass == AssignPass::kFirst) decide_resolution(a, scratch, work, b, panels, near, far);
    __syncthreads();
  }
}

}  // namespace cuda
}  // namespace tokenpool
