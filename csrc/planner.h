// Chooses how a clustering on the CPU is computed. Plain C++17, no torch: decisions are tested anywhere.
#pragma once
#include <cstdint>
#include <string>

#include "paths.h"

namespace tokenpool {

// Consecutive centers that share a bound of the direct path: 1, unless a bound for every token and center needs too
// much memory. Never so many that fewer than eight groups are left, but four where the path "grouped" is asked for.
inline int64_t center_group(int64_t tokens, int64_t clusters, int acc_bytes, int path) {
  constexpr int64_t kBoundBytes = 24 << 20;
  const int64_t group = (tokens * clusters * acc_bytes + kBoundBytes - 1) / kBoundBytes, most = (clusters + 7) / 8;
  const int64_t least = path == int(CpuPath::kGrouped) ? 4 : 1, fit = group < most ? group : most;
  return fit > least ? fit : least;
}

// One image's problem. The batch size and the number of threads are absent on purpose: they must not change a result.
struct CpuProblem {
  int64_t tokens, clusters, features, iterations;
  int acc_bytes = 4;           // 4 (float32 arithmetic) or 8
  bool centers_given = false;  // the start is centers, not tokens: the gram path needs one direct pass first
  bool medoids = false;        // K-Medoids
  bool farthest = false;       // the start is chosen here, one token after another: cheap with a Gram matrix only
  int force_path = -1;         // a CpuPath, or -1: the cheaper one
};

struct CpuPlan {
  bool gram;                  // else direct
  int64_t center_group;       // direct: centers that share a bound; above 1 the path is called grouped
  double gram_ns, direct_ns;  // predicted single-thread time
  double flops;               // of the chosen path (a multiply-add is 2)
  double workspace_bytes;     // of the chosen path, per thread
};

CpuPlan plan_cpu(const CpuProblem& problem);

std::string reason(const CpuProblem& problem, const CpuPlan& plan);  // why, in words

}  // namespace tokenpool
