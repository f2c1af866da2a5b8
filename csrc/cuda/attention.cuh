// Attention that each token receives (contract section 9): sums of exp(scale q . k - lse) over queries and heads,
// with no matrix of size N x N in memory.
//
// The largest logit is taken off before the scale is applied, which may be so large that a logit overflows.
// lse_kernel  (only when the caller has no log-sum-exp): one block per (image, head, 128 queries), online over keys.
// received_kernel: one block per (image, head, 64 keys), over all queries in ascending tiles of 128.
// reduce_kernel: adds the heads in ascending order.
// Both tiled kernels: 256 threads, eight warps 4 x 2, each 32 queries x 32 keys.
#pragma once

#include "args_pool.h"
#include "tile.cuh"

namespace tokenpool {
namespace cuda {

// The queries and keys of head number `index` of all images' heads.
template <typename T>
struct AttentionHead {
  Image<T> q, k;

  __device__ AttentionHead(const AttentionArgs& a, int64_t index) : q(a.q, index / a.heads), k(a.k, index / a.heads) {
    q.data += index % a.heads * a.q_stride_head;
    k.data += index % a.heads * a.k_stride_head;
  }
};

// Logits (without scale) of 128 queries and 64 keys into each warp's accumulators. Ends with a barrier.
template <typename T>
__device__ inline void attention_tile(TileAccumulator& acc, unsigned char* memory, const AttentionHead<T>& head,
                                      const AttentionArgs& a, int query0, int key0) {
  constexpr DType kType = TypeTraits<T>::kType;
  const int chunk = stage_chunk(kType), stride = stage_stride(kType, chunk);
  T* rows = reinterpret_cast<T*>(memory);
  T* columns = rows + kBlockTile * stride;
  const int half = warp_index() % 2, warp_row = warp_index() / 2 * kTile;
  clear(acc);
  for (int k0 = 0; k0 < a.features; k0 += chunk) {
    copy_rows(rows, head.q, query0, kBlockTile, a.queries, k0, chunk, a.features);
    copy_rows(columns, head.k, key0, kAssignClusters, a.keys, k0, chunk, a.features);
    __syncthreads();
    tile_product(acc, rows + warp_row * stride, columns + half * kTile * stride, stride, chunk);
    __syncthreads();
  }
}

// Maximum of a row's logits so far, before scaling, and the sum of exponentials of their scaled distances to it.
struct RowSum {
  float largest;
  float sum;
};

__device__ inline float moved(RowSum row, float largest, float scale) {
  return row.sum == 0.0f ? 0.0f : row.sum * expf(scale * (row.largest - largest));
}

__device__ inline RowSum merge(RowSum a, RowSum b, float scale) {
  const float largest = fmaxf(a.largest, b.largest);
  return RowSum{largest, moved(a, largest, scale) + moved(b, largest, scale)};
}

template <typename T>
__global__ void __launch_bounds__(256, 2) lse_kernel(AttentionArgs a) {
  TOKENPOOL_DYNAMIC_SHARED(memory);
  __shared__ RowSum partial[2][kBlockTile];
  const int panels = (a.queries + kBlockTile - 1) / kBlockTile;
  const int64_t work_items = a.batch * a.heads * panels;
  const int half = warp_index() % 2, warp_row = warp_index() / 2 * kTile;
  const float sign = a.scale < 0.0f ? -1.0f : 1.0f, scale = sign * a.scale;
  for (int64_t work = blockIdx.x; work < work_items; work += gridDim.x) {
    const int64_t bh = work / panels;
    const AttentionHead<T> head(a, bh);
    const int query0 = static_cast<int>(work % panels) * kBlockTile;
    RowSum row[2][2];
#pragma unroll
    for (int mi = 0; mi < 2; ++mi)
#pragma unroll
      for (int r = 0; r < 2; ++r) row[mi][r] = RowSum{-infinity(), 0.0f};
    for (int key0 = 0; key0 < a.keys; key0 += kAssignClusters) {
      TileAccumulator acc;
      attention_tile(acc, memory, head, a, query0, key0);
#pragma unroll
      for (int mi = 0; mi < 2; ++mi)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          RowSum tile = {-infinity(), 0.0f};
#pragma unroll
          for (int ni = 0; ni < 4; ++ni)
#pragma unroll
            for (int c = 0; c < 2; ++c)
              if (key0 + half * kTile + tile_column(ni, c) < a.keys)
                tile.largest = fmaxf(tile.largest, sign * acc[mi][ni][2 * r + c]);
#pragma unroll
          for (int ni = 0; ni < 4; ++ni)
#pragma unroll
            for (int c = 0; c < 2; ++c)
              if (key0 + half * kTile + tile_column(ni, c) < a.keys)
                tile.sum += expf(scale * (sign * acc[mi][ni][2 * r + c] - tile.largest));
          row[mi][r] = merge(row[mi][r], tile, scale);
        }
    }
#pragma unroll
    for (int mi = 0; mi < 2; ++mi)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (int offset = 1; offset <= 2; offset *= 2) {
          RowSum other;
          other.largest = __shfl_xor_sync(kAllLanes, row[mi][r].largest, offset);
          other.sum = __shfl_xor_sync(kAllLanes, row[mi][r].sum, offset);
          row[mi][r] = merge(row[mi][r], other, scale);
        }
        if (lane_index() % 4 == 0) partial[half][warp_row + tile_row(mi, 2 * r)] = row[mi][r];
      }
    __syncthreads();
    const int i = query0 + static_cast<int>(threadIdx.x);
    if (threadIdx.x < kBlockTile && i < a.queries) {
      const RowSum total = merge(partial[0][threadIdx.x], partial[1][threadIdx.x], scale);
      a.top[bh * a.queries + i] = sign * total.largest;
      a.logs[bh * a.queries + i] = logf(total.sum);
    }
    __syncthreads();
  }
}

template <typename T>
__global__ void __launch_bounds__(256, 2) received_kernel(AttentionArgs a) {
  TOKENPOOL_DYNAMIC_SHARED(memory);
  __shared__ float partial[4][kAssignClusters];
  const int panels = (a.keys + kAssignClusters - 1) / kAssignClusters;
  const int64_t work_items = a.batch * a.heads * panels;
  const int half = warp_index() % 2, warp_row = warp_index() / 2 * kTile;
  for (int64_t work = blockIdx.x; work < work_items; work += gridDim.x) {
    const int64_t bh = work / panels;
    const AttentionHead<T> head(a, bh);
    const int key0 = static_cast<int>(work % panels) * kAssignClusters;
    float received[4][2] = {};  // of key 8 ni + 2 (lane % 4) + c
    for (int query0 = 0; query0 < a.queries; query0 += kBlockTile) {
      TileAccumulator acc;
      attention_tile(acc, memory, head, a, query0, key0);
#pragma unroll
      for (int mi = 0; mi < 2; ++mi)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int i = query0 + warp_row + tile_row(mi, 2 * r);
          if (i >= a.queries) continue;
          const float top = a.top ? a.top[bh * a.queries + i] : 0.0f;
          const float rest = (a.lse ? a.lse : a.logs)[bh * a.queries + i];
#pragma unroll
          for (int ni = 0; ni < 4; ++ni)
#pragma unroll
            for (int c = 0; c < 2; ++c) received[ni][c] += expf(a.scale * (acc[mi][ni][2 * r + c] - top) - rest);
        }
    }
#pragma unroll
    for (int ni = 0; ni < 4; ++ni)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
#pragma unroll
        for (int offset = 4; offset < kWarp; offset *= 2)
          received[ni][c] += __shfl_xor_sync(kAllLanes, received[ni][c], offset);
        if (lane_index() < 4) partial[warp_index() / 2][half * kTile + tile_column(ni, c)] = received[ni][c];
      }
    __syncthreads();
    const int key = key0 + static_cast<int>(threadIdx.x);
    if (threadIdx.x < kAssignClusters && key < a.keys) {
      float sum = 0.0f;
      for (int w = 0; w < 4; ++w) sum += partial[w][threadIdx.x];
      a.parts[bh * a.keys + key] = sum;
    }
    __syncthreads();
  }
}

__global__ void __launch_bounds__(256) reduce_kernel(AttentionArgs a) {
  const int64_t work_items = a.batch * a.keys;
  for (int64_t work = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; work < work_items;
       work += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const int64_t b = work / a.keys, key = work % a.keys;
    float sum = 0.0f;
    for (int h = 0; h < a.heads; ++h) sum += a.parts[(b * a.heads + h) * a.keys + key];
    a.received[work] = sum / (static_cast<float>(a.heads) * static_cast<float>(max(1, a.queries)));
  }
}

}  // namespace cuda
}  // namespace tokenpool
