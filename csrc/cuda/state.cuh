// What one block knows about the image that it clusters from its Gram matrix, and how that goes in and out.
#pragma once

#include "common.cuh"

namespace tokenpool {
namespace cuda {

// The whole matrix in global memory: row l, column i is coalesced over i. At most 2048 rows, so 32 bits index it.
struct FullGram {
  float* g;
  int ld;
  __device__ int row(int l) const { return l * ld; }
  __device__ float at(int row_of_l, int, int i) const { return g[row_of_l + i]; }
  __device__ float operator()(int l, int i) const { return at(row(l), l, i); }
  __device__ void set(int l, int i, float value) const { g[row(l) + i] = g[row(i) + l] = value; }
};

// The lower triangle by rows in shared memory. Triangular numbers are a permutation of the 32 banks for 32
// consecutive rows, so a warp reads a row or a column without bank conflicts.
struct PackedGram {
  float* g;
  __device__ static int row(int l) { return l * (l + 1) / 2; }
  // Element (max, min) of l and i: for l > i, row(l) - row(i) >= l - i, so that it is the larger of the two offsets.
  __device__ float at(int row_of_l, int l, int i) const { return g[max(row_of_l + i, row(i) + l)]; }
  __device__ float operator()(int l, int i) const { return at(row(l), l, i); }
  __device__ void set(int l, int i, float value) const { g[row(l) + i] = value; }  // i <= l
};

// One token of a cluster's list as an assignment reads it: 16 bytes, one load.
struct alignas(16) Member {
  int token;
  int row;      // of the Gram matrix: row(token)
  float share;  // p of the token in its cluster's mean
  float norm;   // ||c_j||^2 in the last member of a cluster, infinite in the others
};

constexpr int kMoved = -1;

// One block's state in shared memory: state_words(N, K, bucket_warps, parts) words.
struct ClusterState {
  float* weight;    // [N] normalised; -1 for padding
  int* label;       // [N] -1 for padding
  int* previous;    // [N]
  int* order;       // [N] tokens by cluster
  Member* members;  // [N] the same as an assignment reads them, or [K] medoids, each a cluster
  float* cost;      // [N] w * squared distance; c_{a_i} . x_i during an update; tokens left open by an assignment (int)
  Candidate* nearest;  // [N] center that the last assignment found nearest, and its squared distance without ||x_i||^2
  int* start;          // [K + 1]
  int* count;          // [K] members; kMoved once the cluster's members, then once its center, is known to have changed
  int* medoid;         // [K]
  float* part;         // [K] of the inertia; before, norms of the means
  int* rank;  // [K] row of the output that cluster j fills; before, members of moved clusters before cluster j's
  int* base;  // [bucket_warps * K] of the sort by cluster, or [parts * N] candidates of an assignment

  __device__ ClusterState(float* weight_words, void* memory, int tokens, int clusters) {
    const int n = round_up(tokens, 4), k = round_up(clusters + 1, 4);
    int* words = static_cast<int*>(memory);
    weight = weight_words;
    label = words;
    previous = label + n;
    order = previous + n;
    members = reinterpret_cast<Member*>(order + n);
    cost = reinterpret_cast<float*>(members + n);
    nearest = reinterpret_cast<Candidate*>(cost + n);
    start = reinterpret_cast<int*>(nearest + n);
    count = start + k;
    medoid = count + k;
    part = reinterpret_cast<float*>(medoid + k);
    rank = reinterpret_cast<int*>(part + k);
    base = rank + k;
  }

  __device__ Candidate* candidates() const { return reinterpret_cast<Candidate*>(base); }
  __device__ int* open() const { return reinterpret_cast<int*>(cost); }
  __device__ float* norm() const { return part; }
  // First place of cluster j in `members`, where clusters that moved come first, `moved` members together; before:
  // members of all clusters below j.
  __device__ int place(int j, int before, int moved) const {
    return count[j] == kMoved ? rank[j] : moved + before - rank[j];
  }
};

struct ClusterProblem {
  int tokens;
  int clusters;  // effective K of this image
  int iterations;
  int bucket_warps;
  int parts;
  int candidates;  // that ClusterState::base holds
  bool with_medoids;
  bool sort;
  const int64_t* init;     // [K] of this image, or null
  const int* first_label;  // [N] of this image, or null; both null: farthest-first
  const float* first_cost;
  float first_unit;  // what turns first_cost into costs of the products' scale
};

__device__ inline ClusterProblem problem_of(const IterationArgs& a, int64_t image, const ImageStats& stats) {
  const int n = a.shape.tokens;
  ClusterProblem p;
  p.tokens = n;
  p.clusters = stats.clusters;
  p.iterations = a.iterations;
  p.bucket_warps = a.bucket_warps;
  p.parts = a.parts;
  p.candidates = static_cast<int>(base_words(n, a.shape.clusters, a.bucket_warps, a.parts) / 2);
  p.with_medoids = a.medoids != nullptr;
  p.sort = a.sort != 0;
  p.init = a.init == nullptr ? nullptr : a.init + image * a.init_stride;
  p.first_label = a.first_label == nullptr ? nullptr : a.first_label + image * n;
  p.first_cost = a.first_label == nullptr ? nullptr : a.first_cost + image * n;
  const float rescaled = a.first_label == nullptr ? 1.0f : stats.scale * a.first_stats[image].inv_scale;
  p.first_unit = rescaled * rescaled;
  return p;
}

// weight[i] of every token. The caller synchronises.
__device__ inline void load_weights(const IterationArgs& a, int64_t image, float weight_scale, float* weight) {
  const int n = a.shape.tokens;
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += blockDim.x)
    weight[i] = is_valid(a.mask, image * n + i) ? normal_weight(a.weights, image * n + i, weight_scale) : -1.0f;
}

__device__ inline void write_assignment(const IterationArgs& a, int64_t image, const ClusterState& s) {
  const int n = a.shape.tokens;
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    const int j = s.label[i];
    a.assignment[image * n + i] = j < 0 ? -1 : s.rank[j];
  }
}

// The members of every cluster, and the medoids, for the kernel that makes the means.
__device__ inline void write_lists(const IterationArgs& a, const ListArgs& lists, int64_t image, int clusters,
                                   const ClusterState& s) {
  const int n = a.shape.tokens, k = a.shape.clusters;
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += blockDim.x) lists.order[image * n + i] = s.order[i];
#pragma unroll 1
  for (int j = threadIdx.x; j < k; j += blockDim.x) {
    const bool used = j < clusters;
    const int64_t row = image * k + (used ? s.rank[j] : j);
    lists.segment_start[row] = used ? s.start[j] : 0;
    lists.segment_length[row] = used ? s.start[j + 1] - s.start[j] : 0;
    if (a.medoids != nullptr) a.medoids[row] = used ? s.medoid[j] : -1;
  }
  if (threadIdx.x == 0) lists.arrived[image] = 0;
}

}  // namespace cuda
}  // namespace tokenpool
