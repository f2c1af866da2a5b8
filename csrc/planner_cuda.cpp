#include "planner_cuda.h"

#include <algorithm>
#include <cstdio>

#include "cuda/workspace.h"

namespace tokenpool {
namespace cuda {

namespace {

// Bytes of workspace that a pass aims to stay under; a larger batch runs in several passes.
constexpr size_t kWorkspaceGoal = size_t{512} << 20;
constexpr int kGramMaxTokens = 2048;
constexpr int kResidentThreads = 256;
constexpr size_t kStaticShared = 4096;  // more than any kernel's static shared memory
constexpr size_t kScratchBytes = 1024;  // of it, in the kernels of one image's iterations
constexpr size_t kReserved = 1024;      // of an SM's shared memory, for each block; the opt-in limit leaves it out once
constexpr int kIterateThreads = 1024;   // that an SM's 65536 registers hold, at 64 each, in the path "gram"
constexpr int kMostParts = 4;

// Relative cost of one addition from a Gram matrix in L2 and of one multiply-add of a product: an SM reads about 16
// floats a clock from L2; it does about 1024 half multiply-adds a clock on tensor cores and 128 float32 ones.
// Estimates from data sheets, not measurements.
double addition_cost(DType dtype) {
  return dtype == DType::kFloat32 ? 128.0 / 16.0 : 1024.0 / 16.0;
}

// Shared memory of mean_of_tokens.
size_t mean_bytes(DType dtype) {
  return dtype == DType::kFloat32 ? kResidentThreads * 2 * sizeof(float) : 0;
}

size_t resident_bytes(const CudaProblem& p, int chunk, int bucket_warps) {
  const int padded = round_up(p.tokens, kTile);
  const size_t staged = stage_bytes(p.dtype, padded, chunk) + mean_bytes(p.dtype);
  const size_t weights = 4 * static_cast<size_t>(round_up(p.tokens, 4));
  const size_t state = 4 * state_words(p.tokens, p.clusters, bucket_warps, 1) - weights;
  return 4 * packed_words(p.tokens) + weights + std::max(staged, state);
}

bool plan_resident(const CudaProblem& p, size_t limit, CudaPlan* plan) {
  if (p.tokens > 1024) return false;  // far beyond any shared memory; keeps the arithmetic small
  bool found = false;
  for (int chunk = stage_chunk(p.dtype); chunk >= 32; chunk /= 2)
    for (int warps = kResidentThreads / 32; warps >= 1; warps /= 2) {
      const size_t bytes = resident_bytes(p, chunk, warps);
      if (bytes + kScratchBytes > limit) continue;
      const int together =
          static_cast<int>(std::min<size_t>(2, (limit + kReserved) / (bytes + kScratchBytes + kReserved)));
      if (found && together <= plan->blocks_per_sm) continue;
      found = true;
      plan->path = CudaPath::kResident;
      plan->threads = kResidentThreads;
      plan->shared_bytes = bytes;
      plan->chunk = chunk;
      plan->bucket_warps = warps;
      plan->blocks_per_sm = std::max(1, together);
    }
  if (found) plan->launches = 1 + (p.init_is_centers ? 6 : 0);
  return found;
}

// Threads in groups that share the clusters, each as wide as the columns ask; at least `least` threads.
void set_threads(CudaPlan* plan, int columns, int least) {
  const int width = round_up(columns, 32);
  plan->parts = std::max(std::max(1, least / width), std::min(kMostParts, 1024 / width));
  plan->threads = plan->parts * width;
}

// Makes a plan for "resident" one for "spread": the same bits from more blocks.
bool plan_spread(const CudaProblem& p, size_t limit, CudaPlan* plan) {
  CudaPlan spread = *plan;
  set_threads(&spread, p.tokens, 256);
  const size_t staged = std::max(stage_bytes(p.dtype, 2 * kTile, stage_chunk(p.dtype)), mean_bytes(p.dtype));
  const size_t weights = 4 * static_cast<size_t>(round_up(p.tokens, 4));
  for (int warps = std::min(spread.threads / 32, (p.tokens + 31) / 32); warps >= 1; warps /= 2) {
    const size_t state = 4 * state_words(p.tokens, p.clusters, warps, spread.parts) - weights;
    const size_t bytes = 4 * packed_words(p.tokens) + weights + std::max(staged, state);
    if (bytes + kScratchBytes > limit) continue;
    spread.path = CudaPath::kSpread;
    spread.shared_bytes = bytes;
    spread.bucket_warps = warps;
    spread.blocks_per_sm = 1;
    const int most = p.dtype == DType::kFloat32 ? 128 : 256;  // features staged at once: 34 KB
    for (spread.chunk = stage_chunk(p.dtype); spread.chunk < std::min(most, p.features);) spread.chunk *= 2;
    spread.launches = 3 + (p.dtype == DType::kFloat32 ? 1 : 0) + (p.init_is_centers ? 6 : 0);
    *plan = spread;
    return true;
  }
  return false;
}

bool plan_gram(const CudaProblem& p, size_t limit, CudaPlan* plan) {
  if (p.tokens > kGramMaxTokens) return false;
  CudaPlan gram = *plan;
  set_threads(&gram, (p.tokens + 1) / 2, 128);
  for (int warps = gram.threads / 32; warps >= 1; warps /= 2) {
    const size_t bytes = 4 * state_words(p.tokens, p.clusters, warps, gram.parts);
    if (bytes + kStaticShared > limit) continue;
    gram.path = CudaPath::kGram;
    gram.shared_bytes = bytes;
    gram.bucket_warps = warps;
    const size_t by_memory = (limit + kReserved) / (bytes + kScratchBytes + kReserved);
    gram.blocks_per_sm = std::max(1, static_cast<int>(std::min<size_t>(kIterateThreads / gram.threads, by_memory)));
    gram.launches = 5 + (p.init_is_centers ? 4 : 0);
    *plan = gram;
    return true;
  }
  return false;
}

void plan_streaming(const CudaProblem& p, size_t limit, CudaPlan* plan) {
  plan->path = CudaPath::kStreaming;
  plan->threads = 1024;
  plan->bucket_warps = bucket_warps_for(p.clusters, limit, &plan->bucket_in_global);
  plan->shared_bytes = plan->bucket_in_global ? 0 : bucket_bytes(p.clusters, plan->bucket_warps);
  plan->blocks_per_sm = 1;
  const int updates = p.with_medoids ? p.iterations : p.iterations - 1;
  plan->launches = 5 + 2 * p.iterations + updates + 2 + (p.farthest ? p.clusters + 1 : 0);
}

// Blocks of `assign` an SM holds at once: its registers allow two.
size_t assign_blocks(const CudaProblem& p, size_t limit, bool keep) {
  return std::min<size_t>(2,
                          (limit + kReserved) / (assign_bytes(p.dtype, p.features, keep) + kStaticShared + kReserved));
}

}  // namespace

int usual_sm_count(int major, int minor) {
  if (major == 8 && minor == 0) return 108;
  if (major == 8) return minor == 6 ? 84 : 128;
  if (major == 9) return 132;
  if (major == 10 || major == 11) return 148;
  return major >= 12 ? 170 : 64;
}

size_t shared_memory_limit(int major, int minor) {
  if (major == 8 && (minor == 0 || minor == 7)) return 163 * 1024;
  if (major == 8) return 99 * 1024;
  if (major == 9 || major == 10 || major == 11) return 227 * 1024;
  if (major >= 12) return 99 * 1024;
  return 48 * 1024;
}

CudaPlan plan_cuda(const CudaProblem& p) {
  CudaPlan plan;
  CudaProblem chosen_for = p;
  if (p.per_image_k) chosen_for.clusters = std::max(p.tokens, 1);
  const size_t limit = p.shared_limit != 0 ? p.shared_limit : shared_memory_limit(p.major, p.minor);
  const double n = p.tokens, d = p.features, k = chosen_for.clusters, t = p.iterations;
  const double parts = p.dtype == DType::kFloat32 ? 1 : 2;
  const double gram_cost = n * n * (d / 2 + t * addition_cost(p.dtype));
  const double direct_cost = t * n * k * d * parts;
  CudaPlan streaming = plan;
  plan_streaming(p, limit, &streaming);
  const bool free = p.force_path < 0;
  const auto allowed = [&](CudaPath path) { return free || p.force_path == static_cast<int>(path); };
  const int sms = p.sm_count > 0 ? p.sm_count : usual_sm_count(p.major, p.minor);
  const bool few = free ? p.batch <= sms : p.force_path == static_cast<int>(CudaPath::kSpread);
  if ((allowed(CudaPath::kResident) || few) && plan_resident(chosen_for, limit, &plan)) {
    if (few) plan_spread(chosen_for, limit, &plan);
  } else if (!(allowed(CudaPath::kGram) && plan_gram(chosen_for, limit, &plan) &&
               (!free || gram_cost <= direct_cost))) {
    plan = streaming;
  }
  plan.shared_limit = limit;
  // Tokens stay where that costs no block an SM: read and scaled once, not for every 64 centers.
  plan.assign_keeps =
      assign_blocks(p, limit, true) > 0 && assign_blocks(p, limit, true) >= assign_blocks(p, limit, false);
  plan.sm_count = sms;
  plan.gram_cost = gram_cost;
  plan.direct_cost = direct_cost;
  const size_t one = workspace_bytes(plan, p, 1), two = workspace_bytes(plan, p, 2);
  const size_t each = std::max<size_t>(1, two - one);
  const int64_t batch = std::max<int64_t>(p.batch, 0);
  plan.images_per_pass =
      std::min(std::max<int64_t>(batch, 1), std::max<int64_t>(1, static_cast<int64_t>(kWorkspaceGoal / each)));
  plan.passes = (batch + plan.images_per_pass - 1) / plan.images_per_pass;
  plan.workspace_bytes = workspace_bytes(plan, p, plan.images_per_pass);
  plan.blocks = plan.images_per_pass;
  const double product = plan.path == CudaPath::kStreaming ? 2 * direct_cost : n * n * d;
  plan.flops = static_cast<double>(batch) * product;
  const double size = static_cast<double>(element_size(p.dtype));
  plan.bytes = static_cast<double>(batch) * (n * d * size + k * d * size + 8 * n + 4 * k);
  return plan;
}

std::string reason(const CudaProblem& p, const CudaPlan& plan) {
  char text[320];
  switch (plan.path) {
    case CudaPath::kSpread:
      std::snprintf(
          text, sizeof(text),
          "%lld image(s) on %d multiprocessors: each image's Gram matrix by many blocks, its iterations by one block "
          "of %d threads in %zu of %zu bytes of shared memory, its means by many",
          static_cast<long long>(p.batch), plan.sm_count, plan.threads, plan.shared_bytes, plan.shared_limit);
      return text;
    case CudaPath::kResident:
      std::snprintf(text, sizeof(text),
                    "the lower triangle of the %d x %d Gram matrix and the state of one image take %zu of %zu bytes of "
                    "shared memory: one launch, %d image(s) an SM",
                    p.tokens, p.tokens, plan.shared_bytes, plan.shared_limit, plan.blocks_per_sm);
      return text;
    case CudaPath::kGram:
      std::snprintf(
          text, sizeof(text),
          "one image's Gram matrix exceeds shared memory but fits the L2 cache; estimated cost %.3g against %.3g for "
          "direct products",
          plan.gram_cost, plan.direct_cost);
      return text;
    case CudaPath::kStreaming:
      if (p.force_path >= 0) return "asked for, or the path asked for cannot hold this shape";
      if (p.tokens > kGramMaxTokens)
        std::snprintf(text, sizeof(text), "%d tokens are more than the %d a Gram matrix is made for", p.tokens,
                      kGramMaxTokens);
      else
        std::snprintf(text, sizeof(text), "estimated cost of direct products %.3g against %.3g for the Gram matrix",
                      plan.direct_cost, plan.gram_cost);
      return text;
  }
  return "unknown";
}

}  // namespace cuda
}  // namespace tokenpool

extern "C" void tokenpool_plan_cuda(const int64_t* problem, int64_t* plan, char* text, int text_bytes) {
  using namespace tokenpool::cuda;
  CudaProblem p;
  p.batch = problem[0];
  p.tokens = static_cast<int>(problem[1]);
  p.features = static_cast<int>(problem[2]);
  p.clusters = static_cast<int>(problem[3]);
  p.iterations = static_cast<int>(problem[4]);
  p.dtype = static_cast<DType>(problem[5]);
  p.with_medoids = problem[6] != 0;
  p.init_is_centers = problem[7] != 0;
  p.major = static_cast<int>(problem[8]);
  p.minor = static_cast<int>(problem[9]);
  p.sm_count = static_cast<int>(problem[10]);
  p.shared_limit = static_cast<size_t>(problem[11]);
  p.force_path = static_cast<int>(problem[12]);
  p.farthest = problem[13] != 0;
  p.per_image_k = problem[14] != 0;
  const CudaPlan result = plan_cuda(p);
  const int64_t numbers[16] = {static_cast<int64_t>(result.path),
                               result.launches,
                               result.threads,
                               static_cast<int64_t>(result.shared_bytes),
                               result.chunk,
                               result.bucket_warps,
                               result.bucket_in_global ? 1 : 0,
                               result.blocks_per_sm,
                               result.images_per_pass,
                               result.passes,
                               result.blocks,
                               static_cast<int64_t>(result.workspace_bytes),
                               result.parts,
                               result.assign_keeps ? 1 : 0,
                               static_cast<int64_t>(result.flops),
                               static_cast<int64_t>(result.bytes)};
  std::copy(numbers, numbers + 16, plan);
  if (text != nullptr && text_bytes > 0)
    std::snprintf(text, static_cast<size_t>(text_bytes), "%s", reason(p, result).c_str());
}
