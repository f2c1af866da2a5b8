// The clusters of one image as lists of their tokens, the means of those, and what a call returns.

template <class In>
class Result : protected Image<In> {
 protected:
  using Base = Image<In>;
  using Base::a, Base::image_, Base::n_, Base::weight_, Base::scale_, Base::weight_scale_, Base::mean_;
  using Base::token, Base::row, Base::squared_difference;
  using typename Base::C;
  using typename Base::I;
  static constexpr int L = kLanes<C>, P = kPanel<C>;

  Result(const ClusterArgs& args, bool parallel) : Base(args), parallel_(parallel) {}

  template <class T>
  T* take(int64_t count) {
    return this->arena_.template take<T>(count);
  }

  // Worth waking the other threads for `operations` element operations?
  bool worth(int64_t operations) const { return parallel_ && operations > 200000; }

  void take_buffers() {
    padded_ = round_up(std::max<int64_t>(n_, 1), P);
    label_ = take<I>(padded_);
    norm_ = take<C>(padded_);
    member_ = take<int32_t>(padded_);
    share_ = take<C>(padded_);
    start_ = take<int32_t>(a.clusters + 1);
    count_ = take<int32_t>(a.clusters + 1);
    medoid_ = take<int32_t>(a.clusters);
    total_ = take<C>(a.clusters);
    error_ = take<double>(a.clusters);
  }

  void group_members() {
    group(label_, n_, k_, start_, member_, this->ascending_);
    for (int64_t j = 0; j < k_; ++j)
      total_[j] = shares(member_ + start_[j], start_[j + 1] - start_[j], weight_, share_ + start_[j]);
  }

  // W vectors of a mean: out (added to if `add`) = sum over r of share[r] * (x[r] * scale - mean); Centered or without
  // mean.
  template <int W, bool Centered>
  TP_INLINE void add_members(const In* const* x, const C* share, int64_t count, int64_t d, bool add, C* out) const {
    const Vec<C> scale = splat(scale_);
    Vec<C> sum[W];
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) sum[w] = add ? load(out + d + w * L) : Vec<C>{};
    for (int64_t r = 0; r < count; ++r) {
      const Vec<C> s = splat(share[r]);
#pragma GCC unroll 4
      for (int w = 0; w < W; ++w) {
        const Vec<C> v = load_acc(x[r] + d + w * L) * scale;
        sum[w] += s * (Centered ? v - load(mean_ + d + w * L) : v);
      }
    }
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) store(out + d + w * L, sum[w]);
  }

  // The weighted mean of cluster j's tokens, scaled; minus the image's mean token when Centered.
  template <bool Centered>
  void mean_row(int64_t j, C* out) const {
    constexpr int W = 4, kTogether = 16;  // members whose rows stay in the first-level cache
    const int64_t D = a.features;
    for (int64_t m = start_[j]; m < start_[j + 1]; m += kTogether) {
      const int64_t count = std::min<int64_t>(kTogether, start_[j + 1] - m);
      const bool add = m > start_[j];
      const C* share = share_ + m;
      const In* x[kTogether];
      for (int64_t r = 0; r < count; ++r) x[r] = row(member_[m + r]);
      int64_t d = 0;
      for (; d + W * L <= D; d += W * L) add_members<W, Centered>(x, share, count, d, add, out);
      for (; d + L <= D; d += L) add_members<1, Centered>(x, share, count, d, add, out);
      for (; d < D; ++d) {
        C sum = add ? out[d] : C(0);
        for (int64_t r = 0; r < count; ++r)
          sum += share[r] * (C(to_float(x[r][d])) * scale_ - (Centered ? mean_[d] : C(0)));
        out[d] = sum;
      }
    }
  }

  void finish() {
    const int64_t K = a.clusters, D = a.features;
    int64_t* assignment = a.assignment + image_ * a.tokens;
    C* mass = static_cast<C*>(a.mass) + image_ * K;
    In* centers = static_cast<In*>(a.centers) + image_ * K * D;
    int64_t* medoids = a.medoid_index ? a.medoid_index + image_ * K : nullptr;
    const C most = std::numeric_limits<C>::max();

    int32_t* place = count_;  // cluster j is returned as place[j]
    for (int64_t j = 0; j < k_; ++j) place[j] = int32_t(j);
    if (a.sort && k_ > 0) order_by_first_token(place);
    if (k_ == 0 || n_ < a.tokens)
      for (int64_t i = 0; i < a.tokens; ++i) assignment[i] = -1;
    for (int64_t i = 0; i < (k_ > 0 ? n_ : 0); ++i) assignment[token(i)] = place[label_[i]];
    for (int64_t j = k_; j < K; ++j) {
      mass[j] = 0;
      std::memset(static_cast<void*>(centers + j * D), 0, size_t(D) * sizeof(In));
      if (medoids) medoids[j] = -1;
    }
    split(a.parallel_for, worth(2 * n_ * D), k_, [&](int64_t begin, int64_t end) {
      Buffer<C> mean(D);
      for (int64_t j = begin; j < end; ++j) {
        const int64_t out = place[j];
        mass[out] = std::min(total_[j] / weight_scale_, most);
        if (medoids) medoids[out] = token(medoid_[j]);
        error_[j] = write_center(j, mean, centers + out * D);
      }
    });
    double inertia = 0;
    for (int64_t j = 0; j < k_; ++j) inertia += error_[j];
    inertia = k_ > 0 ? std::ldexp(inertia, -2 * std::ilogb(scale_) - std::ilogb(weight_scale_)) : 0;
    static_cast<C*>(a.inertia)[image_] = inertia > double(most) ? most : C(inertia);
  }

  // Center j as it is returned -> the weighted squared distances of its members to it.
  double write_center(int64_t j, C* mean, In* out) const {
    const int64_t D = a.features, first = member_[start_[j]];
    const bool alone = start_[j + 1] - start_[j] == 1, settled = settled_ && !changed_[j];
    if (alone || a.medoids) {
      const In* x = row(a.medoids ? medoid_[j] : first);
      std::memcpy(static_cast<void*>(out), x, size_t(D) * sizeof(In));
      if (alone) return double(norm_[first]) * double(weight_ ? weight_[first] : C(1)) * 0;  // NaN stays NaN
      for (int64_t d = 0; d < D; ++d) mean[d] = C(to_float(x[d])) * scale_;
    } else {
      if (settled)
        for (int64_t d = 0; d < D; ++d) mean[d] = center_[j * D + d] + mean_[d];
      else
        mean_row<false>(j, mean);
      narrow(mean, C(1) / scale_, out, D);
    }
    double error = 0;
    if (settled) {
      for (int64_t m = start_[j]; m < start_[j + 1]; ++m)
        error += double(weight_ ? weight_[member_[m]] : C(1)) * double(best_[member_[m]]);
      return error;
    }
    for (int64_t m = start_[j]; m < start_[j + 1]; ++m)
      error += double(weight_ ? weight_[member_[m]] : C(1)) * double(squared_difference(row(member_[m]), mean));
    return error;
  }

  void order_by_first_token(int32_t* place) {
    int64_t next = 0;
    for (int64_t j = 0; j < k_; ++j) place[j] = -1;
    for (int64_t m = 0; m < n_; ++m) {
      const I j = label_[this->ascending_ ? this->ascending_[m] : m];
      if (place[j] < 0) place[j] = int32_t(next++);
    }
  }

  const bool parallel_;
  int64_t k_ = 0, padded_ = 0;
  I* label_ = nullptr;   // [n]
  C* norm_ = nullptr;    // [n] squared norms of the tokens, scaled and centered (rounded ones: times Rounding::keep)
  C* center_ = nullptr;  // [k][D] scaled, centered
  C* best_ = nullptr;    // [n] squared distance to its center, or an upper bound of it (direct.h: assign_first)
  uint8_t* changed_ = nullptr;  // [k] members differ from those the center was last made of
  bool settled_ =
      false;  // center_ and best_ are right for clusters that did not change since (never with a NaN in mean_)
  int32_t *member_ = nullptr, *start_ = nullptr, *count_ = nullptr, *medoid_ = nullptr;
  C *share_ = nullptr, *total_ = nullptr;  // [n] by place in member_; [k] summed weights
  double* error_ = nullptr;                // [k]
};
