// All iterations of K-Means or K-Medoids for one image by one thread block, from the image's Gram matrix G = X X^T.
//
// With p_l = w_l / W_j the coefficients of the mean of cluster j (contract.md section 4, "gram"):
//   c_j . x_i = sum_l p_l G_li          ||c_j||^2 = sum_i p_i (c_j . x_i)
// so ||x_i - c_j||^2 - G_ii = ||c_j||^2 - 2 c_j . x_i costs one pass over the rows of G, whatever the number of
// features. A thread owns column i and adds the rows of each cluster's members in ascending order: no atomics, and
// the same result for any number of threads.
#pragma once

#include "farthest.cuh"
#include "nearest.cuh"

namespace tokenpool {
namespace cuda {

// A medoid belongs to its own cluster, the lowest if several name it. s.order is free during an assignment to medoids.
__device__ inline void claim_medoids(ClusterState& s, const ClusterProblem& p) {
  int* owner = s.order;
#pragma unroll 1
  for (int i = threadIdx.x; i < p.tokens; i += blockDim.x) owner[i] = INT_MAX;
  __syncthreads();
#pragma unroll 1
  for (int j = threadIdx.x; j < p.clusters; j += blockDim.x) atomicMin(&owner[s.medoid[j]], j);
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < p.tokens; i += blockDim.x)
    if (owner[i] != INT_MAX && s.weight[i] >= 0.0f) {
      s.label[i] = owner[i];
      s.cost[i] = 0.0f;
    }
  __syncthreads();
}

// A norm as Member keeps it. A center whose norm is not finite is nearest to nothing, and must end its list.
__device__ inline float last_norm(float norm) {
  return fabsf(norm) < infinity() ? norm : __uint_as_float(0x7fc00000u);
}

template <typename Gram>
__device__ inline Member medoid_member(const Gram& gram, int token) {
  return Member{token, gram.row(token), 1.0f, last_norm(gram(token, token))};
}

// Where each cluster's list begins in s.members (s.place): lists of clusters that moved first, both parts in ascending
// order. length(j): members of the list; moved(j): asked once for each cluster, then s.count keeps it. Ends with a
// barrier.
template <typename Length, typename Moved>
__device__ inline void place_lists(ClusterState& s, BlockScratch& scratch, int clusters, int all, Length length,
                                   Moved moved) {
  if (warp_index() == 0) {
    const int total = sum_below(
        clusters,
        [&](int j) {
          const bool moves = TOKENPOOL_COMPARE_ALL || moved(j);
          s.count[j] = moves ? kMoved : 0;
          return moves ? length(j) : 0;
        },
        [&](int j, int below) { s.rank[j] = below; });
    if (lane_index() == 0) scratch.tally = Tally{total, all, 0};
  }
  __syncthreads();
}

// Every member with its p_l: w_l / W_j, or 1 / count where W_j is 0. Norms of clusters that moved are not known yet.
template <typename Gram>
__device__ inline void list_members(const Gram& gram, ClusterState& s, const ClusterProblem& p, int moved) {
#pragma unroll 1
  for (int j = threadIdx.x; j < p.clusters; j += blockDim.x) {
    const int begin = s.start[j], end = s.start[j + 1], offset = s.place(j, begin, moved) - begin;
    float total = 0.0f;
    int heavy = s.order[begin];  // a member that counts
#pragma unroll 1
    for (int m = begin; m < end; ++m) {
      const int token = s.order[m];
      total += s.weight[token];
      if (s.weight[token] > 0.0f) heavy = token;
    }
#pragma unroll 1
    for (int m = begin; m < end; ++m) {
      int token = s.order[m];
      const float share = total > 0.0f ? s.weight[token] / total : 1.0f / static_cast<float>(end - begin);
      if (share == 0.0f) token = heavy;  // 0 times its products, even where they are infinite
      const float norm = m + 1 < end || s.count[j] == kMoved ? infinity() : s.norm()[j];
      s.members[offset + m] = Member{token, gram.row(token), share, norm};
    }
  }
  __syncthreads();
}

// The member of cluster j nearest to its mean (contract section 3). Of two members the heavier one, decided on the
// weights: their distances to the mean differ by rounding only. product: c_j . x_i of its members.
template <typename Gram>
__device__ inline int nearest_member(const Gram& gram, const ClusterState& s, int j, const float* product) {
  const int begin = s.start[j], end = s.start[j + 1];
  float total = 0.0f;
#pragma unroll 1
  for (int m = begin; m < end; ++m) total += s.weight[s.order[m]];
  int chosen = s.order[begin];
  float best = infinity();
#pragma unroll 1
  for (int m = begin; m < end && total > 0.0f; ++m) {
    const int i = s.order[m];
    if (!(s.weight[i] > 0.0f)) continue;  // what weighs nothing moves nothing
    const float distance = end - begin == 2 ? -s.weight[i] : gram(i, i) - 2.0f * product[i];
    if (distance < best) {
      best = distance;
      chosen = i;
    }
  }
  return chosen;
}

// Norms of the means, or new medoids, of the clusters whose members changed, and the list for the next assignment.
// Medoids move less often than members do: s.count is set anew for them. (K-Medoids starts from tokens: there always is
// an old one.)
template <typename Gram>
__device__ inline void update_from_gram(const Gram& gram, ClusterState& s, const ClusterProblem& p,
                                        BlockScratch& scratch) {
  float* product = s.cost;  // c_{a_i} . x_i
#pragma unroll 1
  for (int i = threadIdx.x; i < p.tokens; i += blockDim.x) {
    const int j = s.label[i];
    if (j < 0 || s.count[j] != kMoved) continue;
    const int begin = s.rank[j], end = begin + s.start[j + 1] - s.start[j];
    float sum = 0.0f;
#pragma unroll 2
    for (int m = begin; m < end; ++m) {
      const Member member = s.members[m];
      sum = fmaf(member.share, gram.at(member.row, member.token, i), sum);
    }
    product[i] = sum;
  }
  __syncthreads();
#pragma unroll 1
  for (int j = threadIdx.x; j < p.clusters; j += blockDim.x) {
    if (s.count[j] != kMoved) continue;
    if (p.with_medoids) {
      const int chosen = nearest_member(gram, s, j, product);
      if (chosen == s.medoid[j]) s.count[j] = 0;
      s.medoid[j] = chosen;
    } else {
      const int begin = s.rank[j], end = begin + s.start[j + 1] - s.start[j];
      float sum = 0.0f;
#pragma unroll 1
      for (int m = begin; m < end; ++m) sum = fmaf(s.members[m].share, product[s.members[m].token], sum);
      s.norm()[j] = s.members[end - 1].norm = last_norm(sum);
    }
  }
  __syncthreads();
  if (!p.with_medoids) return;
  place_lists(s, scratch, p.clusters, p.clusters, [](int) { return 1; }, [&](int j) { return s.count[j] == kMoved; });
#pragma unroll 1
  for (int j = threadIdx.x; j < p.clusters; j += blockDim.x)
    s.members[s.place(j, j, scratch.tally.moved)] = medoid_member(gram, s.medoid[j]);
  __syncthreads();
}

// Runs the iterations; false, with nothing done, where they must run from distances (fill_with_distances) instead.
// s.weight is set on entry. On return label, start, order, rank (and medoid) describe the final
// assignment; clusters == 0 leaves every label -1. All threads of the block call it.
template <int kColumns, bool kSplit, typename Gram>
__device__ inline bool cluster_from_gram(const Gram& gram, ClusterState& s, const ClusterProblem& p,
                                         BlockScratch& scratch) {
  if (p.clusters == 0) {
#pragma unroll 1
    for (int i = threadIdx.x; i < p.tokens; i += blockDim.x) s.label[i] = -1;
    __syncthreads();
    return true;
  }
  const bool from_tokens = p.first_label == nullptr;
  if (from_tokens) {
    if (p.init == nullptr) farthest_from_gram(gram, s, p, scratch);
#pragma unroll 1
    for (int j = threadIdx.x; j < p.clusters; j += blockDim.x) {
      if (p.init != nullptr) s.medoid[j] = static_cast<int>(max(int64_t{0}, min(p.init[j], int64_t{p.tokens - 1})));
      s.members[j] = medoid_member(gram, s.medoid[j]);
      s.norm()[j] = s.members[j].norm;
    }
    if (threadIdx.x == 0) scratch.tally = Tally{p.clusters, p.clusters, 0};
  }
  __syncthreads();
  for (int t = 0; t < p.iterations; ++t) {
    if (t == 0 && !from_tokens) {
#pragma unroll 1
      for (int i = threadIdx.x; i < p.tokens; i += blockDim.x) {
        s.label[i] = p.first_label[i];
        s.cost[i] = p.first_cost[i] * p.first_unit;
      }
      __syncthreads();
    } else {
      const bool first = t == (from_tokens ? 0 : 1);
      assign_from_gram<kColumns, kSplit>(gram, s, p, scratch, first, t == 0);
      if (first && !is_resolved(gram, s, p.tokens, scratch)) return false;
    }
    if (p.with_medoids) claim_medoids(s, p);
    count_members(s.label, p.tokens, p.clusters, s.count);
    const bool repaired = repair_empty(s.label, s.cost, p.tokens, p.clusters, s.count, scratch);
    int changed = t == 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < p.tokens; i += blockDim.x) changed |= s.label[i] != s.previous[i];
    if (warp_index() == 0) {
      const float loss = sum_by_warp(p.tokens, [&](int i) { return s.cost[i]; });
      if (lane_index() == 0) scratch.loss[t & 1] = loss;
    }
    changed = __syncthreads_or(changed);
    if (!changed || gains_nothing(t, repaired, scratch.loss[t & 1], scratch.loss[~t & 1])) {
      // The previous lists and medoids still hold; only claim_medoids has overwritten s.order.
#pragma unroll 1
      for (int i = threadIdx.x; i < p.tokens; i += blockDim.x) s.label[i] = s.previous[i];
      __syncthreads();
      if (p.with_medoids) bucket_tokens(s.label, p.tokens, p.clusters, p.bucket_warps, s.base, s.start, s.order);
      break;
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < p.tokens; i += blockDim.x) {
      const int from = s.previous[i], to = s.label[i];
      s.previous[i] = to;
      if (t == 0 || from == to) continue;
      atomicMin(&s.count[from], kMoved);
      atomicMin(&s.count[to], kMoved);
    }
    bucket_tokens(s.label, p.tokens, p.clusters, p.bucket_warps, s.base, s.start, s.order);
    if (p.with_medoids || t + 1 < p.iterations) {
      // A token alone in the cluster that started from it is that cluster's center already.
      const auto length = [&](int j) { return s.start[j + 1] - s.start[j]; };
      const auto as_started = [&](int j) {
        return from_tokens && length(j) == 1 && s.order[s.start[j]] == s.medoid[j];
      };
      place_lists(s, scratch, p.clusters, s.start[p.clusters], length,
                  [&](int j) { return t == 0 ? !as_started(j) : s.count[j] == kMoved; });
      list_members(gram, s, p, scratch.tally.moved);
      update_from_gram(gram, s, p, scratch);
    }
  }
  rank_clusters(s.order, s.start, p.clusters, p.sort, s.rank);
  return true;
}

}  // namespace cuda
}  // namespace tokenpool
