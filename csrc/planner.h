// Chooses how a clustering on the CPU is computed. Plain C++17, no torch: decisions are tested anywhere.
#pragma once
#include <cstdint>
#include <string>

namespace tokenpool {

// A direct problem whose packed tokens or products with the centers need more than this keeps neither between iterations.
constexpr int64_t kKeptBytes = 24 << 20;

// One image's problem. The batch size and the number of threads are absent on purpose: they must not change a result.
struct CpuProblem {
  int64_t tokens, clusters, features, iterations;
  int acc_bytes = 4;          // 4 (float32 arithmetic) or 8
  bool centers_given = false; // the start is centers, not tokens: the gram path needs one direct pass first
};

struct CpuPlan {
  bool gram;              // else direct
  double gram_ns, direct_ns;  // predicted single-thread time
  double flops;           // of the chosen path (a multiply-add is 2)
  double workspace_bytes; // of the chosen path, per thread
  std::string reason;
};

CpuPlan plan_cpu(const CpuProblem& problem);

}  // namespace tokenpool
