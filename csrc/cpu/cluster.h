// K-Means and K-Medoids of one image: the start, the two ways of assigning tokens, the update, the final means.

template <class In>
class Clustering : protected Image<In> {
 protected:
  using Base = Image<In>;
  using typename Base::C;
  using typename Base::I;
  using Base::a, Base::image_, Base::n_, Base::x_, Base::valid_, Base::weight_, Base::scale_;
  using Base::weight_scale_, Base::mean_;
  using Base::token, Base::row, Base::local_index, Base::center_row, Base::pack, Base::panel_norms, Base::squared_norm;
  using Base::squared_difference;
  static constexpr int L = kLanes<C>, P = kPanel<C>;

 public:
  Clustering(const ClusterArgs& args, bool parallel) : Base(args), parallel_(parallel) {}

  void run(int64_t b) {
    this->take_image(b);
    k_ = std::min(a.counts ? std::min(a.counts[b], a.clusters) : a.clusters, n_);
    if (k_ < 0) k_ = 0;
    take_buffers();
    if (k_ > 0) {
      this->measure();
      gram_path_ = a.path >= 0 ? a.path == int(Path::Gram) : plan();
      if (gram_path_) build_gram();
      start();
      iterate();
    }
    finish();
  }

 protected:
  // ---------------------------------------------------------------------------------------------- preparation

  bool plan() const {
    CpuProblem problem;
    problem.tokens = n_;
    problem.clusters = k_;
    problem.features = a.features;
    problem.iterations = a.iterations;
    problem.acc_bytes = sizeof(C);
    problem.centers_given = a.init_centers != nullptr;
    problem.medoids = a.medoids;
    return plan_cpu(problem).gram;
  }

  template <class T>
  T* take(int64_t count) {
    return this->arena_.template take<T>(count);
  }

  void take_buffers() {
    padded_ = round_up(std::max<int64_t>(n_, 1), P);
    row_stride_ = padded_ + ((padded_ * int64_t(sizeof(C))) % 1024 == 0 ? L : 0);  // rows not a power of two apart
    label_ = take<I>(padded_);
    previous_ = take<I>(padded_);
    best_ = take<C>(padded_);
    norm_ = take<C>(padded_);
    member_ = take<int32_t>(padded_);
    share_ = take<C>(padded_);
    start_ = take<int32_t>(a.clusters + 1);
    count_ = take<int32_t>(a.clusters + 1);
    medoid_ = take<int32_t>(a.clusters);
    center_norm_ = take<C>(a.clusters);
    total_ = take<C>(a.clusters);
    error_ = take<double>(a.clusters);
    changed_ = take<uint8_t>(a.clusters);
  }

  void build_gram() {
    const int64_t D = a.features, panels = padded_ / P;
    packed_ = take<C>(padded_ * D);
    gram_ = take<C>(padded_ * row_stride_);
    split(a.parallel_for, parallel_, panels, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) pack(p * P, packed_ + p * P * D);
    });
    split(a.parallel_for, parallel_, panels * (panels + 1) / 2, [&](int64_t begin, int64_t end) {
      gram_tiles(packed_, D, n_, begin, end, gram_, row_stride_);
    });
    clear_padding();
    mirror(n_, gram_, row_stride_);
    for (int64_t i = 0; i < padded_; ++i) norm_[i] = i < n_ ? gram_[i * row_stride_ + i] : C(0);
  }

  void clear_padding() {  // rows and columns past the last token, as far as vectors reach
    const int64_t end = round_up(n_, L);
    for (int64_t i = round_up(n_, kRows); i < end; ++i) std::memset(gram_ + i * row_stride_, 0, size_t(end) * sizeof(C));
    for (int64_t i = 0; i < n_; ++i) std::memset(gram_ + i * row_stride_ + end, 0, size_t(row_stride_ - end) * sizeof(C));
  }

  // -------------------------------------------------------------------------------------------------- centers

  // The gram path keeps, for every center, its products with all tokens (a row as long as a Gram row); the direct path
  // keeps the centers themselves. A center that is a token has its products in the Gram matrix already.
  void start() {
    const int64_t D = a.features;
    if (gram_path_) {
      product_ = take<C>(k_ * row_stride_);
      row_of_ = take<const C*>(k_);
    } else {
      center_ = take<C>(round_up(k_, kRows) * D);
    }
    if (!a.init_index && !a.init_centers) {
      farthest_first();
      use_medoids();
      return;
    }
    if (a.init_index) {
      for (int64_t j = 0; j < k_; ++j) {
        const int64_t asked = a.init_index[image_ * a.clusters + j];
        medoid_[j] = int32_t(local_index(std::min(std::max<int64_t>(asked, 0), a.tokens - 1)));
      }
      use_medoids();
      return;
    }
    C* center = gram_path_ ? take<C>(round_up(k_, kRows) * D) : center_;
    const C* given = static_cast<const C*>(a.init_centers) + image_ * a.clusters * D;
    for (int64_t j = 0; j < k_; ++j)
      center_row(given + j * D, scale_, mean_, center + j * D, D);
    measure_centers(center);
    if (!gram_path_) return;
    split(a.parallel_for, parallel_, padded_ / P, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p)
        for (int64_t j = 0; j < k_; j += kRows) {
          Tile<C> tile;
          multiply_centers(center, j, packed_ + p * P * D, tile);
          for (int r = 0; r < kRows && j + r < k_; ++r)
            for (int v = 0; v < TP_VECTORS; ++v) store(product_ + (j + r) * row_stride_ + p * P + v * L, tile.v[r][v]);
        }
    });
    for (int64_t j = 0; j < k_; ++j) row_of_[j] = product_ + j * row_stride_;
  }

  // Start from the heaviest token, then k - 1 times from the token farthest from all chosen ones (lowest index on a tie;
  // a tie that rounding breaks may fall differently on the two paths).
  // Tokens of zero weight come after all others.
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
    for (int64_t j = 0;; ++j) {
      medoid_[j] = int32_t(next);
      distance[next] = -2;
      if (j + 1 == k_) return;
      if (gram_path_)
        distances_from_gram(next, apart);
      else
        distances_from_tokens(next, apart);
      next = nearer_and_farthest(apart, distance);
    }
  }

  // distance = min(distance, apart); the index of the largest.
  int64_t nearer_and_farthest(const C* apart, C* distance) const {
    Vec<C> most = splat(C(-3));
    Vec<I> where = {}, index;
    for (int v = 0; v < L; ++v) index[v] = I(v);
    for (int64_t i = 0; i < padded_; i += L) {
      const Vec<C> old = load(distance + i), found = load(apart + i);
      const Vec<C> now = found < old ? found : old;
      store(distance + i, now);
      const auto larger = now > most;
      most = larger ? now : most;
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
    Buffer<C> center(D), scratch(D);
    const C* chosen = as_acc(row(token), static_cast<C*>(scratch), D);
    for (int64_t d = 0; d < D; ++d) center[d] = chosen[d] * scale_;
    split(a.parallel_for, worth(n_ * D), padded_, [&](int64_t begin, int64_t end) {
      Buffer<C> other(D);
      for (int64_t i = begin; i < end; ++i)
        apart[i] = i < n_ ? squared_difference(as_acc(row(i), static_cast<C*>(other), D), center) : C(0);
    });
  }

  void measure_centers(const C* center) {
    const int64_t D = a.features;
    for (int64_t j = 0; j < k_; ++j) {
      C norm = 0;
      for (int64_t d = 0; d < D; ++d) norm += center[j * D + d] * center[j * D + d];
      center_norm_[j] = norm;
    }
  }

  TP_INLINE void multiply_centers(const C* center, int64_t j, const C* panel, Tile<C>& tile) const {
    const C* rows[kRows];
    for (int r = 0; r < kRows; ++r) rows[r] = center + std::min(j + r, k_ - 1) * a.features;
    multiply<C>(rows, 1, panel, a.features, tile);
  }

  void use_medoids() {  // the centers are the tokens medoid_[j]
    const int64_t D = a.features;
    if (gram_path_) {
      for (int64_t j = 0; j < k_; ++j) {
        row_of_[j] = gram_ + medoid_[j] * row_stride_;
        center_norm_[j] = norm_[medoid_[j]];
      }
      return;
    }
    for (int64_t j = 0; j < k_; ++j) {
      C* out = center_ + j * D;
      center_row(as_acc(row(medoid_[j]), out, D), scale_, mean_, out, D);
    }
    measure_centers(center_);
  }

  // ------------------------------------------------------------------------------------------------ iteration

  void iterate() {
    for (int64_t t = 0;; ++t) {
      if (gram_path_)
        assign_gram();
      else
        assign_direct();
      if (a.medoids)  // a medoid belongs to its own cluster, the lowest if several name it
        for (int64_t j = k_; j-- > 0;) {
          label_[medoid_[j]] = I(j);
          best_[medoid_[j]] = -norm_[medoid_[j]];
        }
      for (int64_t i = 0; i < n_; ++i) {  // from here on: squared distances, a NaN stays NaN
        const C distance = best_[i] + norm_[i];
        best_[i] = distance < 0 ? C(0) : distance;
      }
      repair_empty(n_, k_, weight_, best_, label_, count_);
      const bool same = t > 0 && !std::memcmp(label_, previous_, size_t(n_) * sizeof(I));
      if (same) break;
      mark_changes(t);
      group(label_, n_, k_, start_, member_);
      for (int64_t j = 0; j < k_; ++j)
        total_[j] = shares(member_ + start_[j], start_[j + 1] - start_[j], weight_, share_ + start_[j]);
      if (a.medoids) {
        update_medoids();
        if (t + 1 == a.iterations) break;
        use_medoids();
      } else {
        if (t + 1 == a.iterations) break;
        update_means();
      }
      std::swap(label_, previous_);
    }
  }

  void mark_changes(int64_t t) {
    std::memset(changed_, t == 0, size_t(k_));
    if (t == 0) return;
    for (int64_t i = 0; i < n_; ++i)
      if (label_[i] != previous_[i]) changed_[label_[i]] = changed_[previous_[i]] = 1;
  }

  // Worth waking the other threads for `operations` element operations?
  bool worth(int64_t operations) const { return parallel_ && operations > 200000; }

  void assign_gram() {
    split(a.parallel_for, worth(n_ * k_), padded_ / P, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin * P; i < end * P; i += P) {
        Vec<C> best[TP_VECTORS];
        Vec<I> label[TP_VECTORS];
        for (int v = 0; v < TP_VECTORS; ++v) {
          best[v] = splat(std::numeric_limits<C>::infinity());
          label[v] = Vec<I>{};
        }
        for (int64_t j = 0; j < k_; ++j) {
          const C* products = row_of_[j] + i;
          const Vec<C> norm = splat(center_norm_[j]);
          const Vec<I> index = splat(I(j));
#pragma GCC unroll 4
          for (int v = 0; v < TP_VECTORS; ++v) keep_nearer(norm - C(2) * load(products + v * L), index, best[v], label[v]);
        }
        for (int v = 0; v < TP_VECTORS; ++v) {
          store(best_ + i + v * L, best[v]);
          store(label_ + i + v * L, label[v]);
        }
      }
    });
  }

  void assign_direct() {
    const int64_t D = a.features;
    split(a.parallel_for, worth(n_ * k_ * D / 8), padded_ / P, [&](int64_t begin, int64_t end) {
      Buffer<C> panel(P * D);
      for (int64_t i = begin * P; i < end * P; i += P) {
        pack(i, panel);
        panel_norms(panel, norm_ + i);
        Vec<C> best[TP_VECTORS];
        Vec<I> label[TP_VECTORS];
        for (int v = 0; v < TP_VECTORS; ++v) {
          best[v] = splat(std::numeric_limits<C>::infinity());
          label[v] = Vec<I>{};
        }
        for (int64_t j = 0; j < k_; j += kRows) {
          Tile<C> tile;
          multiply_centers(center_, j, panel, tile);
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r) {
            if (j + r >= k_) break;
            const Vec<C> norm = splat(center_norm_[j + r]);
            const Vec<I> index = splat(I(j + r));
#pragma GCC unroll 4
            for (int v = 0; v < TP_VECTORS; ++v) keep_nearer(norm - C(2) * tile.v[r][v], index, best[v], label[v]);
          }
        }
        for (int v = 0; v < TP_VECTORS; ++v) {
          store(best_ + i + v * L, best[v]);
          store(label_ + i + v * L, label[v]);
        }
      }
    });
  }

  static TP_INLINE void keep_nearer(Vec<C> score, Vec<I> index, Vec<C>& best, Vec<I>& label) {
    const auto nearer = score < best;
    best = nearer ? score : best;
    label = nearer ? index : label;
  }

  // ---------------------------------------------------------------------------------------------------- update

  void update_means() {
    if (gram_path_) {
      split(a.parallel_for, worth(n_ * n_), k_, [&](int64_t begin, int64_t end) {
        for (int64_t j = begin; j < end; ++j)
          if (changed_[j]) mean_products(j);
      });
      return;
    }
    split(a.parallel_for, worth(n_ * a.features), k_, [&](int64_t begin, int64_t end) {
      Buffer<C> scratch(a.features);
      for (int64_t j = begin; j < end; ++j)
        if (changed_[j]) {
          mean_row(j, true, scratch, center_ + j * a.features);
          center_norm_[j] = squared_norm(center_ + j * a.features);
        }
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
    for (int64_t m = 0; m < count; ++m) norm += share[m] * out[member[m]];
    center_norm_[j] = norm;
  }

  void sum_gram_rows(const int32_t* member, const C* share, int64_t count, C* out) const {
    constexpr int W = 4;  // vectors of columns at a time
    int64_t i = 0;
    for (; i + W * L <= padded_; i += W * L) {
      Vec<C> sum[W] = {};
      for (int64_t m = 0; m < count; ++m) {
        const C* g = gram_ + member[m] * row_stride_ + i;
        const Vec<C> s = splat(share[m]);
#pragma GCC unroll 4
        for (int v = 0; v < W; ++v) sum[v] += s * load(g + v * L);
      }
      for (int v = 0; v < W; ++v) store(out + i + v * L, sum[v]);
    }
    for (; i < padded_; i += L) {
      Vec<C> sum = {};
      for (int64_t m = 0; m < count; ++m) sum += splat(share[m]) * load(gram_ + member[m] * row_stride_ + i);
      store(out + i, sum);
    }
  }

  // The weighted mean of cluster j's tokens, scaled; minus the image's mean token when `centered`.
  void mean_row(int64_t j, bool centered, C* scratch, C* __restrict out) const {
    const int64_t D = a.features;
    const C scale = scale_;
    const C* __restrict mean = mean_;
    for (int64_t m = start_[j]; m < start_[j + 1]; ++m) {
      const C* x = as_acc(row(member_[m]), scratch, D);
      const C share = share_[m];
      const bool first = m == start_[j];
      if (centered)
        for (int64_t d = 0; d < D; ++d) out[d] = share * (x[d] * scale - mean[d]) + (first ? C(0) : out[d]);
      else
        for (int64_t d = 0; d < D; ++d) out[d] = share * (x[d] * scale) + (first ? C(0) : out[d]);
    }
  }

  // The member nearest to the mean of its cluster; the lowest index on a tie. Of two members the heavier one.
  void update_medoids() {
    split(a.parallel_for, worth(n_ * (gram_path_ ? n_ : a.features)), k_, [&](int64_t begin, int64_t end) {
      Buffer<C> mean(gram_path_ ? padded_ : a.features), scratch(a.features);
      for (int64_t j = begin; j < end; ++j)
        if (changed_[j]) medoid_[j] = nearest_member(j, mean, scratch);
    });
  }

  int32_t nearest_member(int64_t j, C* mean, C* scratch) const {
    const int32_t* member = member_ + start_[j];
    const int64_t count = start_[j + 1] - start_[j], D = a.features;
    if (count == 1 || !(total_[j] > 0)) return member[0];
    if (count == 2) return weight_ && weight_[member[1]] > weight_[member[0]] ? member[1] : member[0];
    if (gram_path_)
      sum_gram_rows(member, share_ + start_[j], count, mean);
    else
      mean_row(j, true, scratch, mean);
    int32_t nearest = member[0];
    C least = std::numeric_limits<C>::infinity();
    for (int64_t m = 0; m < count; ++m) {
      C distance;
      if (gram_path_) {
        distance = norm_[member[m]] - C(2) * mean[member[m]];
      } else {
        const C* x = as_acc(row(member[m]), scratch, D);
        distance = 0;
        for (int64_t d = 0; d < D; ++d) {
          const C difference = x[d] * scale_ - mean_[d] - mean[d];
          distance += difference * difference;
        }
      }
      if (distance < least) {
        least = distance;
        nearest = member[m];
      }
    }
    return nearest;
  }

  // ---------------------------------------------------------------------------------------------------- result

  void finish() {
    const int64_t K = a.clusters, D = a.features;
    int64_t* assignment = a.assignment + image_ * a.tokens;
    C* mass = static_cast<C*>(a.mass) + image_ * K;
    In* centers = static_cast<In*>(a.centers) + image_ * K * D;
    int64_t* medoids = a.medoid_index ? a.medoid_index + image_ * K : nullptr;
    const C most = std::numeric_limits<C>::max();

    for (int64_t i = 0; i < a.tokens; ++i) assignment[i] = -1;
    int32_t* place = count_;  // cluster j is returned as place[j]
    for (int64_t j = 0; j < k_; ++j) place[j] = int32_t(j);
    if (a.sort && k_ > 0) order_by_first_token(place);
    for (int64_t i = 0; i < (k_ > 0 ? n_ : 0); ++i) assignment[token(i)] = place[label_[i]];
    for (int64_t j = k_; j < K; ++j) {
      mass[j] = 0;
      std::memset(static_cast<void*>(centers + j * D), 0, size_t(D) * sizeof(In));
      if (medoids) medoids[j] = -1;
    }
    split(a.parallel_for, worth(2 * n_ * D), k_, [&](int64_t begin, int64_t end) {
      Buffer<C> mean(D), scratch(D);
      for (int64_t j = begin; j < end; ++j) {
        const int64_t out = place[j];
        mass[out] = std::min(total_[j] / weight_scale_, most);
        if (a.medoids) {
          const C* x = as_acc(row(medoid_[j]), scratch, D);
          for (int64_t d = 0; d < D; ++d) mean[d] = x[d] * scale_;
          std::memcpy(static_cast<void*>(centers + out * D), row(medoid_[j]), size_t(D) * sizeof(In));
          if (medoids) medoids[out] = token(medoid_[j]);
        } else {
          mean_row(j, false, scratch, mean);
          narrow(mean, C(1) / scale_, centers + out * D, D);
        }
        error_[j] = cluster_error(j, mean, scratch);
      }
    });
    double inertia = 0;
    for (int64_t j = 0; j < k_; ++j) inertia += error_[j];
    inertia = k_ > 0 ? std::ldexp(inertia, -2 * std::ilogb(scale_) - std::ilogb(weight_scale_)) : 0;
    static_cast<C*>(a.inertia)[image_] = inertia > double(most) ? most : C(inertia);
  }

  double cluster_error(int64_t j, const C* mean, C* scratch) const {
    double error = 0;
    for (int64_t m = start_[j]; m < start_[j + 1]; ++m)
      error += double(weight_ ? weight_[member_[m]] : C(1)) * double(squared_difference(as_acc(row(member_[m]), scratch, a.features), mean));
    return error;
  }

  void order_by_first_token(int32_t* place) {
    int64_t next = 0;
    for (int64_t j = 0; j < k_; ++j) place[j] = -1;
    for (int64_t i = 0; i < n_; ++i)
      if (place[label_[i]] < 0) place[label_[i]] = int32_t(next++);
  }

  const bool parallel_;
  int64_t k_ = 0, padded_ = 0, row_stride_ = 0;
  bool gram_path_ = false;
  C *packed_ = nullptr, *gram_ = nullptr;     // gram path: [panels][D][P], [padded][row_stride]
  C* product_ = nullptr;        // gram path: [k][row_stride]
  const C** row_of_ = nullptr;  // gram path: where center j's products are
  C* center_ = nullptr;         // direct path: [k][D] scaled, centered
  C* center_norm_ = nullptr;    // [k] squared norms
  C *best_ = nullptr, *norm_ = nullptr;       // [n] squared distance to its center; squared norm
  I *label_ = nullptr, *previous_ = nullptr;  // [n]
  int32_t *member_ = nullptr, *start_ = nullptr, *count_ = nullptr, *medoid_ = nullptr;
  C *share_ = nullptr, *total_ = nullptr;     // [n] by place in member_; [k] summed weights
  double* error_ = nullptr;     // [k]
  uint8_t* changed_ = nullptr;  // [k] members differ from the last iteration's
};

template <class In>
inline void cluster_all(const ClusterArgs& a) {
  const bool over_images = a.images >= a.threads && a.threads > 1;
  split(a.parallel_for, over_images, a.images, [&](int64_t begin, int64_t end) {
    Clustering<In> clustering(a, !over_images && a.threads > 1);
    for (int64_t b = begin; b < end; ++b) clustering.run(b);
  });
}

static void cluster(const ClusterArgs& a) {
  switch (a.dtype) {
    case DType::Float32: return cluster_all<float>(a);
    case DType::Float64: return cluster_all<double>(a);
    case DType::BFloat16: return cluster_all<BF16>(a);
    case DType::Float16: return cluster_all<FP16>(a);
  }
}
