#include "planner.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

namespace tokenpool {

namespace {
// Nanoseconds per element operation on one core, float32: one fit to three records, bench/results/crossover-*.json (AMD
// EPYC Zen 3 with AVX2, Zen 4 with AVX2 and with AVX-512; `python -m bench.crossover --fit` prints it), but for
// kFarthest, read off a few calls. Only their ratios matter.
constexpr double kGramMultiplyAdd = 0.01959;  // one multiply-add of the Gram product
constexpr double kGramToken = 0.667;  // one feature of one token converted, centered, packed; and added to a mean
constexpr double kRowAdd = 0.1213;    // one element of a Gram row added to its cluster's row
constexpr double kDirectMultiplyAdd =
    0.01196;                            // one of the products with the centers: float32 is rounded to 16 bits for them
constexpr double kDirectToken = 0.351;  // one feature of one token converted and packed, or added to a mean
constexpr double kCompare = 0.413;      // one token and center: score and bound
constexpr double kVisit = 72.49;        // one token in one pass: centers that its bounds leave open
constexpr double kMedoidCenter = 0.25;  // K-Medoids: one feature of one center in one pass, since medoids move far
constexpr double kFarthest = 0.06;  // one feature of one token compared with one chosen token (farthest-first, direct)
constexpr double kPasses =
    3;  // updates of every center that T iterations amount to: later, few change and the rest is skipped
constexpr int64_t kStartsOnce =
    48;  // so many starting tokens meet each other once, one image a thread (AVX2's two panels; AVX-512's hold 64)
constexpr double kMaximumGramBytes = 16 << 20;

double gram_bytes(const CpuProblem& p) {
  return double(p.tokens) * double(p.tokens) * p.acc_bytes;
}
}  // namespace

CpuPlan plan_cpu(const CpuProblem& p) {
  const double n = double(p.tokens), k = double(p.clusters), d = double(p.features);
  const double width = p.acc_bytes / 4.0;  // a double counts twice
  const double gram_product = 0.5 * n * n * d;
  const double first_product = p.centers_given ? n * k * d : 0;  // of the gram path: the start has no Gram rows
  const double passes = std::min(double(p.iterations), kPasses);
  const int64_t group = center_group(p.tokens, p.clusters, p.acc_bytes, p.force_path);
  const bool starts_once = !p.centers_given && p.acc_bytes == 4 && group == 1 && p.clusters >= kStartsOnce;
  const double direct_product = (starts_once ? n - k / 2 : n) * k * d;

  CpuPlan plan;
  const double direct_multiply_add = p.acc_bytes == 4 ? kDirectMultiplyAdd : kGramMultiplyAdd;
  plan.gram_ns =
      width * ((gram_product + first_product) * kGramMultiplyAdd + n * d * kGramToken + passes * n * n * kRowAdd);
  plan.direct_ns = width * (direct_product * direct_multiply_add + (passes + 1) * n * d * kDirectToken +
                            n * k * kCompare + (passes - 1) * (n * kVisit + (p.medoids ? k * d * kMedoidCenter : 0)) +
                            (p.farthest ? n * k * d * kFarthest : 0));
  plan.gram = p.force_path >= 0 ? p.force_path == int(CpuPath::kGram)
                                : gram_bytes(p) <= kMaximumGramBytes && plan.gram_ns <= plan.direct_ns;
  plan.flops = 2 * (plan.gram ? gram_product + first_product + passes * n * n
                              : direct_product + passes * n * d + (p.farthest ? n * k * d : 0));
  plan.center_group = plan.gram ? 1 : group;
  plan.workspace_bytes =
      p.acc_bytes * (plan.gram ? n * n + n * d + n * k
                               : (p.acc_bytes == 4 ? 1.5 : 1.0) * k * d + n * std::ceil(k / double(plan.center_group)));

  return plan;
}

std::string reason(const CpuProblem& p, const CpuPlan& plan) {
  char text[256];
  if (gram_bytes(p) > kMaximumGramBytes)
    std::snprintf(text, sizeof text, "the Gram matrix would need %.0f MB, more than the %.0f MB allowed",
                  gram_bytes(p) / 1048576, kMaximumGramBytes / 1048576);
  else
    std::snprintf(text, sizeof text,
                  "one Gram product and %lld cheap iterations (%.0f us) against one product with the centers and "
                  "bounds that spare "
                  "nearly all others (%.0f us)",
                  static_cast<long long>(p.iterations), plan.gram_ns / 1000, plan.direct_ns / 1000);
  return text;
}

}  // namespace tokenpool
