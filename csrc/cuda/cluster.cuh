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

#ifndef TOKENPOOL_COMPARE_ALL
#define TOKENPOOL_COMPARE_ALL 0  // 1: every assignment compares every token with every center (to test and to measure)
#endif

namespace tokenpool {
namespace cuda {

// The members [begin, end) of s.members that part `part` of `parts` compares: cut between clusters.
__device__ inline int cut(const ClusterState& s, int begin, int end, int part, int parts) {
  int m = begin + (end - begin) * part / parts;
#pragma unroll 1
  while (m > begin && m < end && s.members[m - 1].norm == infinity()) ++m;
  return m;
}

// Nearest center of each column among the clusters whose members are [begin, end) of s.members; found: the last member
// of that center's cluster, and the distance without ||x||^2.
//
// One pass over the members, without a loop for each cluster: a product is complete, and its distance counts, in the
// cluster's last member; in the others the norm is infinite. The next rows are on their way meanwhile.
template <int kColumns, int kUnroll, typename Gram>
__device__ inline void compare(const Gram& gram, const ClusterState& s, int begin, int end,
                               const int (&column)[kColumns], Candidate (&found)[kColumns]) {
  float product[kColumns];
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    found[c] = Candidate{infinity(), -1};
    product[c] = 0.0f;
  }
#pragma unroll kUnroll
  for (int m = begin; m < end; ++m) {
    const Member member = s.members[m];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      product[c] = fmaf(member.share, gram.at(member.row, member.token, column[c]), product[c]);
      const float distance = fmaf(-2.0f, product[c], member.norm);
      if (distance < found[c].value) found[c] = Candidate{distance, m};
      if (member.norm != infinity()) product[c] = 0.0f;
    }
  }
}

// Of the candidates that `parts` groups of threads found for one token, ascending clusters: a tie stays with the
// lowest.
__device__ inline Candidate nearest_of_parts(const Candidate* candidates, int parts, int stride) {
  Candidate best = candidates[0];
#pragma unroll 1
  for (int q = 1; q < parts; ++q) {
    const Candidate other = candidates[q * stride];
    if (other.value < best.value) best = other;
  }
  return best;
}

// Center `found` (its cluster: j) takes token i from the nearest so far where it is nearer, or as near and lower.
__device__ inline void take_if_nearer(ClusterState& s, int i, const Candidate& found, int j) {
  const Candidate before = s.nearest[i];
  if (found.index >= 0 && (found.value < before.value || (found.value == before.value && j < before.index)))
    s.nearest[i] = Candidate{found.value, j};
}

// Nearest center of every token: the mean of each list of members, or each medoid. s.label, s.cost.
//
// Only what moved is compared. A center whose members are the same is the same center, to the bit, and so are its
// distances: a token whose nearest center stayed needs only the centers that moved. If its nearest center moved and one
// that moved is now at least as near as that was, none of the others can be nearer, since none was. Only the rest, the
// `open` tokens (one in three after the first update of K = N / 2, then one in forty), is compared with the centers
// that stayed. Labels and distances are those of a comparison with all (first: there is no assignment before;
// everything stands in the first part of the list).
//
// With kSplit the block's threads form p.parts groups, each comparing a range of the clusters for all tokens: the same
// distances, and the same nearest center, by more threads. Candidates meet in shared memory. Ends with a barrier.
template <int kColumns, bool kSplit, typename Gram>
__device__ inline void assign_from_gram(const Gram& gram, ClusterState& s, const ClusterProblem& p,
                                        BlockScratch& scratch, bool first, bool from_starts) {
  const int moved = scratch.tally.moved, all = scratch.tally.all;
  first |= TOKENPOOL_COMPARE_ALL != 0;
  const auto cluster_of = [&](int m) { return m < 0 ? 0 : from_starts ? m : s.previous[s.members[m].token]; };
  // What the moved centers mean for token i, by all lanes of a warp (i < 0: no token).
  const auto settle = [&](int i, const Candidate& found) {
    bool open = false;
    if (i >= 0) {
      const Candidate now = {found.value, cluster_of(found.index)};
      const Candidate before = first ? now : s.nearest[i];
      if (!first && s.count[before.index] != kMoved) {
        take_if_nearer(s, i, found, now.index);
      } else {
        const bool as_near = now.value < before.value || (now.value == before.value && now.index <= before.index);
        open = !as_near && s.weight[i] >= 0.0f;
        s.nearest[i] = now;
      }
    }
    if (first) return;
    int count;
    const int rank = rank_in_warp(open, &count);
    int base = 0;
    if (open && rank == 0) base = atomicAdd(&scratch.tally.open, count);
    base = __reduce_max_sync(kAllLanes, base);
    if (open) s.open()[base + rank] = i;  // in any order: nothing is added over tokens
  };
  {
    const int parts = kSplit ? p.parts : 1, width = blockDim.x / parts, part = kSplit ? threadIdx.x / width : 0;
    const int begin = cut(s, 0, moved, part, parts), end = cut(s, 0, moved, part + 1, parts);
    const int thread = threadIdx.x - part * width;
    for (int i0 = thread; i0 - lane_index() < p.tokens; i0 += kColumns * width) {
      int column[kColumns];
#pragma unroll
      for (int c = 0; c < kColumns; ++c) column[c] = min(i0 + c * width, p.tokens - 1);
      Candidate found[kColumns];
      compare<kColumns, kSplit && kColumns == 1 ? 2 : 4>(gram, s, begin, end, column, found);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const int i = i0 + c * width < p.tokens ? i0 + c * width : -1;
        if (parts == 1)
          settle(i, found[c]);
        else if (i >= 0)
          s.candidates()[part * p.tokens + i] = found[c];
      }
    }
    if (parts > 1) {
      __syncthreads();
#pragma unroll 1
      for (int i0 = threadIdx.x; i0 - lane_index() < p.tokens; i0 += blockDim.x) {
        const int i = i0 < p.tokens ? i0 : -1;
        settle(i, i < 0 ? Candidate{infinity(), -1} : nearest_of_parts(s.candidates() + i, parts, p.tokens));
      }
    }
    __syncthreads();
  }
  const int open = scratch.tally.open;
  if (open > 0) {
    const int width = min(round_up(open, kWarp), static_cast<int>(blockDim.x));
    const int parts = max(1, min(static_cast<int>(blockDim.x) / width, p.candidates / open)),
              part = threadIdx.x / width;
    if (part < parts) {
      const int begin = cut(s, moved, all, part, parts), end = cut(s, moved, all, part + 1, parts);
#pragma unroll 1
      for (int q = threadIdx.x - part * width; q < open; q += width) {
        const int column[1] = {s.open()[q]};
        Candidate found[1];
        compare<1, 2>(gram, s, begin, end, column, found);
        if (parts == 1)
          take_if_nearer(s, column[0], found[0], cluster_of(found[0].index));
        else
          s.candidates()[part * open + q] = found[0];
      }
    }
    __syncthreads();
    if (parts > 1) {
#pragma unroll 1
      for (int q = threadIdx.x; q < open; q += blockDim.x) {
        const Candidate found = nearest_of_parts(s.candidates() + q, parts, open);
        take_if_nearer(s, s.open()[q], found, cluster_of(found.index));
      }
      __syncthreads();
    }
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < p.tokens; i += blockDim.x) {
    const bool valid = s.weight[i] >= 0.0f;
    const Candidate nearest = s.nearest[i];
    const float cost = s.weight[i] * (gram(i, i) + nearest.value);
    s.label[i] = valid ? nearest.index : -1;
    s.cost[i] = valid && cost > 0.0f ? cost : 0.0f;  // NaN becomes 0
  }
  __syncthreads();
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
      assign_from_gram<kColumns, kSplit>(gram, s, p, scratch, t == (from_tokens ? 0 : 1), t == 0);
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
}

}  // namespace cuda
}  // namespace tokenpool
