// K-Means and K-Medoids of one image: the start, the assignment of tokens, the update.
//
// Every center keeps its products with all tokens, a row as long as a row of the Gram matrix. They come from the Gram matrix
// (gram path) or from the center itself (direct path), and only for centers whose members changed. A direct problem whose
// products or packed tokens need too much memory multiplies every center again and keeps nothing (streamed path).

template <class In>
class Clustering : protected Result<In> {
 protected:
  using Base = Result<In>;
  using typename Base::C;
  using typename Base::I;
  using Base::a, Base::image_, Base::n_, Base::weight_, Base::scale_, Base::mean_, Base::k_, Base::padded_;
  using Base::label_, Base::norm_, Base::member_, Base::share_, Base::start_, Base::count_, Base::medoid_, Base::total_;
  using Base::local_index, Base::row, Base::pack, Base::panel_norms, Base::squared_norm, Base::squared_difference, Base::worth;
  using Base::center_token, Base::parallel_;
  static constexpr int L = kLanes<C>, P = kPanel<C>;

 public:
  Clustering(const ClusterArgs& args, bool parallel) : Base(args, parallel) {}

  void run(int64_t b, int64_t next) {  // next: the image this thread will probably take afterwards, if there is one
    this->take_image(b);
    k_ = std::min(a.counts ? std::min(a.counts[b], a.clusters) : a.clusters, n_);
    if (k_ < 0) k_ = 0;
    take_buffers();
    if (k_ > 0) {
      this->measure();
      gram_path_ = a.path >= 0 ? a.path == int(Path::Gram) : plan();
      kept_ = gram_path_ || (a.path != int(Path::Streamed) && keeps_products(n_, k_, a.features, int(sizeof(C))));
      prepare_tokens();
      if (gram_path_) build_gram(next);
      start();
      iterate();
    }
    this->finish();
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
    return plan_cpu(problem).gram;
  }

  template <class T>
  T* take(int64_t count) {
    return Base::template take<T>(count);
  }

  void take_buffers() {
    Base::take_buffers();
    row_stride_ = padded_ + ((padded_ * int64_t(sizeof(C))) % 1024 == 0 ? L : 0);  // rows not a power of two apart
    previous_ = take<I>(padded_);
    best_ = take<C>(padded_);
    center_norm_ = take<C>(a.clusters);
    used_ = take<int32_t>(a.clusters);
    stale_ = take<int32_t>(a.clusters);
    changed_ = take<uint8_t>(a.clusters);
  }

  void prepare_tokens() {  // packed, if kept, and their norms (the gram path reads those off the diagonal)
    const int64_t D = a.features;
    if (kept_) packed_ = take<C>(padded_ * D);
    split(a.parallel_for, worth(n_ * D), padded_ / P, [&](int64_t begin, int64_t end) {
      Buffer<C> panel(kept_ ? 0 : P * D);
      for (int64_t p = begin; p < end; ++p) {
        C* out = kept_ ? packed_ + p * P * D : panel;
        pack(p * P, out);
        if (!gram_path_) panel_norms(out, norm_ + p * P);
      }
    });
  }

  void build_gram(int64_t next) {
    const int64_t panels = padded_ / P, passes = (a.features + kDepthBlock - 1) / kDepthBlock;
    Ahead ahead;  // the product leaves the memory idle: time to fetch the next image
    if (next < a.images && a.x_token_stride == a.features)
      ahead.want(static_cast<const In*>(a.x) + next * a.x_image_stride, a.tokens * a.features * int64_t(sizeof(In)),
                 panels * (panels + 1) / 2 * (P / kRows) * passes);
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
    for (int64_t i = round_up(n_, kRows); i < end; ++i) std::memset(gram_ + i * row_stride_, 0, size_t(end) * sizeof(C));
    for (int64_t i = 0; i < n_; ++i) std::memset(gram_ + i * row_stride_ + end, 0, size_t(row_stride_ - end) * sizeof(C));
  }

  // -------------------------------------------------------------------------------------------------- centers

  void start() {
    const int64_t D = a.features;
    if (kept_) {
      product_ = take<C>(k_ * row_stride_);
      row_of_ = take<const C*>(k_);
      for (int64_t j = 0; j < k_; ++j) row_of_[j] = product_ + j * row_stride_;
    }
    if (!gram_path_ || a.init_centers) center_ = take<C>(k_ * D);
    for (int64_t j = 0; j < k_; ++j) used_[j] = -1;
    if (a.init_centers) {
      const C* given = static_cast<const C*>(a.init_centers) + image_ * a.clusters * D;
      for (int64_t j = 0; j < k_; ++j) {
        for (int64_t d = 0; d < D; ++d) center_[j * D + d] = given[j * D + d] * scale_ - mean_[d];
        center_norm_[j] = squared_norm(center_ + j * D);
        stale_[j] = int32_t(j);
      }
      multiply_centers(k_);
      return;
    }
    if (a.init_index)
      for (int64_t j = 0; j < k_; ++j) {
        const int64_t asked = a.init_index[image_ * a.clusters + j];
        medoid_[j] = int32_t(local_index(std::min(std::max<int64_t>(asked, 0), a.tokens - 1)));
      }
    else
      farthest_first();
    use_medoids();
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
    Buffer<C> center(D);
    const In* chosen = row(token);
    for (int64_t d = 0; d < D; ++d) center[d] = C(to_float(chosen[d])) * scale_;
    split(a.parallel_for, worth(n_ * D), padded_, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) apart[i] = i < n_ ? squared_difference(row(i), center) : C(0);
    });
  }

  void use_medoids() {  // the centers are the tokens medoid_[j]
    const int64_t D = a.features;
    int64_t count = 0;
    for (int64_t j = 0; j < k_; ++j) {
      if (gram_path_) {
        row_of_[j] = gram_ + medoid_[j] * row_stride_;
      } else if (medoid_[j] != used_[j]) {
        center_token(medoid_[j], center_ + j * D);
        stale_[count++] = int32_t(j);
      }
      center_norm_[j] = norm_[medoid_[j]];
      used_[j] = medoid_[j];
    }
    multiply_centers(count);
  }

  // Products of the centers which[0..count) with a panel's tokens: out[i] gets those of the i-th.
  TP_INLINE void multiply_panel(const int32_t* which, int64_t count, const C* panel, C* const* out) const {
    const int64_t D = a.features;
    C nowhere[P] = {};
    for (int64_t d0 = 0; d0 == 0 || d0 < D; d0 += kDepthBlock)
      for (int64_t i = 0; i < count; i += kRows) {
        const C* rows[kRows];
        C* to[kRows];
        for (int r = 0; r < kRows; ++r) {
          rows[r] = center_ + which[std::min(i + r, count - 1)] * D + d0;
          to[r] = i + r < count ? out[i + r] : nowhere;
        }
        product_strip<C, TP_VECTORS>(rows, 1, panel + d0 * P, std::min(kDepthBlock, D - d0), d0 > 0, to);
      }
  }

  // The products of the centers stale_[0..count) with all tokens, where they are kept.
  void multiply_centers(int64_t count) {
    if (!kept_ || count == 0) return;
    const int64_t D = a.features;
    split(a.parallel_for, worth(n_ * count * D / 8), padded_ / P, [&](int64_t begin, int64_t end) {
      Buffer<C*> out(count);
      for (int64_t p = begin; p < end; ++p) {
        for (int64_t i = 0; i < count; ++i) out[i] = product_ + stale_[i] * row_stride_ + p * P;
        multiply_panel(stale_, count, packed_ + p * P * D, out);
      }
    });
  }

  void iterate() {
    for (int64_t t = 0;; ++t) {
      if (kept_)
        assign_kept();
      else
        assign_streamed();
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
      this->group_members();
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

  // The nearest centers of a panel's tokens so far.
  struct Nearest {
    Vec<C> best[TP_VECTORS];
    Vec<I> label[TP_VECTORS];

    TP_INLINE Nearest() {
      for (int v = 0; v < TP_VECTORS; ++v) {
        best[v] = splat(std::numeric_limits<C>::infinity());
        label[v] = Vec<I>{};
      }
    }
    TP_INLINE void compare(int64_t j, C center_norm, const C* products) {
      const Vec<C> norm = splat(center_norm);
      const Vec<I> index = splat(I(j));
#pragma GCC unroll 4
      for (int v = 0; v < TP_VECTORS; ++v) {
        const Vec<C> score = norm - C(2) * load(products + v * L);
        const auto nearer = score < best[v];
        best[v] = nearer ? score : best[v];
        label[v] = nearer ? index : label[v];
      }
    }
    TP_INLINE void write(C* best_out, I* label_out) const {
      for (int v = 0; v < TP_VECTORS; ++v) {
        store(best_out + v * L, best[v]);
        store(label_out + v * L, label[v]);
      }
    }
  };

  void assign_kept() {
    const bool far = k_ * row_stride_ * int64_t(sizeof(C)) > 512 << 10;  // products beyond the second-level cache
    split(a.parallel_for, worth(n_ * k_), padded_ / P, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin * P; i < end * P; i += P) {
        Nearest nearest;
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
  }

  void assign_streamed() {
    constexpr int64_t kCenters = 64, kPanels = 8;  // centers whose products wait for the comparison; panels they are fetched for
    const int64_t panel_size = P * a.features, together = std::min(kPanels, std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(panel_size, 1)));
    split(a.parallel_for, worth(n_ * k_ * a.features / 8), padded_ / P, [&](int64_t begin, int64_t end) {
      Buffer<C> packed(together * panel_size), product(kCenters * P);
      int32_t center[kCenters];
      C* out[kCenters];
      for (int64_t j = 0; j < kCenters; ++j) out[j] = product + j * P;
      for (int64_t p = begin; p < end; p += together) {
        const int64_t panels = std::min(together, end - p);
        Nearest nearest[kPanels];
        for (int64_t q = 0; q < panels; ++q) pack((p + q) * P, packed + q * panel_size);
        for (int64_t first = 0; first < k_; first += kCenters) {
          const int64_t count = std::min(kCenters, k_ - first);
          for (int64_t j = 0; j < count; ++j) center[j] = int32_t(first + j);
          for (int64_t q = 0; q < panels; ++q) {
            multiply_panel(center, count, packed + q * panel_size, out);
            for (int64_t j = 0; j < count; ++j) nearest[q].compare(first + j, center_norm_[first + j], out[j]);
          }
        }
        for (int64_t q = 0; q < panels; ++q) nearest[q].write(best_ + (p + q) * P, label_ + (p + q) * P);
      }
    });
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
      for (int64_t j = begin; j < end; ++j)
        if (changed_[j]) {
          this->template mean_row<true>(j, center_ + j * a.features);
          center_norm_[j] = squared_norm(center_ + j * a.features);
        }
    });
    int64_t count = 0;
    for (int64_t j = 0; j < k_; ++j)
      if (changed_[j]) stale_[count++] = int32_t(j);
    multiply_centers(count);
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
      const C distance = gram_path_ ? norm_[member[m]] - C(2) * mean[member[m]] : squared_difference(row(member[m]), mean);
      if (distance < least) {
        least = distance;
        nearest = member[m];
      }
    }
    return nearest;
  }

  int64_t row_stride_ = 0;      // of products and the Gram matrix
  bool gram_path_ = false, kept_ = false;
  C *packed_ = nullptr, *gram_ = nullptr;     // if kept: [panels][D][P]; gram path: [padded][row_stride]
  C* product_ = nullptr;        // if kept: [k][row_stride]
  const C** row_of_ = nullptr;  // if kept: where center j's products are
  C* center_ = nullptr;         // direct path: [k][D] scaled, centered
  C* center_norm_ = nullptr;    // [k] squared norms
  C* best_ = nullptr;           // [n] squared distance to its center
  I* previous_ = nullptr;       // [n] labels of the last iteration
  int32_t *used_ = nullptr, *stale_ = nullptr;  // [k] the token a center was; centers to multiply
  uint8_t* changed_ = nullptr;  // [k] members differ from the last iteration's
};

// Images are handed to the threads one by one: they need not take equally long, nor are all cores equally fast. An image
// that needs much memory gets all threads, so that only one is in memory.
template <class In>
inline void cluster_all(const ClusterArgs& a) {
  constexpr int64_t kLarge = 4 << 20;  // elements
  const bool large = a.tokens * std::max(std::min(a.tokens, a.clusters), a.features) > kLarge;
  if (a.images < a.threads || a.threads < 2 || large) {
    Clustering<In> clustering(a, a.threads > 1);
    for (int64_t b = 0; b < a.images; ++b) clustering.run(b, b + 1);
    return;
  }
  std::atomic<int64_t> next{0};
  split(a.parallel_for, true, a.threads, [&](int64_t, int64_t) {
    Clustering<In> clustering(a, false);
    for (int64_t b; (b = next++) < a.images;) clustering.run(b, next);
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
