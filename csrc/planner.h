// Chooses how a clustering on the CPU is computed. Plain C++17, no torch: decisions are tested anywhere.
#pragma once
#include <cstdint>
#include <string>

namespace tokenpool {

// Does a direct problem keep its packed tokens and their products with the centers between iterations? Not if they are large.
inline bool keeps_products(int64_t tokens, int64_t clusters, int64_t features, int acc_bytes) {
  constexpr int64_t kKeptBytes = 24 << 20;
  return tokens * (clusters > features ? clusters : features) * acc_bytes <= kKeptBytes;
}

// One image's problem. The batch size and the number of threads are absent on purpose: they must not change a result.
struct CpuProblem {
  int64_t tokens, clusters, features, iterations;
  int acc_bytes = 4;          // 4 (float32 arithmetic) or 8
  bool centers_given = false; // the start is centers, not tokens: the gram path needs one direct pass first
};

struct CpuPlan {
  bool gram;              // else direct
  bool kept;              // direct: products are kept between iterations, else streamed
  double gram_ns, direct_ns;  // predicted single-thread time
  double flops;           // of the chosen path (a multiply-add is 2)
  double workspace_bytes; // of the chosen path, per thread
  std::string reason;
};

CpuPlan plan_cpu(const CpuProblem& problem);

}  // namespace tokenpool
