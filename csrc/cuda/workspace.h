// The temporary memory of a clustering: measured by the planner, handed out by the pipeline.
#pragma once

#include <algorithm>

#include "../planner_cuda.h"
#include "args.h"

namespace tokenpool {
namespace cuda {

// Hands out 256-byte aligned pieces of one buffer; with a null base it only measures.
class Carver {
 public:
  explicit Carver(void* base) : base_(static_cast<char*>(base)) {}

  template <typename Value>
  Value* take(int64_t count) {
    char* piece = base_ == nullptr ? nullptr : base_ + used_;
    used_ += (static_cast<size_t>(count) * sizeof(Value) + 255) / 256 * 256;
    return reinterpret_cast<Value*>(piece);
  }

  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

struct Workspace {
  StatsPartial* partials = nullptr;
  ImageStats* stats = nullptr;
  float* mean = nullptr;
  float* gram = nullptr;
  int64_t ld = 0;
  void* split = nullptr;
  float* means = nullptr;
  float* norms = nullptr;
  int* medoids = nullptr;
  int* done = nullptr;
  int* unresolved = nullptr;
  float* near_far = nullptr;
  float* loss = nullptr;
  int* label = nullptr;
  int* previous = nullptr;
  float* cost = nullptr;
  int* order = nullptr;
  int* segment_start = nullptr;
  int* segment_length = nullptr;
  int* bucket = nullptr;
  int* rank = nullptr;
  float* inertia_parts = nullptr;
  float* apart = nullptr;
  int* arrived = nullptr;
  int* key = nullptr;
  int* pick_key = nullptr;
  int* pick_index = nullptr;
  int64_t* chosen = nullptr;
  size_t bytes = 0;
};

inline int64_t bucket_words(int clusters, int warps) {
  return (warps + 1) * static_cast<int64_t>(clusters) + 1;
}

inline Workspace carve(const CudaPlan& plan, const CudaProblem& p, int64_t images, void* base) {
  Carver carver(base);
  Workspace w;
  const int64_t n = p.tokens, k = p.clusters, d = p.features;
  const bool resident = plan.path == CudaPath::kResident, streaming = plan.path == CudaPath::kStreaming;
  const bool spread = plan.path == CudaPath::kSpread;
  const bool measured = !(resident || spread) || p.init_is_centers;  // by the kernels of stats.cuh
  if (measured) w.partials = carver.take<StatsPartial>(images * std::max(1, stats_chunks(p.tokens)));
  if (measured || spread) {
    w.stats = carver.take<ImageStats>(images);
    if (p.dtype == DType::kFloat32) w.mean = carver.take<float>(images * d);
  }
  if (streaming || p.init_is_centers) {
    const int64_t row =
        center_parts(p.dtype) * center_columns(p.dtype, p.features) * static_cast<int64_t>(element_size(p.dtype));
    w.split = carver.take<char>(images * k * row);
    if (p.with_medoids) w.means = carver.take<float>(images * k * d);
    w.norms = carver.take<float>(images * k);
    w.done = carver.take<int>(images);
    w.unresolved = carver.take<int>(images);
    w.near_far = carver.take<float>(2 * images * std::max(1, assign_panels(p.tokens)));
    w.label = carver.take<int>(images * n);
    w.cost = carver.take<float>(images * n);
  }
  if (!resident) {
    w.order = carver.take<int>(images * n);
    w.segment_start = carver.take<int>(images * k);
    w.segment_length = carver.take<int>(images * k);
    w.inertia_parts = carver.take<float>(images * k);
    if (!p.with_medoids) w.apart = carver.take<float>(images * n);
  }
  if (!resident || p.init_is_centers) w.arrived = carver.take<int>(images);
  if (spread) w.gram = carver.take<float>(images * static_cast<int64_t>(packed_words(p.tokens)));
  if (plan.path == CudaPath::kGram) {
    w.ld = round_up(p.tokens, 4);
    w.gram = carver.take<float>(images * n * w.ld);
  }
  if (streaming && p.farthest) {
    const int64_t picks = 2 * images * farthest_chunks(p.tokens);
    w.key = carver.take<int>(images * n);
    w.pick_key = carver.take<int>(picks);
    w.pick_index = carver.take<int>(picks);
    w.chosen = carver.take<int64_t>(images * k);
  }
  if (streaming) {
    w.previous = carver.take<int>(images * n);
    w.loss = carver.take<float>(images);
    if (p.with_medoids) w.medoids = carver.take<int>(images * k);
    if (plan.bucket_in_global) w.bucket = carver.take<int>(images * bucket_words(p.clusters, plan.bucket_warps));
    w.rank = carver.take<int>(images * 3 * k);
  }
  w.bytes = carver.used();
  return w;
}

inline size_t workspace_bytes(const CudaPlan& plan, const CudaProblem& problem, int64_t images) {
  return carve(plan, problem, images, nullptr).bytes;
}

inline size_t bucket_bytes(int clusters, int bucket_warps) {
  return sizeof(int) * static_cast<size_t>(bucket_words(clusters, bucket_warps));
}

// Warps that sort by cluster, and whether their counters must live in global memory.
inline int bucket_warps_for(int clusters, size_t shared_limit, bool* in_global) {
  *in_global = false;
  for (int warps = 32; warps >= 8; warps /= 2)
    if (bucket_bytes(clusters, warps) + 1024 <= shared_limit) return warps;
  *in_global = true;
  return 32;
}

}  // namespace cuda
}  // namespace tokenpool
