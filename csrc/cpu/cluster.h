// K-Means and K-Medoids of one image after the other:
//
//   label_i = argmin_j ||y_i - c_j||^2;   c_j = sum over i in j of w_i y_i / W_j, or the member nearest to that
//
// from a start, until nothing changes, at most `iterations` times. x [B][N][D]; the outputs are those of ClusterArgs.
// The paths (gram.h, direct.h) have the arithmetic, this has the order of the steps.
#pragma once

#include "direct.h"
#include "farthest.h"
#include "gram.h"
#include "measure.h"
#include "result.h"

namespace tokenpool {
namespace TP_ISA {

template <class In>
class Clustering {
  using C = typename AccOf<In>::Type;
  using I = typename Lane<C>::Int;

 public:
  Clustering(const ClusterArgs& args, bool parallel, Watch& watch)
      : a(args),
        watch_(watch),
        tokens_(args, parallel),
        gram_(tokens_, centers_, assigned_),
        direct_(tokens_, centers_, assigned_) {}

  void run(int64_t b, int64_t next) {  // next: the image this thread will probably take afterwards, if there is one
    tokens_.take(b);
    const int64_t k = std::min(a.counts ? std::min(a.counts[b], a.clusters) : a.clusters, tokens_.n);
    centers_.take(tokens_.arena, std::max<int64_t>(k, 0), a.clusters);
    assigned_.take(tokens_.arena, tokens_.padded, a.clusters);
    if (k > 0) {
      Measure<In>(tokens_).run();
      on_gram_ = plan();
      start(next);
      iterate(next);
    }
    Result<In>(tokens_, centers_, assigned_).write();
  }

  bool on_gram() const { return on_gram_; }  // the path that the last image took

 private:
  bool plan() const {
    CpuProblem problem;
    problem.tokens = tokens_.n;
    problem.clusters = centers_.k;
    problem.features = a.features;
    problem.iterations = a.iterations;
    problem.acc_bytes = sizeof(C);
    problem.centers_given = a.init_centers != nullptr;
    problem.medoids = a.medoids;
    problem.farthest = !a.init_centers && !a.init_index;
    problem.force_path = a.path;
    return plan_cpu(problem).gram;
  }

  void start(int64_t next) {
    const int64_t D = a.features, k = centers_.k;
    if (on_gram_) gram_.build(next);
    if (a.init_centers || !on_gram_) centers_.row = tokens_.arena.template take<C>(k * D);
    if (a.init_centers) {
      const C* given = static_cast<const C*>(a.init_centers) + tokens_.image * a.clusters * D;
      for (int64_t j = 0; j < k; ++j)
        for (int64_t d = 0; d < D; ++d) centers_.row[j * D + d] = given[j * D + d] * tokens_.scale - tokens_.mean[d];
    } else if (a.init_index) {
      for (int64_t j = 0; j < k; ++j) {
        const int64_t asked = a.init_index[tokens_.image * a.clusters + j];
        centers_.medoid[j] = int32_t(tokens_.local_index(std::min(std::max<int64_t>(asked, 0), a.tokens - 1)));
      }
    } else {
      farthest_first(tokens_, k, assigned_.best, centers_.medoid, watch_, [&](int64_t token, C* apart) {
        if (on_gram_)
          gram_.distances_from(token, apart);
        else
          distances_from(tokens_, token, apart);
      });
    }
    if (on_gram_)
      gram_.start();
    else
      direct_.start();
  }

  void iterate(int64_t next) {
    constexpr int64_t kSurelySettled = 100;  // iterations: beyond, only rounding moves tokens to and fro
    const int64_t n = tokens_.n, k = centers_.k;
    double before = 0;  // weighted distances to the centers, one iteration ago
    for (int64_t t = 0;; ++t) {
      watch_.look();
      assign(t, next);
      const bool repaired =
          repair_empty(n, k, tokens_.weight, assigned_.best, tokens_.ascending, assigned_.label, assigned_.count);
      const bool same = t > 0 && !std::memcmp(assigned_.label, assigned_.previous, size_t(n) * sizeof(I));
      const double now = assigned_.loss(tokens_);
      if (t > 0 && !same && (repaired || t >= kSurelySettled) && !(now < before)) {
        // Nothing gained: the lists of members are still those of the iteration before.
        std::swap(assigned_.label, assigned_.previous);
        std::memset(assigned_.changed, 0, size_t(k));
        assigned_.settled = false;
        return;
      }
      before = now;
      assigned_.mark_changes(n, k, t == 0);
      assigned_.settled = !on_gram_ && t > 0 && tokens_.finite;
      if (same) return;
      assigned_.group_members(tokens_, k);
      if (a.medoids) update_medoids();
      if (t + 1 == a.iterations) return;
      if (on_gram_)
        gram_.update();
      else
        direct_.update(t == 0);
      std::swap(assigned_.label, assigned_.previous);
    }
  }

  void assign(int64_t t, int64_t next) {
    if (on_gram_) gram_.assign();
    if (on_gram_ && t == 0 && !gram_.resolved()) {
      on_gram_ = false;
      start(next);
    }
    if (!on_gram_) direct_.assign(t, next);
    if (a.medoids)  // a medoid belongs to its own cluster, the lowest if several name it
      for (int64_t j = centers_.k; j-- > 0;) {
        const int32_t i = centers_.medoid[j];
        assigned_.label[i] = I(j);
        assigned_.best[i] = tokens_.norm[i] * 0;  // NaN stays NaN
      }
    if (!on_gram_ && t == 0 && direct_.rough() && assigned_.any_empty(tokens_.n, centers_.k))
      direct_.measure_distances();
  }

  // The member nearest to the mean of its cluster; the lowest index on a tie. Of two members the heavier one.
  void update_medoids() {
    split(a.parallel_for, tokens_.worth(tokens_.n * (on_gram_ ? tokens_.n : a.features)), centers_.k,
          [&](int64_t begin, int64_t end) {
            Buffer<C> mean(on_gram_ ? tokens_.padded : a.features);
            for (int64_t j = begin; j < end; ++j)
              if (assigned_.changed[j]) centers_.medoid[j] = nearest_member(j, mean);
          });
  }

  int32_t nearest_member(int64_t j, C* mean) const {
    const int32_t* member = assigned_.member + assigned_.start[j];
    const int64_t count = assigned_.size(j);
    if (count == 1 || !(assigned_.total[j] > 0)) return member[0];
    if (count == 2)
      return tokens_.weight && tokens_.weight[member[1]] > tokens_.weight[member[0]] ? member[1] : member[0];
    if (on_gram_)
      gram_.sum_rows(member, assigned_.share + assigned_.start[j], count, mean);
    else
      mean_of<false>(tokens_, assigned_, j, mean);
    int32_t nearest = member[0];
    C least = std::numeric_limits<C>::infinity(), second = least;
    for (int64_t m = 0; m < count; ++m) {
      if (tokens_.weight && !(tokens_.weight[member[m]] > 0)) continue;  // what weighs nothing moves nothing
      const C distance = on_gram_ ? tokens_.norm[member[m]] - C(2) * mean[member[m]]
                                  : tokens_.squared_difference(tokens_.row(member[m]), mean);
      if (distance < least) {
        second = least;
        least = distance;
        nearest = member[m];
      } else if (distance < second) {
        second = distance;
      }
    }
    const C size =
        on_gram_ ? tokens_.norm[nearest] + C(2) * std::abs(mean[nearest]) : least + squared_norm(mean, a.features);
    return second - least <= kTie<C> * size ? least_sum_member(tokens_, member, count, true) : nearest;
  }

  const ClusterArgs& a;
  Watch& watch_;
  Tokens<In> tokens_;
  Centers<C> centers_;
  Assignment<In> assigned_;
  GramPath<In> gram_;
  DirectPath<In> direct_;
  bool on_gram_ = false;
};

// Images are handed to the threads one by one: they need not take equally long, nor are all cores equally fast. An
// image that needs much memory gets all threads, so that only one is in memory.
template <class In>
inline void cluster_all(const ClusterArgs& a) {
  constexpr int64_t kLarge = 4 << 20;  // elements
  const bool large = a.tokens * std::max(std::min(a.tokens, a.clusters), a.features) > kLarge;
  Watch watch;
  if (a.images < a.threads || a.threads < 2 || large) {
    Clustering<In> clustering(a, a.threads > 1, watch);
    for (int64_t b = 0; b < a.images; ++b) clustering.run(b, b + 1);
    return;
  }
  std::atomic<int64_t> next{0};
  split(a.parallel_for, true, a.threads, [&](int64_t, int64_t) {
    Clustering<In> clustering(a, false, watch);
    for (int64_t b; (b = next++) < a.images;) clustering.run(b, next);
  });
}

static void cluster(const ClusterArgs& a) {
  switch (a.dtype) {
    case DType::Float32:
      return cluster_all<float>(a);
    case DType::Float64:
      return cluster_all<double>(a);
    case DType::BFloat16:
      return cluster_all<BF16>(a);
    case DType::Float16:
      return cluster_all<FP16>(a);
  }
}

}  // namespace TP_ISA
}  // namespace tokenpool
