// Clustering without a Gram matrix: products with all centers once, afterwards bounds.
//
// The first iteration multiplies every token with every center. Later ones first ask where a center can have come nearer than
// a token's own: one that was at distance d and has moved by m since is at least d - m away (triangle inequality; Elkan, "Using
// the triangle inequality to accelerate k-means", ICML 2003). Of a ViT's tokens and centers, a pair in a hundred is left.
// There is a bound for every token and center or, where those need too much memory, for every token and group of consecutive
// centers (path "streamed"; Ding et al., "Yinyang k-means", ICML 2015). The result is that of comparing with all centers:
// bounds leave room for rounding, and what they do not rule out is computed, ties going to the lowest center.

// The nearest centers of a panel's tokens so far, by score: ||center||^2 - 2 <token, center>.
template <class C>
struct Nearest {
  using I = typename Lane<C>::Int;
  static constexpr int L = kLanes<C>;
  Vec<C> best[TP_VECTORS];
  Vec<I> label[TP_VECTORS];

  TP_INLINE Nearest() {
    for (int v = 0; v < TP_VECTORS; ++v) {
      best[v] = splat(std::numeric_limits<C>::infinity());
      label[v] = Vec<I>{};
    }
  }
  // Center j, above all before it unless AnyOrder.
  template <bool AnyOrder>
  TP_INLINE void take(int v, int64_t j, Vec<C> score) {
    const Vec<I> index = splat(I(j));
    auto nearer = score < best[v];
    if (AnyOrder) nearer |= (score == best[v]) & (index < label[v]);
    best[v] = nearer ? score : best[v];
    label[v] = nearer ? index : label[v];
  }
  TP_INLINE void compare(int64_t j, C center_norm, const C* products) {
    const Vec<C> norm = splat(center_norm);
#pragma GCC unroll 4
    for (int v = 0; v < TP_VECTORS; ++v) take<false>(v, j, norm - C(2) * load(products + v * L));
  }
  TP_INLINE void write(C* best_out, I* label_out) const {
    for (int v = 0; v < TP_VECTORS; ++v) {
      store(best_out + v * L, best[v]);
      store(label_out + v * L, label[v]);
    }
  }
};

template <class In>
class Direct : protected Result<In> {
 protected:
  using Base = Result<In>;
  using typename Base::C;
  using typename Base::I;
  using Base::a, Base::n_, Base::scale_, Base::mean_, Base::k_, Base::padded_, Base::label_, Base::norm_, Base::member_;
  using Base::start_, Base::medoid_;
  using Base::row, Base::pack, Base::panel_norms, Base::squared_norm, Base::squared_differences, Base::worth;
  using Base::center_token;
  static constexpr int L = kLanes<C>, P = kPanel<C>;
  static constexpr int64_t kCenters = 64, kPanels = 8;  // centers whose products wait; panels that centers are fetched for

  using Base::Base;

  template <class T>
  T* take(int64_t count) {
    return Base::template take<T>(count);
  }

  // What a thread needs while it looks at panels.
  struct Scratch {
    Scratch(const Direct& d)
        : products(kCenters * P), packed(d.together_ * P * d.a.features),
          second(d.group_ > 1 ? d.together_ * d.groups_ * P : 0), group(d.groups_), slot(d.groups_), tokens(d.groups_),
          center(d.k_), distance(d.k_) {
      for (int64_t j = 0; j < kCenters; ++j) out[j] = products + j * P;
      for (int64_t g = 0; g < d.groups_; ++g) {
        group[g] = int32_t(g);
        slot[g] = -1;
      }
    }
    Buffer<C> products, packed, second;  // second[slot][panel][P]: the second lowest score of a group
    C* out[kCenters];
    Buffer<int32_t> group, slot;         // groups to look at, and where a group stands among them (-1: it does not)
    Buffer<uint64_t> tokens;             // for which tokens of the panel, one bit each
    Buffer<int32_t> center;              // one token's candidates
    Buffer<C> distance;                  // and how far they are, squared
  };

  void take_direct() {
    center_ = take<C>(k_ * a.features);
    drift_ = take<C>(k_);
    group_ = a.path == int(Path::Streamed) ? std::max<int64_t>(center_group(n_, k_, sizeof(C)), 4) : center_group(n_, k_, sizeof(C));
    groups_ = (k_ + group_ - 1) / group_;
    bound_ = take<C>(padded_ * groups_);
    travelled_ = take<C>(groups_);
    for (int64_t g = 0; g < groups_; ++g) travelled_[g] = 0;
    held_ = take<I>(padded_);
    together_ = std::min(kPanels, std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(P * a.features, 1)));
    slack_ = C(2) * C(a.features + 16) * std::numeric_limits<C>::epsilon();
  }

  // Products of the centers which[0..count) with a panel's tokens: out[i] gets those of the i-th.
  TP_INLINE void multiply_panel(const int32_t* which, int64_t count, const C* panel, C* const* out, Ahead* ahead = nullptr) const {
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
        if (ahead) ahead->fetch();
        product_strip<C, TP_VECTORS>(rows, 1, panel + d0 * P, std::min(kDepthBlock, D - d0), d0 > 0, to);
      }
  }

  // Norms of the centers, summed as those of tokens are: a token that is a center is at distance zero from it.
  void measure_centers() {
    const int64_t D = a.features;
    Buffer<C> panel(P * D), zero(D), norm(P);
    for (int64_t d = 0; d < D; ++d) zero[d] = 0;
    for (int64_t first = 0; first < k_; first += P) {
      const int64_t count = std::min<int64_t>(P, k_ - first);
      const C* rows[P];
      for (int64_t r = 0; r < count; ++r) rows[r] = center_ + (first + r) * D;
      pack_panel<C, C>(rows, count, D, C(1), zero, panel);
      panel_norms(panel, norm);
      for (int64_t r = 0; r < count; ++r) center_norm_[first + r] = norm[r];
    }
  }

  // ------------------------------------------------------------------------------------------------ assignment

  // All tokens against all centers. Meanwhile the image `next`, if there is one, is fetched.
  void assign_first(int64_t next) {
    measure_centers();
    Ahead ahead;
    this->want_image(next, padded_ / P * ((k_ + kRows - 1) / kRows), ahead);
    split(a.parallel_for, worth(n_ * k_ * a.features / 8), padded_ / P, [&](int64_t begin, int64_t end) {
      Scratch s(*this);
      for (int64_t g = 0; g < groups_; ++g) s.slot[g] = int32_t(g);
      for (int64_t p = begin; p < end; p += together_) {
        const int64_t panels = std::min(together_, end - p);
        for (int64_t q = 0; q < panels; ++q) {
          C* packed = s.packed + q * P * a.features;
          pack((p + q) * P, packed);
          panel_norms(packed, norm_ + (p + q) * P);
        }
        multiply<true>(p, panels, groups_, nullptr, s, this->parallel_ ? nullptr : &ahead);
      }
    });
  }

  // Tokens against those centers that bounds do not rule out. own: the cluster each token is in; best_: its distance there.
  void assign_bounded(const I* own) {
    split(a.parallel_for, worth(n_ * k_), padded_ / P, [&](int64_t begin, int64_t end) {
      Scratch s(*this);
      for (int64_t p = begin; p < end; ++p) {
        std::memcpy(label_ + p * P, own + p * P, P * sizeof(I));
        int64_t pairs = 0;
        const int64_t count = find(p, own, s, pairs);
        if (count == 0) continue;
        for (int64_t f = 0; f < count; ++f) s.slot[s.group[f]] = int32_t(f);
        constexpr int64_t kSingle = 4, kPack = 24;  // a pair alone costs so many times what it does in a product of panels
        if (kSingle * pairs * group_ < P * (count * group_ + kPack)) {
          compute(p, count, own, s);
        } else {
          pack(p * P, s.packed);
          multiply<false>(p, 1, count, own, s, nullptr);
        }
        for (int64_t f = 0; f < count; ++f) s.slot[s.group[f]] = -1;
      }
    });
  }

  C* bounds(int64_t panel, int64_t group) const { return bound_ + (panel * groups_ + group) * P; }

  // A token's bound for a group whose nearest center (of those that are not its own) is at this squared distance.
  C bound(C squared, int64_t group, C norm) const {
    const C far = std::sqrt(squared) + travelled_[group];
    return far * far - norm;
  }

  // The groups in which bounds leave a nearer center possible -> s.group, s.tokens; how many; pairs: tokens times groups.
  int64_t find(int64_t p, const I* own, Scratch& s, int64_t& pairs) {
    const int64_t first = p * P, live = std::min<int64_t>(P, n_ - first);
    C norm[P], reach[P];
    for (int64_t r = 0; r < P; ++r) {
      const int64_t i = first + r;
      norm[r] = r < live ? norm_[i] * (C(1) - slack_) : std::numeric_limits<C>::infinity();
      reach[r] = r < live ? std::sqrt(best_[i]) * (C(1) + slack_) : C(0);
      if (r >= live || own[i] == held_[i]) continue;  // moved by other than its distance: look at where it was
      bounds(p, held_[i] / group_)[r] = -std::numeric_limits<C>::infinity();
      held_[i] = own[i];
    }
    const uint64_t all = live == 64 ? ~uint64_t(0) : (uint64_t(1) << live) - 1;
    Vec<C> norms[TP_VECTORS], reaches[TP_VECTORS];
    for (int v = 0; v < TP_VECTORS; ++v) {
      norms[v] = load(norm + v * L);
      reaches[v] = load(reach + v * L);
    }
    int64_t count = 0;
    const C* at = bounds(p, 0);
    for (int64_t g = 0; g < groups_; ++g, at += P) {
      const Vec<C> travelled = splat(travelled_[g]);
      uint64_t tokens = 0;
#pragma GCC unroll 4
      for (int v = 0; v < TP_VECTORS; ++v) {
        const Vec<C> far = reaches[v] + travelled;
        tokens |= uint64_t(lane_bits<C>(~(norms[v] + load(at + v * L) >= far * far))) << (v * L);  // a NaN rules nothing out
      }
      tokens &= all;
      if (!tokens) continue;
      s.group[count] = int32_t(g);
      s.tokens[count++] = tokens;
      pairs += __builtin_popcountll(tokens);
    }
    return count;
  }

  // Candidates one by one.
  void compute(int64_t p, int64_t count, const I* own, Scratch& s) {
    uint64_t any = 0;
    for (int64_t f = 0; f < count; ++f) any |= s.tokens[f];
    for (; any; any &= any - 1) {
      const int r = __builtin_ctzll(any);
      const int64_t i = p * P + r;
      int64_t candidates = 0;
      for (int64_t f = 0; f < count; ++f) {
        if (!(s.tokens[f] >> r & 1)) continue;
        const int64_t first = s.group[f] * group_, last = std::min(first + group_, k_);
        for (int64_t j = first; j < last; ++j) s.center[candidates++] = int32_t(j);
      }
      if (any & (any - 1)) prefetch_row(p * P + __builtin_ctzll(any & (any - 1)));
      distances(row(i), s.center, candidates, s.distance);

      const C before = best_[i];
      const bool known = before == before;  // else its own center is among the candidates, as all are
      C best = known ? before : std::numeric_limits<C>::infinity();
      I label = known ? own[i] : I(0);
      for (int64_t c = 0; c < candidates; ++c) {
        const C found = s.distance[c];
        if (found < best || (found == best && s.center[c] < label)) {
          best = found;
          label = s.center[c];
        }
      }
      int64_t c = 0;
      bool was = false;  // its group of before is among these
      for (int64_t f = 0; f < count; ++f) {
        if (!(s.tokens[f] >> r & 1)) continue;
        const int64_t g = s.group[f], last = std::min((g + 1) * group_, k_);
        C least = std::numeric_limits<C>::infinity();
        for (int64_t j = g * group_; j < last; ++j, ++c)
          if (I(j) != label && s.distance[c] < least) least = s.distance[c];
        bounds(p, g)[r] = bound(least, g, norm_[i]);
        was |= g == own[i] / group_;
      }
      if (label != own[i] && !was) leave(p, r, own[i], before);
      label_[i] = held_[i] = label;
      best_[i] = known || best < std::numeric_limits<C>::infinity() ? best : before;
    }
  }

  void prefetch_row(int64_t i) const {
    const char* from = reinterpret_cast<const char*>(row(i));
    for (int64_t b = 0; b < a.features * int64_t(sizeof(In)); b += 64) __builtin_prefetch(from + b);
  }

  // A token leaves a cluster whose center is at this squared distance.
  void leave(int64_t p, int64_t r, I cluster, C squared) {
    const int64_t g = cluster / group_;
    C& old = bounds(p, g)[r];
    old = std::min(old, bound(squared, g, norm_[p * P + r]));
  }

  // Squared distances of one token (as it was given) from centers.
  void distances(const In* x, const int32_t* center, int64_t count, C* out) const {
    const int64_t D = a.features;
    int64_t c = 0;
    for (; c + 4 <= count; c += 4) {
      const C* const centers[4] = {center_ + center[c] * D, center_ + center[c + 1] * D, center_ + center[c + 2] * D,
                                   center_ + center[c + 3] * D};
      this->template squared_differences<4>(x, centers, out + c);
    }
    for (; c < count; ++c) {
      const C* const centers[1] = {center_ + center[c] * D};
      this->template squared_differences<1>(x, centers, out + c);
    }
  }

  // Packed panels p.. against the groups s.group[0..count): nearest centers and bounds.
  template <bool First>
  void multiply(int64_t p, int64_t panels, int64_t count, const I* own, Scratch& s, Ahead* ahead) {
    const C infinity = std::numeric_limits<C>::infinity();
    Nearest<C> nearest[kPanels];
    if (!First) {  // one panel; its own centers' distances are known
      C best[P];
      I label[P];
      for (int r = 0; r < P; ++r) {
        const int64_t i = p * P + r;
        const bool known = i < n_ && best_[i] == best_[i];
        best[r] = known ? best_[i] - norm_[i] : infinity;
        label[r] = known ? own[i] : I(0);
      }
      for (int v = 0; v < TP_VECTORS; ++v) {
        nearest[0].best[v] = load(best + v * L);
        nearest[0].label[v] = load(label + v * L);
      }
    }
    int32_t center[kCenters], place[kCenters];
    for (int64_t f = 0, inside = 0; f < count;) {
      int64_t block = 0;
      for (; block < kCenters && f < count; ++block) {
        center[block] = int32_t(s.group[f] * group_ + inside);
        place[block] = int32_t(f);
        if (++inside == group_ || center[block] + 1 == k_) {
          inside = 0;
          ++f;
        }
      }
      for (int64_t q = 0; q < panels; ++q) {
        multiply_panel(center, block, s.packed + q * P * a.features, s.out, ahead);
        for (int64_t c = 0; c < block; ++c) {
          const C norm = center_norm_[center[c]];
          C* lowest = bounds(p + q, s.group[place[c]]);
          C* second = group_ > 1 ? s.second + (place[c] * together_ + q) * P : nullptr;
          const bool fresh = center[c] % group_ == 0;
#pragma GCC unroll 4
          for (int v = 0; v < TP_VECTORS; ++v) {
            const Vec<C> score = splat(norm) - C(2) * load(s.out[c] + v * L);
            nearest[q].template take<!First>(v, center[c], score);
            const Vec<C> low = score - splat(slack_ * norm);
            if (group_ == 1) {
              store(lowest + v * L, low);
              continue;
            }
            const Vec<C> m1 = fresh ? splat(infinity) : load(lowest + v * L), m2 = fresh ? splat(infinity) : load(second + v * L);
            const auto lower = low < m1;
            const Vec<C> higher = lower ? m1 : low;
            store(lowest + v * L, lower ? low : m1);
            store(second + v * L, higher < m2 ? higher : m2);
          }
        }
      }
    }
    for (int64_t q = 0; q < panels; ++q) {
      C best[P];
      I label[P];
      nearest[q].write(best, label);
      if (!First)
        for (int64_t f = 0; f < count; ++f) {
          C* at = bounds(p, s.group[f]);
          for (int r = 0; r < P; ++r) at[r] = bound(std::max(norm_[p * P + r] + at[r], C(0)), s.group[f], norm_[p * P + r]);
        }
      for (int r = 0; r < P; ++r) {
        const int64_t i = (p + q) * P + r;
        if (i >= n_) break;
        const int64_t g = label[r] / group_, slot = s.slot[g];
        if (slot >= 0) {  // a token's own center needs no bound
          C other = group_ > 1 ? C(s.second[(slot * together_ + q) * P + r]) : infinity;
          if (!First) other = bound(std::max(norm_[i] + other, C(0)), g, norm_[i]);
          bounds(p + q, g)[r] = other;
        }
        if (!First && label[r] == own[i]) continue;
        if (!First && s.slot[own[i] / group_] < 0) leave(p, r, own[i], best_[i]);
        const C distance = best[r] + norm_[i];
        best_[i] = distance < 0 ? C(0) : distance;
        label_[i] = held_[i] = label[r];
      }
    }
  }

  // ---------------------------------------------------------------------------------------------------- update

  // Centers of clusters whose members changed, how far they moved, and how far their members are.
  void update_direct() {
    const int64_t D = a.features;
    split(a.parallel_for, worth(2 * n_ * D), k_, [&](int64_t begin, int64_t end) {
      Buffer<C> to(D);
      for (int64_t j = begin; j < end; ++j) {
        drift_[j] = 0;
        if (!changed_[j]) continue;
        if (a.medoids)
          center_token(medoid_[j], to);
        else
          this->template mean_row<true>(j, to);
        C* center = center_ + j * D;
        drift_[j] = std::sqrt(squared_distance(center, to)) * (C(1) + slack_);
        std::memcpy(center, to, size_t(D) * sizeof(C));
        center_norm_[j] = squared_norm(center);
        const C* const centers[1] = {center};
        const bool alone = start_[j + 1] - start_[j] == 1;
        for (int64_t m = start_[j]; m < start_[j + 1]; ++m) {
          const int64_t i = member_[m];
          if (m + 1 < n_) prefetch_row(member_[m + 1]);
          if (alone)
            best_[i] = norm_[i] * 0;  // NaN stays NaN
          else
            this->template squared_differences<1>(row(i), centers, best_ + i);
        }
      }
    });
    for (int64_t g = 0; g < groups_; ++g) {
      C most = 0;
      for (int64_t j = g * group_; j < std::min((g + 1) * group_, k_); ++j) most = drift_[j] <= most ? most : drift_[j];  // or NaN
      travelled_[g] += most;
    }
  }

  C squared_distance(const C* a_row, const C* b_row) const {
    Vec<C> sum = {};
    C rest = 0;
    int64_t d = 0;
    for (; d + L <= a.features; d += L) {
      const Vec<C> difference = load(a_row + d) - load(b_row + d);
      sum += difference * difference;
    }
    for (; d < a.features; ++d) rest += (a_row[d] - b_row[d]) * (a_row[d] - b_row[d]);
    return lane_sum<C>(sum) + rest;
  }

  C* center_ = nullptr;         // [k][D] scaled, centered
  C* center_norm_ = nullptr;    // [k] squared norms
  C* best_ = nullptr;           // [n] squared distance to its center
  uint8_t* changed_ = nullptr;  // [k] members differ from the last iteration's
  int64_t group_ = 1, groups_ = 0;  // consecutive centers that share a bound; how many groups
  // [panels][groups][P] the norm of the token plus this is a lower bound of (distance + travelled)^2, where the distance is
  // that of the group's nearest center other than the token's own when it was last computed, and travelled what the group had
  // then: so a center is nearer than `reach` only if it is below (reach + what the group has travelled by now)^2.
  C* bound_ = nullptr;
  C* travelled_ = nullptr;      // [groups] the sum over iterations of the longest way one of its centers moved
  C* drift_ = nullptr;          // [k] how far a center moved in the last update
  I* held_ = nullptr;           // [n] the cluster whose center a token's bounds leave out
  C slack_ = 0;                 // relative room for rounding
  int64_t together_ = 1;        // panels multiplied at a time
};
