// The sequence of launches behind each operator, and the workspace it needs. Plain C++: the CUDA library links it
// with the real launchers, the tests with the host simulator's, so both run the same sequence.
#pragma once

#include "../planner_cuda.h"
#include "args_pool.h"

namespace tokenpool {
namespace cuda {

struct ClusterCall {
  Shape shape;
  DType dtype;
  Tokens x;
  const float* weights;       // (B, N) or null
  const uint8_t* mask;        // (B, N) or null
  const int64_t* counts;      // (B,) or null
  const int64_t* init;        // (B, K) or null
  int64_t init_stride;        // from one image to the next; 0 where all start alike
  const float* init_centers;  // (B, K, D) or null; both null: farthest-first
  int iterations;
  int sort;
  void* centers;        // (B, K, D)
  int64_t* assignment;  // (B, N)
  float* mass;          // (B, K)
  int64_t* medoids;     // (B, K), or null for K-Means
  int64_t* nearest;     // (B, K) K-Means: the member nearest to each mean; null for K-Medoids
  float* inertia;       // (B,)
};

struct PoolCall {
  Shape shape;
  DType dtype;
  Tokens x;
  const int64_t* assignment;  // (B, N)
  const float* weights;       // (B, N) or null
  MeansMode mode;             // kMean, or kSum for the gradient of unpool
  void* centers;              // (B, K, D)
  float* mass;                // (B, K) or null
};

size_t pool_workspace_bytes(const Shape& shape, size_t shared_limit);
size_t attention_workspace_bytes(const AttentionArgs& args);

// All return 0, or the first cudaError_t. No host synchronisation; everything goes to `stream`.
int run_clustering(const CudaPlan& plan, const CudaProblem& problem, const ClusterCall& call, void* workspace,
                   void* stream);
int run_pool(const PoolCall& call, size_t shared_limit, void* workspace, void* stream);
int run_pool_backward(DType dtype, PoolBackwardArgs args, int* counts, void* stream);
int run_unpool(DType dtype, const UnpoolArgs& args, void* stream);
int run_attention_received(DType dtype, AttentionArgs args, void* workspace, void* stream);

}  // namespace cuda
}  // namespace tokenpool
