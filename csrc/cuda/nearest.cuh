// The nearest center of every token of one image from its Gram matrix, by one thread block: the equations of
// cluster.cuh.
#pragma once

#include "distances.cuh"
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

// Whether the first assignment from this matrix can be trusted. One warp decides, so that the block's size does not.
template <typename Gram>
__device__ inline bool is_resolved(const Gram& gram, const ClusterState& s, int tokens, BlockScratch& scratch) {
  if (warp_index() == 0) {
    const float near = sum_by_warp(tokens, [&](int i) {
      const float distance = s.weight[i] > 0.0f ? gram(i, i) + s.nearest[i].value : 0.0f;
      return distance < 0.0f ? 0.0f : distance;
    });
    const float far = sum_by_warp(tokens, [&](int i) { return s.weight[i] > 0.0f ? gram(i, i) : 0.0f; });
    if (lane_index() == 0) scratch.resolved = resolved(near, far);
  }
  __syncthreads();
  return scratch.resolved;
}

}  // namespace cuda
}  // namespace tokenpool
