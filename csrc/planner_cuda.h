// Chooses how the CUDA backend clusters: a pure function of shape, dtype, algorithm and device limits. Plain C++17
// with no torch and no CUDA, so its decisions are tested for any GPU on a machine without one.
//
// An image's result must not depend on its batch mates. So with a K for each image the path is that of K = N, whatever
// the largest K of the batch; and the batch size decides the number of blocks and of images per pass, and whether a
// shape of the path "resident" is spread over more blocks when there are few images (path "spread"): the two give the
// same bits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "cuda/sizes.h"
#include "paths.h"

namespace tokenpool {
namespace cuda {

struct CudaProblem {
  int64_t batch = 1;
  int tokens = 0;
  int features = 0;
  int clusters = 1;
  bool per_image_k = false;  // clusters is the batch's largest
  int iterations = 5;
  DType dtype = DType::kFloat32;
  bool with_medoids = false;
  bool init_is_centers = false;  // first centers given instead of token indices
  bool farthest = false;         // the kernels choose the start
  int major = 8;                 // compute capability
  int minor = 0;
  int sm_count = 0;         // 0: a usual number for the compute capability
  size_t shared_limit = 0;  // opt-in bytes per block; 0: from the compute capability
  int force_path = -1;      // a CudaPath, where it is possible; for tests and benchmarks
};

struct CudaPlan {
  CudaPath path = CudaPath::kGram;
  int launches = 0;         // kernels per pass
  int threads = 0;          // of the kernel that runs the iterations
  size_t shared_bytes = 0;  // of that kernel, dynamic
  int chunk = 0;            // features staged at once by the kernel that makes the Gram matrix
  int bucket_warps = 0;     // warps that sort tokens by cluster
  int parts = 1;            // groups of threads that share the clusters of one assignment
  bool bucket_in_global = false;
  bool assign_keeps = false;  // `assign` keeps a block's tokens in shared memory over all centers
  int blocks_per_sm = 0;      // images an SM holds at once
  int64_t images_per_pass = 1;
  int64_t passes = 1;
  int64_t blocks = 0;  // of the main kernel in one pass
  size_t workspace_bytes = 0;
  double flops = 0;         // multiply-adds times two, all images
  double bytes = 0;         // least traffic with global memory
  size_t shared_limit = 0;  // of a block on this device
  int sm_count = 0;
  double gram_cost = 0, direct_cost = 0;  // estimates that decide between "gram" and "streaming"
};

// Streaming multiprocessors of a usual device of this compute capability.
int usual_sm_count(int major, int minor);

// Largest shared memory of one block on a device of this compute capability, in bytes.
size_t shared_memory_limit(int major, int minor);

CudaPlan plan_cuda(const CudaProblem& problem);

std::string reason(const CudaProblem& problem, const CudaPlan& plan);  // why, in words

}  // namespace cuda
}  // namespace tokenpool

// The same through plain C, for ctypes.
//   problem: batch, tokens, features, clusters, iterations, dtype (0 float32, 1 float16, 2 bfloat16), with_medoids,
//            init_is_centers, major, minor, sm_count, shared_limit, force_path (-1: free), farthest, per_image_k  (15
//            numbers)
//   plan:    path, launches, threads, shared_bytes, chunk, bucket_warps, bucket_in_global, blocks_per_sm,
//            images_per_pass, passes, blocks, workspace_bytes, parts, assign_keeps, flops, bytes    (16 numbers)
//   text:    the reason, cut to text_bytes.
extern "C" void tokenpool_plan_cuda(const int64_t* problem, int64_t* plan, char* text, int text_bytes);
