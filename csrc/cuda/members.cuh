// Per-image bookkeeping by one thread block: the tokens of each cluster as a list, and the repair of empty clusters.
#pragma once

#include "common.cuh"

namespace tokenpool {
namespace cuda {

// Rank of this lane among the lanes with the same label, and how many lanes share it.
__device__ inline int rank_in_warp(int label, int* same) {
  const unsigned peers = __match_any_sync(kAllLanes, label);
  *same = __popc(peers);
  return __popc(peers & ((1u << lane_index()) - 1u));
}

// One warp sums count(j) over the clusters: store(j, sum over all below j). Returns the sum over all.
template <typename Count, typename Store>
__device__ inline int sum_below(int clusters, Count count, Store store) {
  int carry = 0;
  for (int j0 = 0; j0 < clusters; j0 += kWarp) {
    const int j = j0 + lane_index(), mine = j < clusters ? count(j) : 0;
    int sum = mine;
#pragma unroll
    for (int offset = 1; offset < kWarp; offset *= 2) {
      const int other = __shfl_up_sync(kAllLanes, sum, offset);
      if (lane_index() >= offset) sum += other;
    }
    if (j < clusters) store(j, carry + sum - mine);
    carry += __shfl_sync(kAllLanes, sum, kWarp - 1);
  }
  return carry;
}

// One warp visits tokens [begin, end) in ascending order, 32 at a time: place(token, j, p) for each token of a cluster
// j, where p counts that cluster's tokens before it, from what count[j] held. count[j] then holds one more for each.
template <typename Label, typename Place>
__device__ inline void count_in_order(const Label* label, int begin, int end, int clusters, int* count, Place place) {
#pragma unroll 1
  for (int i0 = begin; i0 < end; i0 += kWarp) {
    const int i = i0 + lane_index();
    const int64_t given = i < end ? static_cast<int64_t>(label[i]) : -1;
    const int j = given >= 0 && given < clusters ? static_cast<int>(given) : -1;
    int same;
    const int rank = rank_in_warp(j, &same);
    const int before = j >= 0 ? count[j] : 0;
    __syncwarp();
    if (j >= 0) place(i, j, before + rank);
    if (j >= 0 && rank == 0) count[j] = before + same;
    __syncwarp();
  }
}

// Stable counting sort of the tokens by label: order[start[j] .. start[j+1]) are the tokens of cluster j, ascending.
// Labels outside [0, clusters) are left out. `base` holds warps * clusters words and start clusters + 1; both may be
// in shared or global memory. Each of the first `warps` warps owns a contiguous range of tokens, which makes the
// sort stable without atomics. Ends with a barrier.
template <typename Label>
__device__ inline void bucket_tokens(const Label* label, int tokens, int clusters, int warps, int* base, int* start,
                                     int* order) {
  const int warp = warp_index();
  const int per_warp = round_up((tokens + warps - 1) / warps, kWarp);
  const int begin = min(warp * per_warp, tokens), end = min(begin + per_warp, tokens);
#pragma unroll 1
  for (int p = threadIdx.x; p < warps * clusters; p += blockDim.x) base[p] = 0;
  __syncthreads();
  if (warp < warps)
    count_in_order(label, begin, end, clusters, base + static_cast<int64_t>(warp) * clusters, [](int, int, int) {});
  __syncthreads();
#pragma unroll 1
  for (int j = threadIdx.x; j < clusters; j += blockDim.x) {
    int running = 0;
#pragma unroll 1
    for (int w = 0; w < warps; ++w) {
      int& slot = base[static_cast<int64_t>(w) * clusters + j];
      const int mine = slot;
      slot = running;
      running += mine;
    }
    start[j] = running;
  }
  __syncthreads();
  if (warp == 0) {
    const int all = sum_below(clusters, [&](int j) { return start[j]; }, [&](int j, int below) { start[j] = below; });
    if (lane_index() == 0) start[clusters] = all;
  }
  __syncthreads();
  if (warp < warps)
    count_in_order(label, begin, end, clusters, base + static_cast<int64_t>(warp) * clusters,
                   [&](int i, int j, int p) { order[start[j] + p] = i; });
  __syncthreads();
}

// Members of each of the first `clusters` clusters. Integer atomics: the counts do not depend on their order.
// Ends with a barrier.
__device__ inline void count_members(const int* label, int tokens, int clusters, int* count) {
#pragma unroll 1
  for (int j = threadIdx.x; j < clusters; j += blockDim.x) count[j] = 0;
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < tokens; i += blockDim.x)
    if (label[i] >= 0) atomicAdd(&count[label[i]], 1);
  __syncthreads();
}

// Contract section 2, step 2: every empty cluster, in ascending order, takes the token with the largest cost whose
// cluster has at least two members (the lowest index on a tie), and then costs nothing. cost is >= 0 and not NaN.
// Returns whether there were any. Ends with a barrier.
__device__ inline bool repair_empty(int* label, float* cost, int tokens, int clusters, int* count,
                                    BlockScratch& scratch) {
  int empty = 0;
#pragma unroll 1
  for (int j = threadIdx.x; j < clusters; j += blockDim.x) empty |= count[j] == 0;
  if (!__syncthreads_or(empty)) return false;
  for (int j = 0; j < clusters; ++j) {
    if (count[j] != 0) continue;  // the same for all threads: count changes only between the barriers below
    Candidate donor = {-1.0f, INT_MAX};
#pragma unroll 1
    for (int i = threadIdx.x; i < tokens; i += blockDim.x) {
      const int a = label[i];
      if (a >= 0 && count[a] >= 2) donor = larger(donor, Candidate{cost[i], i});
    }
    donor = block_larger(donor, scratch);
    if (threadIdx.x == 0 && donor.index != INT_MAX) {
      count[label[donor.index]] -= 1;
      count[j] = 1;
      label[donor.index] = j;
      cost[donor.index] = 0.0f;
    }
    __syncthreads();
  }
  __syncthreads();
  return true;
}

constexpr int kSurelySettled = 100;  // iterations: beyond, only rounding moves tokens to and fro

// Contract section 2: whether an assignment that changed labels ends an image, for it gains nothing.
__device__ inline bool gains_nothing(int iteration, bool repaired, float loss, float before) {
  return iteration > 0 && (repaired || iteration >= kSurelySettled) && !(loss < before);
}

// Ranks of the clusters by their first member when `sort` is set, else their own numbers. Cluster j's members are
// order[start[j] ..), length[j] of them; clusters are all non-empty. Ends with a barrier.
__device__ inline void rank_clusters(const int* order, const int* start, int clusters, bool sort, int* rank) {
#pragma unroll 1
  for (int j = threadIdx.x; j < clusters; j += blockDim.x) {
    int r = j;
    if (sort) {
      r = 0;
      const int mine = order[start[j]];
#pragma unroll 1
      for (int other = 0; other < clusters; ++other) r += order[start[other]] < mine;
    }
    rank[j] = r;
  }
  __syncthreads();
}

}  // namespace cuda
}  // namespace tokenpool
