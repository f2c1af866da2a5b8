// The tokens of one image as the clustering sees them: without padding, scaled to a safe range, centered, weighted.

template <class In>
class Image {
 protected:
  using C = typename AccOf<In>::Type;
  using I = typename Lane<C>::Int;
  static constexpr int L = kLanes<C>, P = kPanel<C>;

  explicit Image(const ClusterArgs& args) : a(args) {}

  void take_image(int64_t b) {
    arena_.reset();
    image_ = b;
    x_ = static_cast<const In*>(a.x) + b * a.x_image_stride;
    valid_ = nullptr;
    n_ = a.tokens;
    if (!a.mask) return;
    const bool* mask = a.mask + image_ * a.tokens;
    valid_ = arena_.take<int32_t>(a.tokens);
    n_ = 0;
    for (int64_t i = 0; i < a.tokens; ++i)
      if (mask[i]) valid_[n_++] = int32_t(i);
  }

  int64_t token(int64_t i) const { return valid_ ? valid_[i] : i; }
  const In* row(int64_t i) const { return x_ + token(i) * a.x_token_stride; }

  int64_t local_index(int64_t token) const {  // its place among the valid tokens (the next valid one, for padding)
    if (!valid_) return token;
    return std::min<int64_t>(std::lower_bound(valid_, valid_ + n_, int32_t(token)) - valid_, n_ - 1);
  }

  // out = x * scale - mean: a token as distances see it.
  static TP_INLINE void center_row(const C* x, C scale, const C* __restrict mean, C* out, int64_t D) {
    for (int64_t d = 0; d < D; ++d) out[d] = x[d] * scale - mean[d];
  }

  // Scale, mean token and weights.
  void measure() {
    const int64_t D = a.features;
    mean_ = arena_.take<C>(D);
    C* __restrict mean = mean_;
    C* __restrict most = arena_.take<C>(D);
    C* scratch = arena_.take<C>(D);
    for (int64_t d = 0; d < D; ++d) mean[d] = most[d] = 0;
    for (int64_t i = 0; i < n_; ++i) {
      const C* x = as_acc(row(i), scratch, D);
      for (int64_t d = 0; d < D; ++d) {
        const C size = std::fabs(x[d]);
        mean[d] += x[d];
        most[d] = size > most[d] ? size : most[d];
      }
    }
    C largest = 0;
    for (int64_t d = 0; d < D; ++d) largest = most[d] > largest ? most[d] : largest;
    scale_ = safe_scale(largest);
    if (scale_ != C(1)) {
      for (int64_t d = 0; d < D; ++d) mean[d] = 0;
      for (int64_t i = 0; i < n_; ++i) {
        const C* x = as_acc(row(i), scratch, D);
        for (int64_t d = 0; d < D; ++d) mean[d] += x[d] * scale_;
      }
    }
    for (int64_t d = 0; d < D; ++d) mean[d] /= C(n_);

    weight_ = nullptr;
    weight_scale_ = 1;
    if (a.weights) {
      const C* given = static_cast<const C*>(a.weights) + image_ * a.tokens;
      C* weight = arena_.take<C>(n_);
      C heaviest = 0;
      for (int64_t i = 0; i < n_; ++i) heaviest = given[token(i)] > heaviest ? given[token(i)] : heaviest;
      weight_scale_ = safe_scale(heaviest);
      for (int64_t i = 0; i < n_; ++i) weight[i] = given[token(i)] * weight_scale_;
      weight_ = weight;
    }
  }

  // Centered, scaled tokens [first, first + P) as a packed panel; zeros past the end.
  void pack(int64_t first, C* panel) const {
    const In* rows[P];
    for (int r = 0; r < P; ++r) rows[r] = first + r < n_ ? row(first + r) : nullptr;
    pack_panel<In, C>(rows, a.features, scale_, mean_, panel);
  }

  void panel_norms(const C* panel, C* norm) const {
    Vec<C> sum[TP_VECTORS] = {};
    for (int64_t d = 0; d < a.features; ++d)
#pragma GCC unroll 4
      for (int v = 0; v < TP_VECTORS; ++v) {
        const Vec<C> x = load(panel + d * P + v * L);
        sum[v] += x * x;
      }
    for (int v = 0; v < TP_VECTORS; ++v) store(norm + v * L, sum[v]);
  }

  C squared_norm(const C* x) const {
    Vec<C> sum = {};
    C rest = 0;
    int64_t d = 0;
    for (; d + L <= a.features; d += L) sum += load(x + d) * load(x + d);
    for (; d < a.features; ++d) rest += x[d] * x[d];
    return lane_sum<C>(sum) + rest;
  }

  C squared_difference(const C* x, const C* center) const {  // ||x * scale - center||^2
    const int64_t D = a.features;
    const Vec<C> scale = splat(scale_);
    Vec<C> sum = {};
    C rest = 0;
    int64_t d = 0;
    for (; d + L <= D; d += L) {
      const Vec<C> difference = load(x + d) * scale - load(center + d);
      sum += difference * difference;
    }
    for (; d < D; ++d) rest += (x[d] * scale_ - center[d]) * (x[d] * scale_ - center[d]);
    return lane_sum<C>(sum) + rest;
  }

  const ClusterArgs& a;
  Arena arena_;
  int64_t image_ = 0, n_ = 0;   // which image; its number of valid tokens
  const In* x_ = nullptr;
  int32_t* valid_ = nullptr;    // [n] token indices, or null: all
  const C* weight_ = nullptr;   // [n] scaled, or null
  C scale_ = 1, weight_scale_ = 1;  // powers of two
  C* mean_ = nullptr;           // [D] the image's mean token, scaled
};
