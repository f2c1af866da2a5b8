// Clustering without a Gram matrix: products with all centers once, afterwards bounds.
//
// The first iteration multiplies every token with every center. Later ones first ask where a center can have come nearer than
// a token's own: one that was at distance d and has moved by m since is at least d - m away (triangle inequality; Elkan, "Using
// the triangle inequality to accelerate k-means", ICML 2003). Of a ViT's tokens and centers, a pair in a hundred is left.
// There is a bound for every token and center or, where those need too much memory, for every token and group of consecutive
// centers (path "streamed"; Ding et al., "Yinyang k-means", ICML 2015). Where bounds leave much of a panel open, products
// tighten them; what is open then is computed from differences, ties going to the lowest center. The result is that of
// comparing with all centers: bounds leave room for rounding (slack_), and what is not a number rules nothing out.

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
  TP_INLINE void take(int v, int64_t j, Vec<C> score) {  // center j, above all before it
    const Vec<I> index = splat(I(j));
    const auto nearer = score < best[v];
    best[v] = nearer ? score : best[v];
    label[v] = nearer ? index : label[v];
  }
  TP_INLINE void compare(int64_t j, C center_norm, const C* products) {
    const Vec<C> norm = splat(center_norm);
#pragma GCC unroll 4
    for (int v = 0; v < TP_VECTORS; ++v) take(v, j, norm - C(2) * load(products + v * L));
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
  using Base::a, Base::n_, Base::k_, Base::padded_, Base::label_, Base::norm_, Base::member_;
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
          second(d.group_ > 1 ? d.together_ * d.groups_ * P : 0), group(d.groups_), of_token(P * d.groups_),
          center(d.group_ > 1 ? d.k_ : 0), tokens(d.groups_), distance(d.k_) {
      for (int64_t j = 0; j < kCenters; ++j) out[j] = products + j * P;
    }
    int64_t ask_all(int64_t groups) {
      for (int64_t g = 0; g < groups; ++g) group[g] = int32_t(g);
      return groups;
    }
    Buffer<C> products, packed, second;  // second[group][panel][P]: the second lowest score of a group
    C* out[kCenters];
    Buffer<int32_t> group;               // groups to look at
    Buffer<int32_t> of_token, center;    // the groups to look at for each token; one token's candidates
    Buffer<uint64_t> tokens;             // for which tokens a group is looked at, one bit each
    Buffer<C> distance;                  // how far a token's candidates are, squared
  };

  void take_direct() {
    center_ = take<C>(k_ * a.features);
    drift_ = take<C>(k_);
    group_ = center_group(n_, k_, sizeof(C));
    if (a.path == int(Path::Streamed)) group_ = std::max<int64_t>(group_, 4);
    groups_ = (k_ + group_ - 1) / group_;
    group_of_ = take<int32_t>(k_);
    for (int64_t j = 0; j < k_; ++j) group_of_[j] = int32_t(j / group_);
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
      s.ask_all(groups_);
      for (int64_t p = begin; p < end; p += together_) {
        const int64_t panels = std::min(together_, end - p);
        for (int64_t q = 0; q < panels; ++q) {
          C* packed = s.packed + q * P * a.features;
          pack((p + q) * P, packed);
          panel_norms(packed, norm_ + (p + q) * P);
        }
        nearest_of_all(p, panels, s, this->parallel_ ? nullptr : &ahead);
      }
    });
  }

  // Tokens against those centers that bounds do not rule out. own: the cluster each token is in; best_: its distance there.
  void assign_bounded(const I* own) {
    split(a.parallel_for, worth(n_ * k_), padded_ / P, [&](int64_t begin, int64_t end) {
      Scratch s(*this);
      for (int64_t p = begin; p < end; ++p) {
        std::memcpy(label_ + p * P, own + p * P, P * sizeof(I));
        const Panel panel = take_up(p, own);
        int64_t count = s.ask_all(groups_), pairs = 0;
        find(p, panel, s, count, pairs);
        if (!single_costs_less(pairs * group_, count * group_)) {
          pack(p * P, s.packed);
          tighten(p, count, own, s);
          find(p, panel, s, count, pairs);
        }
        if (count > 0) compute(p, count, own, s);
      }
    });
  }

  // So many pairs one by one, or a whole panel against so many centers? Prices in hundredths of a nanosecond, measured.
  bool single_costs_less(int64_t pairs, int64_t centers) const {
    const int64_t D = a.features, single = 9 * D + 2500, together = 2 * D + 100, pack = 60 * D;
    return pairs * single < P * (centers * together + pack);
  }

  C* bounds(int64_t panel, int64_t group) const { return bound_ + (panel * groups_ + group) * P; }

  // A token's bound for a group whose nearest center (of those that are not its own) is at this squared distance.
  C bound(C squared, int64_t group, C norm) const {
    const C far = std::sqrt(squared) + travelled_[group];
    return far * far - norm;
  }

  struct Panel {
    Vec<C> norm[TP_VECTORS], reach[TP_VECTORS];  // squared norms less the room for rounding; distances to the own center, plus it
    uint64_t live;                               // tokens, not padding
  };

  // A panel's tokens where they are now: bounds of those that were moved by other than their distance are void.
  Panel take_up(int64_t p, const I* own) {
    const int64_t first = p * P, live = std::min<int64_t>(P, n_ - first);
    C norm[P], reach[P];
    for (int64_t r = 0; r < P; ++r) {
      const int64_t i = first + r;
      norm[r] = r < live ? norm_[i] * (C(1) - slack_) : C(0);
      reach[r] = r < live ? best_[i] : C(0);
      if (r >= live || own[i] == held_[i]) continue;
      bounds(p, group_of_[held_[i]])[r] = -std::numeric_limits<C>::infinity();
      held_[i] = own[i];
    }
    Panel panel;
    for (int v = 0; v < TP_VECTORS; ++v) {
      panel.norm[v] = load(norm + v * L);
      panel.reach[v] = root<C>(load(reach + v * L)) * (C(1) + slack_);
    }
    panel.live = live == 64 ? ~uint64_t(0) : (uint64_t(1) << live) - 1;
    return panel;
  }

  // Of the groups s.group[0..count) those that may hold a center nearer than a token's own, and for which tokens (s.tokens).
  void find(int64_t p, const Panel& panel, Scratch& s, int64_t& count, int64_t& pairs) const {
    const int64_t asked = count;
    count = pairs = 0;
    for (int64_t f = 0; f < asked; ++f) {
      const int32_t g = s.group[f];
      const C* at = bounds(p, g);
      const Vec<C> travelled = splat(travelled_[g] * (C(1) + slack_));
      uint64_t tokens = 0;
#pragma GCC unroll 4
      for (int v = 0; v < TP_VECTORS; ++v) {
        const Vec<C> far = panel.reach[v] + travelled;
        tokens |= uint64_t(lane_bits<C>(~(panel.norm[v] + load(at + v * L) >= far * far))) << (v * L);  // a NaN rules nothing out
      }
      tokens &= panel.live;
      if (!tokens) continue;
      s.group[count] = g;
      s.tokens[count++] = tokens;
      pairs += __builtin_popcountll(tokens);
    }
  }

  // Candidates one by one.
  void compute(int64_t p, int64_t count, const I* own, Scratch& s) {
    int64_t found[P] = {};  // groups to look at for each token: s.of_token[r * groups_ ..]
    for (int64_t f = 0; f < count; ++f)
      for (uint64_t tokens = s.tokens[f]; tokens; tokens &= tokens - 1) {
        const int r = __builtin_ctzll(tokens);
        if (best_[p * P + r] == 0 && s.group[f] * group_ > own[p * P + r]) continue;  // zero loses to lower centers only
        s.of_token[r * groups_ + found[r]++] = s.group[f];
      }
    for (int64_t r = 0; r < P; ++r) {
      if (!found[r]) continue;
      const int32_t* group = s.of_token + r * groups_;
      const int64_t i = p * P + r;
      int64_t next = r + 1;
      while (next < P && !found[next]) ++next;
      if (next < P) prefetch_row(p * P + next);
      const int32_t* center = group;
      int64_t candidates = found[r];
      if (group_ > 1) {
        candidates = 0;
        for (int64_t f = 0; f < found[r]; ++f)
          for (int64_t j = group[f] * group_; j < std::min((group[f] + 1) * group_, k_); ++j) s.center[candidates++] = int32_t(j);
        center = s.center;
      }
      distances(row(i), center, candidates, s.distance);

      const C before = best_[i];
      const bool known = before == before;  // else its own center is among the candidates, as all are
      C best = known ? before : std::numeric_limits<C>::infinity();
      I label = known ? own[i] : I(0);
      for (int64_t c = 0; c < candidates; ++c) {
        const C distance = s.distance[c];
        if (distance < best || (distance == best && center[c] < label)) {
          best = distance;
          label = center[c];
        }
      }
      int64_t c = 0;
      bool was = false;  // the group it was in is among these
      for (int64_t f = 0; f < found[r]; ++f) {
        const int64_t g = group[f], last = std::min((g + 1) * group_, k_);
        C least = std::numeric_limits<C>::infinity();
        for (int64_t j = g * group_; j < last; ++j, ++c)
          if (I(j) != label && s.distance[c] < least) least = s.distance[c];
        bounds(p, g)[r] = bound(least, g, norm_[i]);
        was |= g == group_of_[own[i]];
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
    const int64_t g = group_of_[cluster];
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

  // The products of `panels` packed panels with the centers of the groups s.group[0..count), in ascending order:
  // use(panel, center, place of its group, is it the group's first, products).
  template <class F>
  TP_INLINE void each_center(int64_t panels, int64_t count, Scratch& s, Ahead* ahead, const F& use) {
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
        for (int64_t c = 0; c < block; ++c) use(q, center[c], place[c], center[c] == s.group[place[c]] * group_, s.out[c]);
      }
    }
  }

  // Packed panels p.. against all centers: the nearest ones, and bounds for the others.
  void nearest_of_all(int64_t p, int64_t panels, Scratch& s, Ahead* ahead) {
    const Vec<C> infinity = splat(std::numeric_limits<C>::infinity());
    Nearest<C> nearest[kPanels];
    each_center(panels, groups_, s, ahead, [&](int64_t q, int32_t j, int64_t place, bool fresh, const C* products) {
      const Vec<C> norm = splat(center_norm_[j]), room = splat(slack_ * center_norm_[j]);
      C* lowest = bounds(p + q, place);
      C* second = group_ > 1 ? s.second + (place * together_ + q) * P : nullptr;
#pragma GCC unroll 4
      for (int v = 0; v < TP_VECTORS; ++v) {
        const Vec<C> score = norm - C(2) * load(products + v * L), low = score - room;
        nearest[q].take(v, j, score);
        if (group_ == 1) {
          store(lowest + v * L, low);
          continue;
        }
        const Vec<C> m1 = fresh ? infinity : load(lowest + v * L), m2 = fresh ? infinity : load(second + v * L);
        const auto lower = low < m1;
        const Vec<C> higher = lower ? m1 : low;
        store(lowest + v * L, lower ? low : m1);
        store(second + v * L, higher < m2 ? higher : m2);
      }
    });
    for (int64_t q = 0; q < panels; ++q) {
      const int64_t first = (p + q) * P;
      nearest[q].write(best_ + first, label_ + first);
      for (int r = 0; r < P && first + r < n_; ++r) {
        const int64_t i = first + r, g = group_of_[label_[i]];
        bounds(p + q, g)[r] = group_ > 1 ? C(s.second[(g * together_ + q) * P + r]) : infinity[0];  // all but its own center
        held_[i] = label_[i];
        const C distance = best_[i] + norm_[i];
        best_[i] = distance < 0 ? C(0) : distance;
      }
    }
  }

  // Packed panel p against the groups s.group[0..count): bounds as tight as rounding allows.
  void tighten(int64_t p, int64_t count, const I* own, Scratch& s) {
    const Vec<C> infinity = splat(std::numeric_limits<C>::infinity());
    each_center(1, count, s, nullptr, [&](int64_t, int32_t j, int64_t place, bool fresh, const C* products) {
      const Vec<C> norm = splat(center_norm_[j] * (C(1) - slack_));
      const Vec<I> index = splat(I(j));
      C* lowest = bounds(p, s.group[place]);
#pragma GCC unroll 4
      for (int v = 0; v < TP_VECTORS; ++v) {
        const Vec<C> low = index == load(own + p * P + v * L) ? infinity : norm - C(2) * load(products + v * L);
        const Vec<C> least = fresh ? infinity : load(lowest + v * L);
        store(lowest + v * L, least < low ? least : low);
      }
    });
    for (int64_t f = 0; f < count; ++f) {
      C* at = bounds(p, s.group[f]);
      const Vec<C> travelled = splat(travelled_[s.group[f]]);
      for (int v = 0; v < P; v += L) {
        const Vec<C> norm = load(norm_ + p * P + v), squared = norm + load(at + v);
        const Vec<C> far = root<C>(squared < C(0) ? Vec<C>{} : squared) + travelled;
        store(at + v, far * far - norm);
      }
    }
  }

  // ---------------------------------------------------------------------------------------------------- update

  // Centers of clusters whose members changed, how far they moved, and how far their members are.
  void update_direct() {
    const int64_t D = a.features;
    split(a.parallel_for, worth(2 * n_ * D), k_, [&](int64_t begin, int64_t end) {
      Buffer<C> to(D), way(D);
      for (int64_t j = begin; j < end; ++j) {
        drift_[j] = 0;
        if (!changed_[j]) continue;
        if (a.medoids)
          center_token(medoid_[j], to);
        else
          this->template mean_row<true>(j, to);
        C* center = center_ + j * D;
        for (int64_t d = 0; d < D; ++d) way[d] = to[d] - center[d];
        drift_[j] = std::sqrt(squared_norm(way)) * (C(1) + slack_);
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
    C widest = 0;
    for (int64_t i = 0; i < n_; ++i) widest = std::max(widest, norm_[i]);
    const C far = 16 * std::sqrt(widest);  // only a given center can come from so far (or from where nothing can be computed)
    for (int64_t g = 0; g < groups_; ++g) {
      C most = 0;
      bool usable = true;
      for (int64_t j = g * group_; j < std::min((g + 1) * group_, k_); ++j) {
        usable = usable && drift_[j] <= far;
        most = std::max(most, drift_[j]);
      }
      if (!usable)
        forget(g);
      else if (most > 0)
        travelled_[g] = (travelled_[g] + most) * (C(1) + std::numeric_limits<C>::epsilon());
    }
  }

  void forget(int64_t g) {  // beside such a way the bounds of group g mean nothing: they are made anew
    travelled_[g] = 0;
    for (int64_t p = 0; p < padded_ / P; ++p)
      for (int64_t r = 0; r < P; ++r) bounds(p, g)[r] = -std::numeric_limits<C>::infinity();
  }

  C* center_ = nullptr;         // [k][D] scaled, centered
  C* center_norm_ = nullptr;    // [k] squared norms
  C* best_ = nullptr;           // [n] squared distance to its center
  uint8_t* changed_ = nullptr;  // [k] members differ from the last iteration's
  int64_t group_ = 1, groups_ = 0;  // consecutive centers that share a bound; how many groups
  int32_t* group_of_ = nullptr; // [k]
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
