// What the CPU kernels take: plain structs, no torch. One copy of the kernels is compiled for every instruction set;
// `kernels()` is the copy chosen for this processor.
#pragma once
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../paths.h"

namespace tokenpool {

enum class DType : int { Float32, Float16, BFloat16, Float64 };  // numbers: those of cuda/sizes.h, which lacks the last

// Runs body(begin, end, context) over [0, count) on torch's thread pool.
using Body = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = void (*)(int64_t count, Body body, void* context);

// Ask for large pages (2 MB, where the system has them) for fresh memory: to touch a large output for the first time in
// small ones can cost as much as to compute it.
inline void prefer_large_pages(void* from, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(from) + kPage - 1) & ~(kPage - 1);
  const uintptr_t last = (reinterpret_cast<uintptr_t>(from) + static_cast<uintptr_t>(bytes)) & ~(kPage - 1);
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)from, (void)bytes;
#endif
}

// One batch of clusterings. "acc" is float, or double when dtype is Float64. Strides are in elements.
struct ClusterArgs {
  DType dtype;
  int64_t images, tokens, features, clusters, iterations;
  const void* x;  // [B, N, D] dtype; features contiguous
  int64_t x_image_stride, x_token_stride;
  const void* weights;        // [B, N] acc or null
  const bool* mask;           // [B, N] or null
  const int64_t* counts;      // [B] or null
  const int64_t* init_index;  // [B, K] or null
  const void* init_centers;   // [B, K, D] acc, or null; without either the farthest-first start is chosen here
  bool medoids, sort;
  int path;  // -1: the planner decides for each image
  int threads;
  ParallelFor parallel_for;
  void* centers;          // [B, K, D] dtype
  int64_t* assignment;    // [B, N]
  void* mass;             // [B, K] acc
  int64_t* medoid_index;  // [B, K]; K-Means: the member nearest to each mean
  void* inertia;          // [B] acc
};

struct PoolArgs {
  DType dtype;
  int64_t images, tokens, features, clusters;
  const void* x;  // [B, N, D] dtype; features contiguous
  int64_t x_image_stride, x_token_stride;
  const int64_t* assignment;  // [B, N]
  const void* weights;        // [B, N] acc or null
  int threads;
  ParallelFor parallel_for;
  // pool: centers and mass are written (plain_sum: sums instead of means, mass may be null).
  // pool_backward: centers, mass and grad_centers are read, grad_x and grad_weights (if weights) written.
  // unpool: centers is read and grad_x is written.
  bool plain_sum;
  void* centers;  // [B, K, D] dtype
  int64_t centers_image_stride, centers_row_stride;
  void* mass;                // [B, K] acc
  const void* grad_centers;  // [B, K, D] dtype
  int64_t grad_image_stride, grad_row_stride;
  void* grad_x;        // [B, N, D] dtype, contiguous
  void* grad_weights;  // [B, N] acc or null
};

struct AttentionArgs {
  DType dtype;
  int64_t images, heads, queries, keys, width;
  const void* q;  // [B, H, Nq, d] dtype; width contiguous
  int64_t q_strides[3];
  const void* k;  // [B, H, N, d] dtype; width contiguous
  int64_t k_strides[3];
  const void* lse;  // [B, H, Nq] acc, contiguous, or null
  double scale;
  int threads;
  ParallelFor parallel_for;
  void* partial;   // [B, H, N] acc workspace
  void* received;  // [B, N] acc
};

struct AssignArgs {
  DType dtype;
  int64_t images, tokens, features, clusters;
  const void* x;  // [B, N, D] dtype; features contiguous
  int64_t x_image_stride, x_token_stride;
  const void* centers;  // [B, K, D] acc
  const bool* mask;     // [B, N] or null
  int threads;
  ParallelFor parallel_for;
  int64_t* assignment;  // [B, N]
};

struct Kernels {
  const char* name;
  void (*cluster)(const ClusterArgs&);
  void (*assign)(const AssignArgs&);
  void (*pool)(const PoolArgs&);
  void (*pool_backward)(const PoolArgs&);
  void (*unpool)(const PoolArgs&);
  void (*attention_received)(const AttentionArgs&);
};

extern const Kernels kernels_baseline;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

// The best copy this processor runs, or the one TOKENPOOL_EXT_CPU_ISA (baseline, avx2, avx512) names.
const Kernels& kernels();

}  // namespace tokenpool
