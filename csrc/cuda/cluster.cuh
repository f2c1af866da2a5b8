// All iterations of K-Means or K-Medoids for one image by one thread block, from the image's Gram matrix G = X X^T.
//
// With p_l = w_l / W_j the coefficients of the mean of cluster j (contract.md section 4, "gram"):
//   c_j . x_i = sum_l p_l G_li          ||c_j||^2 = sum_i p_i (c_j . x_i)
// so ||x_i - c_j||^2 - G_ii = ||c_j||^2 - 2 c_j . x_i costs one pass over the rows of G, whatever the number of
// features. A thread owns column i and adds the rows of each cluster's members in ascending order: no atomics, and
// the same result for any number of threads.
#pragma once

#include "farthest.cuh"
#include "members.cuh"

namespace tokenpool {
namespace cuda {

__device__ inline void set_label(const ClusterState& s, int i, int nearest, float squared_distance) {
  const bool valid = s.weight[i] >= 0.0f;
  const float cost = s.weight[i] * squared_distance;
  s.label[i] = valid ? nearest : -1;
  s.cost[i] = valid && cost > 0.0f ? cost : 0.0f;  // NaN becomes 0
}

// Nearest center of every token: the mean of each list of members, or each medoid (to_medoids).
//
// One pass over the members, without a loop for each cluster: a product is complete, and its distance counts, in the
// cluster's last member; in the others the norm is infinite. The next rows are on their way meanwhile.
//
// With kSplit the block's threads form p.parts groups, each comparing a range of the clusters for all tokens: the same
// distances, and the same nearest center, by more threads. Candidates meet in shared memory.
template <int kColumns, bool kSplit, typename Gram>
__device__ inline void assign_from_gram(const Gram& gram, ClusterState& s, const ClusterProblem& p, bool to_medoids) {
  const int parts = kSplit ? p.parts : 1;
  const int width = blockDim.x / parts, part = kSplit ? threadIdx.x / width : 0;
  int first = p.clusters * part / parts, last = p.clusters * (part + 1) / parts;
  if (!to_medoids) {
    first = s.start[first];
    last = s.start[last];
  }
  const auto cluster_of = [&](int m) { return m < 0 ? 0 : to_medoids ? m : s.previous[s.order[m]]; };
  for (int i0 = threadIdx.x - part * width; i0 < p.tokens; i0 += kColumns * width) {
    int column[kColumns], nearest[kColumns];  // nearest: the last member of the nearest center's cluster
    float best[kColumns], product[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      column[c] = min(i0 + c * width, p.tokens - 1);
      nearest[c] = -1;
      best[c] = infinity();
      product[c] = 0.0f;
    }
#pragma unroll 4
    for (int m = first; m < last; ++m) {
      const Member member = s.members[m];
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        product[c] = fmaf(member.share, gram.at(member.row, member.token, column[c]), product[c]);
        const float distance = fmaf(-2.0f, product[c], member.norm);
        if (distance < best[c]) {
          best[c] = distance;
          nearest[c] = m;
        }
        if (member.norm != infinity()) product[c] = 0.0f;
      }
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int i = i0 + c * width;
      if (i >= p.tokens) continue;
      if (parts > 1)
        s.candidates()[part * p.tokens + i] = Candidate{best[c], nearest[c]};
      else
        set_label(s, i, cluster_of(nearest[c]), gram(i, i) + best[c]);
    }
  }
  if (parts == 1) return;
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < p.tokens; i += blockDim.x) {
    Candidate best = s.candidates()[i];
#pragma unroll 1
    for (int q = 1; q < parts; ++q) {  // ascending clusters: a tie stays with the lowest
      const Candidate other = s.candidates()[q * p.tokens + i];
      if (other.value < best.value) best = other;
    }
    set_label(s, i, cluster_of(best.index), gram(i, i) + best.value);
  }
}

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
__device__ inline float last_norm(float norm) { return fabsf(norm) < infinity() ? norm : __uint_as_float(0x7fc00000u); }

template <typename Gram>
__device__ inline Member medoid_member(const Gram& gram, int token) {
  return Member{token, gram.row(token), 1.0f, last_norm(gram(token, token))};
}

// Every member with its p_l: w_l / W_j, or 1 / count where W_j is 0. Norms are not known yet.
template <typename Gram>
__device__ inline void list_members(const Gram& gram, ClusterState& s, const ClusterProblem& p) {
#pragma unroll 1
  for (int j = threadIdx.x; j < p.clusters; j += blockDim.x) {
    const int begin = s.start[j], end = s.start[j + 1];
    float total = 0.0f;
#pragma unroll 1
    for (int m = begin; m < end; ++m) total += s.weight[s.order[m]];
#pragma unroll 1
    for (int m = begin; m < end; ++m) {
      const int token = s.order[m];
      const float share = total > 0.0f ? s.weight[token] / total : 1.0f / static_cast<float>(end - begin);
      s.members[m] = Member{token, gram.row(token), share, infinity()};
    }
  }
  __syncthreads();
}

// Norms of the means, or new medoids: the member nearest to the mean (contract section 3). Of two members the heavier
// one, decided on the weights: their distances to the mean differ by rounding only. Ends with a barrier.
template <typename Gram>
__device__ inline void update_from_gram(const Gram& gram, ClusterState& s, const ClusterProblem& p) {
  float* product = s.cost;  // c_{a_i} . x_i
#pragma unroll 1
  for (int i = threadIdx.x; i < p.tokens; i += blockDim.x) {
    const int j = s.label[i];
    float sum = 0.0f;
    if (j >= 0)
#pragma unroll 2
      for (int m = s.start[j]; m < s.start[j + 1]; ++m) {
        const Member member = s.members[m];
        sum = fmaf(member.share, gram.at(member.row, member.token, i), sum);
      }
    product[i] = sum;
  }
  __syncthreads();
#pragma unroll 1
  for (int j = threadIdx.x; j < p.clusters; j += blockDim.x) {
    const int begin = s.start[j], end = s.start[j + 1];
    if (p.with_medoids) {
      float total = 0.0f;
#pragma unroll 1
      for (int m = begin; m < end; ++m) total += s.weight[s.order[m]];
      int chosen = s.order[begin];
      float best = infinity();
#pragma unroll 1
      for (int m = begin; m < end && total > 0.0f; ++m) {
        const int i = s.order[m];
        const float distance = end - begin == 2 ? -s.weight[i] : gram(i, i) - 2.0f * product[i];
        if (distance < best) {
          best = distance;
          chosen = i;
        }
      }
      s.medoid[j] = chosen;
      s.members[j] = medoid_member(gram, chosen);
    } else {
      float sum = 0.0f;
#pragma unroll 1
      for (int m = begin; m < end; ++m) sum = fmaf(s.members[m].share, product[s.members[m].token], sum);
      s.members[end - 1].norm = last_norm(sum);
    }
  }
  __syncthreads();
}

// Runs the iterations. s.weight is set on entry. On return label, start, order, rank (and medoid) describe the final
// assignment; clusters == 0 leaves every label -1. All threads of the block call it.
template <int kColumns, bool kSplit, typename Gram>
__device__ inline void cluster_from_gram(const Gram& gram, ClusterState& s, const ClusterProblem& p,
                                         BlockScratch& scratch) {
  if (p.clusters == 0) {
#pragma unroll 1
    for (int i = threadIdx.x; i < p.tokens; i += blockDim.x) s.label[i] = -1;
    __syncthreads();
    return;
  }
  const bool from_tokens = p.first_label == nullptr;
  if (from_tokens) {
    if (p.init == nullptr) farthest_from_gram(gram, s, p, scratch);
#pragma unroll 1
    for (int j = threadIdx.x; j < p.clusters; j += blockDim.x) {
      if (p.init != nullptr) s.medoid[j] = static_cast<int>(max(int64_t{0}, min(p.init[j], int64_t{p.tokens - 1})));
      s.members[j] = medoid_member(gram, s.medoid[j]);
    }
  }
  __syncthreads();
  for (int t = 0; t < p.iterations; ++t) {
    if (t == 0 && !from_tokens) {
#pragma unroll 1
      for (int i = threadIdx.x; i < p.tokens; i += blockDim.x) {
        s.label[i] = p.first_label[i];
        s.cost[i] = p.first_cost[i];
      }
    } else {
      assign_from_gram<kColumns, kSplit>(gram, s, p, t == 0 || p.with_medoids);
    }
    __syncthreads();
    if (p.with_medoids) claim_medoids(s, p);
    count_members(s.label, p.tokens, p.clusters, s.count);
    repair_empty(s.label, s.cost, p.tokens, p.clusters, s.count, scratch);
    int changed = t == 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < p.tokens; i += blockDim.x) changed |= s.label[i] != s.previous[i];
    if (!__syncthreads_or(changed)) {
      // The previous lists and medoids still hold; only claim_medoids has overwritten s.order.
      if (p.with_medoids) bucket_tokens(s.label, p.tokens, p.clusters, p.bucket_warps, s.base, s.start, s.order);
      break;
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < p.tokens; i += blockDim.x) s.previous[i] = s.label[i];
    bucket_tokens(s.label, p.tokens, p.clusters, p.bucket_warps, s.base, s.start, s.order);
    if (p.with_medoids || t + 1 < p.iterations) {
      list_members(gram, s, p);
      update_from_gram(gram, s, p);
    }
  }
  rank_clusters(s.order, s.start, p.clusters, p.sort, s.rank);
}

}  // namespace cuda
}  // namespace tokenpool
