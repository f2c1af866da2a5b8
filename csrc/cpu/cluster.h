// K-Means and K-Medoids of one image: the start, the assignment of tokens, the update.
//
// With a Gram matrix (gram path) every center keeps its products with all tokens, a row as long as a row of that
// matrix, and only centers whose members changed get a new one. Without it: direct.h.
#pragma once

#include "direct.h"

namespace tokenpool {
namespace TP_ISA {

template <class In>
class Clustering : protected Direct<In> {
 protected:
  using Base = Direct<In>;
  using Base::a, Base::image_, Base::n_, Base::weight_, Base::scale_, Base::mean_, Base::k_, Base::padded_;
  using Base::center_, Base::center_norm_, Base::best_, Base::changed_;
  using Base::center_token, Base::parallel_;
  using Base::label_, Base::norm_, Base::member_, Base::share_, Base::start_, Base::count_, Base::medoid_, Base::total_;
  using Base::local_index, Base::row, Base::pack, Base::squared_norm, Base::squared_difference, Base::worth;
  using typename Base::C;
  using typename Base::I;
  static constexpr int L = kLanes<C>, P = kPanel<C>;

 public:
  Clustering(const ClusterArgs& args, bool parallel, Watch& watch) : Base(args, parallel), watch_(watch) {}

  void run(int64_t b, int64_t next) {  // next: the image this thread will probably take afterwards, if there is one
    begin(b, next);
    if (k_ > 0) iterate(next);
    this->finish();
  }

 protected:
  // ---------------------------------------------------------------------------------------------- preparation

  void begin(int64_t b, int64_t next) {
    this->take_image(b);
    k_ = std::min(a.counts ? std::min(a.counts[b], a.clusters) : a.clusters, n_);
    if (k_ < 0) k_ = 0;
    take_buffers();
    if (k_ == 0) return;
    this->measure();
    gram_path_ = a.path >= 0 ? a.path == int(Path::Gram) : plan();
    if (gram_path_) {
      pack_tokens();
      build_gram(next);
    } else {
      this->take_direct();
    }
    start();
  }

  bool plan() const {
    CpuProblem problem;
    problem.tokens = n_;
    problem.clusters = k_;
    problem.features = a.features;
    problem.iterations = a.iterations;
    problem.acc_bytes = sizeof(C);
    problem.centers_given = a.init_centers != nullptr;
    problem.medoids = a.medoids;
    problem.farthest = !a.init_centers && !a.init_index;
    return plan_cpu(problem).gram;
  }

  template <class T>
  T* take(int64_t count) {
    return Base::template take<T>(count);
  }

  void take_buffers() {
    Base::take_buffers();
    previous_ = take<I>(padded_);
    best_ = take<C>(padded_);
    center_norm_ = take<C>(a.clusters);
    changed_ = take<uint8_t>(a.clusters);
  }

  void pack_tokens() {
    packed_ = take<C>(padded_ * a.features);
    split(a.parallel_for, worth(n_ * a.features), padded_ / P, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) pack(p * P, packed_ + p * P * a.features);
    });
  }

  void build_gram(int64_t next) {
    const int64_t panels = padded_ / P;
    Ahead ahead;  // the product leaves the memory idle: time to fetch the next image
    const int64_t blocks = (a.features + kDepthBlock - 1) / kDepthBlock;
    this->want_image(next, panels * (panels + 1) / 2 * (P / kRows) * blocks, ahead);
    row_stride_ = padded_ + ((padded_ * int64_t(sizeof(C))) % 1024 == 0 ? L : 0);  // rows not a power of two apart
    gram_ = take<C>(padded_ * row_stride_);
    split(a.parallel_for, parallel_, panels * (panels + 1) / 2, [&](int64_t begin, int64_t end) {
      gram_tiles(packed_, a.features, n_, begin, end, gram_, row_stride_, parallel_ ? nullptr : &ahead);
    });
    clear_padding();
    mirror(n_, gram_, row_stride_);
    for (int64_t i = 0; i < padded_; ++i) norm_[i] = i < n_ ? gram_[i * row_stride_ + i] : C(0);
  }

  void clear_padding() {  // rows and columns past the last token, as far as vectors reach
    const int64_t end = round_up(n_, L);
    for (int64_t i = round_up(n_, kRows); i < end; ++i)
      std::memset(gram_ + i * row_stride_, 0, size_t(end) * sizeof(C));
    for (int64_t i = 0; i < n_; ++i)
      std::memset(gram_ + i * row_stride_ + end, 0, size_t(row_stride_ - end) * sizeof(C));
  }

  // -------------------------------------------------------------------------------------------------- start

  void start() {
    const int64_t D = a.features;
    if (gram_path_) {
      product_ = take<C>(k_ * row_stride_);
      row_of_ = take<const C*>(k_);
      if (a.init_centers) center_ = take<C>(k_ * D);
    }
    if (a.init_centers) {
      const C* given = static_cast<const C*>(a.init_centers) + image_ * a.clusters * D;
      for (int64_t j = 0; j < k_; ++j)
        for (int64_t d = 0; d < D; ++d) center_[j * D + d] = given[j * D + d] * scale_ - mean_[d];
      if (gram_path_) multiply_centers();
      return;
    }
    if (a.init_index)
      for (int64_t j = 0; j < k_; ++j) {
        const int64_t asked = a.init_index[image_ * a.clusters + j];
        medoid_[j] = int32_t(local_index(std::min(std::max<int64_t>(asked, 0), a.tokens - 1)));
      }
    else
      farthest_first();
    if (gram_path_) {
      use_medoids();
      return;
    }
    this->take_starts();
    for (int64_t j = 0; j < k_; ++j) center_token(medoid_[j], center_ + j * D);
  }

  // Start from the heaviest token, then k - 1 times from the token of the largest weight times squared distance to the
  // chosen ones (lowest index on a tie; a tie that rounding breaks may fall differently on the two paths). Tokens of
  // zero weight come after all others.
  void farthest_first() {
    C* distance = best_;  // to the nearest chosen token; -1: zero weight, -2: chosen or padding
    for (int64_t i = 0; i < padded_; ++i) {
      const C unchosen = !weight_ || weight_[i < n_ ? i : 0] > 0 ? std::numeric_limits<C>::infinity() : C(-1);
      distance[i] = i < n_ ? unchosen : C(-2);
    }
    int64_t next = 0;
    for (int64_t i = 1; weight_ && i < n_; ++i)
      if (weight_[i] > weight_[next]) next = i;
    C* apart = take<C>(padded_);  // squared distances from the token chosen last
    C* weight = nullptr;          // padded
    if (weight_) {
      weight = take<C>(padded_);
      for (int64_t i = 0; i < padded_; ++i) weight[i] = i < n_ && weight_[i] > 0 ? weight_[i] : C(1);
    }
    for (int64_t j = 0;; ++j) {
      medoid_[j] = int32_t(next);
      distance[next] = -2;
      if (j + 1 == k_) return;
      watch_.look();
      if (gram_path_)
        distances_from_gram(next, apart);
      else
        distances_from_tokens(next, apart);
      next = nearer_and_farthest(apart, weight, distance);
    }
  }

  // distance = min(distance, apart); the index of the largest, times its weight.
  int64_t nearer_and_farthest(const C* apart, const C* weight, C* distance) const {
    Vec<C> most = splat(C(-3));
    Vec<I> where = {}, index;
    for (int v = 0; v < L; ++v) index[v] = I(v);
    for (int64_t i = 0; i < padded_; i += L) {
      const Vec<C> old = load(distance + i), found = load(apart + i);
      const Vec<C> now = found < old ? found : old;
      store(distance + i, now);
      const Vec<C> cost = weight ? now * load(weight + i) : now;
      const auto larger = cost > most;
      most = larger ? cost : most;
      where = larger ? index : where;
      index += I(L);
    }
    int64_t best = where[0];
    C value = most[0];
    for (int v = 1; v < L; ++v)
      if (most[v] > value || (most[v] == value && where[v] < best)) {
        value = most[v];
        best = where[v];
      }
    return best;
  }

  void distances_from_gram(int64_t token, C* apart) const {
    const C* row = gram_ + token * row_stride_;
    const Vec<C> norm = splat(norm_[token]);
    for (int64_t i = 0; i < padded_; i += L) {
      const Vec<C> d = load(norm_ + i) + norm - C(2) * load(row + i);
      store(apart + i, d < C(0) ? Vec<C>{} : d);
    }
  }

  void distances_from_tokens(int64_t token, C* apart) const {
    const int64_t D = a.features;
    Buffer<C> center(D);
    const In* chosen = row(token);
    for (int64_t d = 0; d < D; ++d) center[d] = C(to_float(chosen[d])) * scale_;
    split(a.parallel_for, worth(n_ * D), padded_, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) apart[i] = i < n_ ? squared_difference(row(i), center) : C(0);
    });
  }

  void use_medoids() {  // gram path: the centers are the tokens medoid_[j]
    for (int64_t j = 0; j < k_; ++j) {
      row_of_[j] = gram_ + medoid_[j] * row_stride_;
      center_norm_[j] = norm_[medoid_[j]];
    }
  }

  void multiply_centers() {  // gram path: given centers have no Gram rows
    const int64_t D = a.features;
    Buffer<int32_t> all(k_);
    for (int64_t j = 0; j < k_; ++j) {
      all[j] = int32_t(j);
      center_norm_[j] = squared_norm(center_ + j * D);
      row_of_[j] = product_ + j * row_stride_;
    }
    split(a.parallel_for, worth(n_ * k_ * D / 8), padded_ / P, [&](int64_t begin, int64_t end) {
      Buffer<C*> out(k_);
      for (int64_t p = begin; p < end; ++p) {
        for (int64_t j = 0; j < k_; ++j) out[j] = product_ + j * row_stride_ + p * P;
        multiply_panel<C>(center_, D, all, k_, TP_VECTORS, packed_ + p * P * D, out);
      }
    });
  }

  void iterate(int64_t next) {
    constexpr int64_t kSurelySettled = 100;  // iterations: beyond, only rounding moves tokens to and fro
    this->settled_ = false;
    double before = 0;  // weighted distances to the centers, one iteration ago
    for (int64_t t = 0;; ++t) {
      watch_.look();
      if (gram_path_)
        assign_gram();
      else if (t == 0)
        this->assign_first(next);
      else
        this->assign_bounded(previous_);
      if (t == 0 && gram_path_ && !resolved()) {
        gram_path_ = false;
        this->take_direct();
        start();
        this->assign_first(next);
      }
      if (a.medoids)  // a medoid belongs to its own cluster, the lowest if several name it
        for (int64_t j = k_; j-- > 0;) {
          label_[medoid_[j]] = I(j);
          best_[medoid_[j]] = norm_[medoid_[j]] * 0;  // NaN stays NaN
        }
      if (!gram_path_ && t == 0 && this->rough_ && any_empty()) this->measure_distances();
      const bool repaired = repair_empty(n_, k_, weight_, best_, this->ascending_, label_, count_);
      const bool same = t > 0 && !std::memcmp(label_, previous_, size_t(n_) * sizeof(I));
      const double now = loss();
      if (t > 0 && !same && (repaired || t >= kSurelySettled) && !(now < before)) {
        std::swap(label_, previous_);  // nothing gained: the lists of members are still those of the iteration before
        std::memset(changed_, 0, size_t(k_));
        this->settled_ = false;
        break;
      }
      before = now;
      mark_changes(t);
      this->settled_ = !gram_path_ && t > 0 && this->finite_;
      if (same) break;
      this->group_members();
      if (a.medoids) update_medoids();
      if (t + 1 == a.iterations) break;
      if (!gram_path_)
        this->update_direct(t == 0);
      else if (a.medoids)
        use_medoids();
      else
        update_means();
      std::swap(label_, previous_);
    }
  }

  // Weighted squared distances of the tokens to their centers. (After a first assignment of rounded tokens some are
  // only bounds.)
  double loss() const {
    double sum = 0;
    for (int64_t i = 0; i < n_; ++i)
      if (!weight_ || weight_[i] > 0) sum += double(weight_ ? weight_[i] : C(1)) * double(best_[i]);
    return sum;
  }

  // Can a Gram matrix tell these distances apart? Its entries are as wrong as the norms are large, so not where tokens
  // are very much nearer to their centers than to what was taken off all of them.
  bool resolved() const {
    constexpr C kRoom = 256 * std::numeric_limits<C>::epsilon();
    double near = 0, far = 0;
    for (int64_t i = 0; i < n_; ++i)
      if (!weight_ || weight_[i] > 0) {
        near += double(best_[i]);
        far += double(norm_[i]);
      }
    return !(near < double(kRoom) * far);  // a NaN is beyond any path
  }

  bool any_empty() {
    std::memset(count_, 0, size_t(k_) * sizeof(int32_t));
    for (int64_t i = 0; i < n_; ++i) ++count_[label_[i]];
    return std::find(count_, count_ + k_, 0) != count_ + k_;
  }

  void mark_changes(int64_t t) {
    std::memset(changed_, t == 0, size_t(k_));
    if (t == 0) return;
    for (int64_t i = 0; i < n_; ++i)
      if (label_[i] != previous_[i]) changed_[label_[i]] = changed_[previous_[i]] = 1;
  }

  void assign_gram() {
    const bool far = k_ * row_stride_ * int64_t(sizeof(C)) > 512 << 10;  // products beyond the second-level cache
    split(a.parallel_for, worth(n_ * k_), padded_ / P, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin * P; i < end * P; i += P) {
        Nearest<C> nearest;
        for (int64_t j = 0; j < k_; ++j) {
          if (far) {
            const C* soon = row_of_[std::min(j + 12, k_ - 1)] + i;
            __builtin_prefetch(soon);
            __builtin_prefetch(soon + P - 1);
          }
          nearest.compare(j, center_norm_[j], row_of_[j] + i);
        }
        nearest.write(best_ + i, label_ + i);
      }
    });
    for (int64_t i = 0; i < n_; ++i) {  // squared distances; a NaN stays NaN
      const C distance = best_[i] + norm_[i];
      best_[i] = distance < 0 ? C(0) : distance;
    }
  }

  // ---------------------------------------------------------------------------------------------------- update

  void update_means() {  // gram path
    split(a.parallel_for, worth(n_ * n_), k_, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j)
        if (changed_[j]) mean_products(j);
    });
  }

  // Products of cluster j's mean with all tokens, from the Gram rows of its members; and its squared norm.
  void mean_products(int64_t j) {
    const int32_t* member = member_ + start_[j];
    const C* share = share_ + start_[j];
    const int64_t count = start_[j + 1] - start_[j];
    if (count == 1) {
      row_of_[j] = gram_ + member[0] * row_stride_;
      center_norm_[j] = norm_[member[0]];
      return;
    }
    C* out = product_ + j * row_stride_;
    sum_gram_rows(member, share, count, out);
    row_of_[j] = out;
    C norm = 0;
    for (int64_t m = 0; m < count; ++m)
      if (share[m] != C(0)) norm += share[m] * out[member[m]];
    center_norm_[j] = norm;
  }

  void sum_gram_rows(const int32_t* member, const C* share, int64_t count, C* out) const {
    constexpr int W = 4;  // vectors of columns at a time
    int64_t i = 0;
    for (; i + W * L <= padded_; i += W * L) {
      Vec<C> sum[W] = {};
      for (int64_t m = 0; m < count; ++m) {
        if (share[m] == C(0)) continue;
        const C* g = gram_ + member[m] * row_stride_ + i;
        const Vec<C> s = splat(share[m]);
#pragma GCC unroll 4
        for (int v = 0; v < W; ++v) sum[v] += s * load(g + v * L);
      }
      for (int v = 0; v < W; ++v) store(out + i + v * L, sum[v]);
    }
    for (; i < padded_; i += L) {
      Vec<C> sum = {};
      for (int64_t m = 0; m < count; ++m)
        if (share[m] != C(0)) sum += splat(share[m]) * load(gram_ + member[m] * row_stride_ + i);
      store(out + i, sum);
    }
  }

  // The member nearest to the mean of its cluster; the lowest index on a tie. Of two members the heavier one.
  void update_medoids() {
    split(a.parallel_for, worth(n_ * (gram_path_ ? n_ : a.features)), k_, [&](int64_t begin, int64_t end) {
      Buffer<C> mean(gram_path_ ? padded_ : a.features);
      for (int64_t j = begin; j < end; ++j)
        if (changed_[j]) medoid_[j] = nearest_member(j, mean);
    });
  }

  int32_t nearest_member(int64_t j, C* mean) const {
    const int32_t* member = member_ + start_[j];
    const int64_t count = start_[j + 1] - start_[j];
    if (count == 1 || !(total_[j] > 0)) return member[0];
    if (count == 2) return weight_ && weight_[member[1]] > weight_[member[0]] ? member[1] : member[0];
    if (gram_path_)
      sum_gram_rows(member, share_ + start_[j], count, mean);
    else
      this->template mean_row<false>(j, mean);
    int32_t nearest = member[0];
    C least = std::numeric_limits<C>::infinity();
    for (int64_t m = 0; m < count; ++m) {
      const C distance =
          gram_path_ ? norm_[member[m]] - C(2) * mean[member[m]] : squared_difference(row(member[m]), mean);
      if (distance < least) {
        least = distance;
        nearest = member[m];
      }
    }
    return nearest;
  }

  Watch& watch_;
  bool gram_path_ = false;
  int64_t row_stride_ = 0;                 // of products and the Gram matrix
  C *packed_ = nullptr, *gram_ = nullptr;  // gram path: [panels][D][P]; [padded][row_stride]
  C* product_ = nullptr;                   // gram path: [k][row_stride]
  const C** row_of_ = nullptr;             // gram path: where center j's products are
  I* previous_ = nullptr;                  // [n] labels of the last iteration
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
