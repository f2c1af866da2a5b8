// Panels of tokens times centers (direct path): the nearest centers, and bounds as tight as products make them.
//
//   score_ij = ||c_j||^2 - 2 <y_i, c_j>,   label_i = argmin_j score_ij,   bound_ig = min over j in g of score_ij, less
//   the room that rounding needs                  T: C for packed panels, int32_t for panels of rounded tokens
//
// Writes bounds, label and best of the panels asked for; where they are rounded, best is an upper bound, and the
// rounded panels, centers and norms are made here.
#pragma once

#include "bounds.h"
#include "nearest.h"
#include "rounding.h"

namespace tokenpool {
namespace TP_ISA {

constexpr int64_t kTogether = 8;        // panels that centers are fetched for
constexpr int64_t kCentersAtOnce = 64;  // centers whose products wait

// What a thread needs while it looks at panels.
template <class In>
struct Scratch {
  using C = typename AccOf<In>::Type;
  static constexpr int P = kPanel<C>;
  Scratch(int64_t features, int64_t k, int64_t together, const Bounds<In>& bounds, const Rounded<In>& rounding)
      : products(kCentersAtOnce * P),
        packed(together * P * features),
        rounded(rounding.on ? together * P * rounding.lanes : 0),
        second(bounds.group_size > 1 ? together * bounds.groups * P : 0),
        group(bounds.groups),
        of_token(P * bounds.groups),
        center(bounds.group_size > 1 ? k : 0),
        open(rounding.on ? k : 0),
        tokens(bounds.groups),
        distance(k) {
    std::memset(products, 0,
                kCentersAtOnce * P * sizeof(C));  // lanes past the last token are looked at, too, whatever they hold
  }
  int64_t ask_all(int64_t groups) {
    for (int64_t g = 0; g < groups; ++g) group[g] = int32_t(g);
    return groups;
  }
  Buffer<C> products, packed;
  Buffer<int32_t> rounded;           // panels of 16-bit pairs
  Buffer<C> second;                  // [group][panel][P]: the second lowest score of a group
  Buffer<int32_t> group;             // groups to look at
  Buffer<int32_t> of_token, center;  // the groups to look at for each token; one token's candidates
  Buffer<int32_t> open;              // which of those rounding leaves open
  Buffer<uint64_t> tokens;           // for which tokens a group is looked at, one bit each
  Buffer<C> distance;                // how far a token's candidates are, squared
};

template <class In>
class Products {
  using C = typename AccOf<In>::Type;
  using I = typename Lane<C>::Int;
  static constexpr int L = kLanes<C>, P = kPanel<C>;

 public:
  Products(Tokens<In>& tokens, Centers<C>& centers, Assignment<In>& assigned, Bounds<In>& bounds, Rounded<In>& rounded)
      : a(tokens.a), tokens_(tokens), centers_(centers), assigned_(assigned), bounds_(bounds), rounded_(rounded) {
    together_ =
        std::min(kTogether, std::max<int64_t>(1, ((kRounds<C> ? 2 : 1) << 15) / std::max<int64_t>(P * a.features, 1)));
  }

  int64_t together() const { return together_; }

  Scratch<In> scratch() const { return Scratch<In>(a.features, centers_.k, together_, bounds_, rounded_); }

  // Packed panels p.. against all centers: the nearest ones, and bounds for the others.
  template <class T>
  void nearest_of_all(int64_t p, int64_t panels, Scratch<In>& s, Ahead* ahead) {
    const Vec<C> infinity = splat(std::numeric_limits<C>::infinity());
    Nearest<C> nearest[kTogether];
    each_center<T>(p, panels, bounds_.groups, s, ahead,
                   [&](int64_t q, int64_t block, const int32_t* center, const int32_t* place, const T* products) {
                     if (bounds_.group_size == 1) return compare<T>(p + q, center[0], block, products, nearest[q]);
                     const Rounding<C> rounding = rounded_.of(p + q);
                     Nearest<C> found = nearest[q];
                     for (int64_t c = 0; c < block; ++c, products += P) {
                       const Reading<In, T> reading(rounded_, rounding, centers_, bounds_.slack, center[c]);
                       const bool fresh = center[c] % bounds_.group_size == 0;
                       C* lowest = bounds_.at(p + q, place[c]);
                       C* second = s.second + (place[c] * together_ + q) * P;
#pragma GCC unroll 4
                       for (int v = 0; v < TP_VECTORS; ++v) {
                         const Vec<C> score = reading.score(products + v * L), low = reading.least(score);
                         found.take(v, center[c], score);
                         const Vec<C> m1 = fresh ? infinity : load(lowest + v * L),
                                      m2 = fresh ? infinity : load(second + v * L);
                         const auto lower = low < m1;
                         const Vec<C> higher = lower ? m1 : low;
                         store(lowest + v * L, lower ? low : m1);
                         store(second + v * L, higher < m2 ? higher : m2);
                       }
                     }
                     nearest[q] = found;
                   });
    for (int64_t q = 0; q < panels; ++q) take_nearest<T>(p + q, nearest[q], s.second + q * P);
  }

  // Panels of starting tokens against all centers, most of which are these tokens. One panel after another is
  // multiplied with the centers up to its own last, and with those that fill no panel; what lies before it, transposed,
  // are the products of earlier panels with its tokens as centers.
  void nearest_of_starts(int64_t starts, Scratch<In>& s, Ahead* ahead) {
    constexpr int64_t kBlock = 2 * P;  // centers
    const int64_t whole = starts * P;
    Nearest<C>* const nearest = tokens_.arena.template take<Nearest<C>>(starts);
    for (int64_t p = 0; p < starts; ++p) nearest[p] = Nearest<C>();
    Buffer<int32_t> products(kBlock * P), turned(P * P);
    int32_t which[kBlock];
    int32_t* out[kBlock];
    for (int64_t c = 0; c < kBlock; ++c) out[c] = products + c * P;
    for (int64_t p = 0; p < starts; ++p) {
      const int64_t first = p * P, after = first + P;
      rounded_.panels[p] = rounded_.round_tokens(p, s.rounded);
      for (int64_t d = 0; d < rounded_.lanes; d += L)
        for (int64_t r = 0; r < P; r += L)
          transpose_square(s.rounded + d * P + r, P, rounded_.centers + (first + r) * rounded_.lanes + d,
                           rounded_.lanes);
      for (int64_t j = first; j < after; ++j) {
        rounded_.units[j] = rounded_.panels[p];
        rounded_.norms[j] = tokens_.norm[j] / rounded_.panels[p].keep;
      }
      for (int64_t j = 0; j < centers_.k; j = j == after ? whole : j) {
        const int64_t count = std::min(kBlock, (j < after ? after : centers_.k) - j);
        for (int64_t c = 0; c < count; ++c) which[c] = int32_t(j + c);
        multiply_panel<int32_t>(rounded_.centers, rounded_.lanes, which, count, TP_VECTORS, s.rounded, out, ahead);
        compare<int32_t>(p, j, count, products, nearest[p]);
        for (int64_t q = j / P; q < p && q * P < j + count; ++q) {
          for (int64_t c = 0; c < P; c += L)
            for (int64_t r = 0; r < P; r += L)
              transpose_square(products + (q * P - j + c) * P + r, P, turned + r * P + c, P);
          compare<int32_t>(q, first, P, turned, nearest[q]);
        }
        j += count;
      }
    }
    for (int64_t p = 0; p < starts; ++p) take_nearest<int32_t>(p, nearest[p], nullptr);
  }

  // Packed (or rounded) panel p against the groups s.group[0..count): bounds as tight as rounding allows.
  template <class T>
  void tighten(int64_t p, int64_t count, const I* own, Scratch<In>& s) {
    const Vec<C> infinity = splat(std::numeric_limits<C>::infinity());
    each_center<T>(p, 1, count, s, nullptr,
                   [&](int64_t, int64_t block, const int32_t* center, const int32_t* place, const T* products) {
                     const Rounding<C> rounding = rounded_.of(p);
                     for (int64_t c = 0; c < block; ++c, products += P) {
                       const Reading<In, T> reading(rounded_, rounding, centers_, bounds_.slack, center[c]);
                       const Vec<I> index = splat(I(center[c]));
                       const bool fresh = center[c] % bounds_.group_size == 0;
                       C* lowest = bounds_.at(p, s.group[place[c]]);
#pragma GCC unroll 4
                       for (int v = 0; v < TP_VECTORS; ++v) {
                         const Vec<C> low = reading.least(reading.score(products + v * L));
                         const Vec<C> other = index == load(own + p * P + v * L) ? infinity : low;
                         const Vec<C> least = fresh ? infinity : load(lowest + v * L);
                         store(lowest + v * L, least < other ? least : other);
                       }
                     }
                   });
    C norm[P];  // tokens_.norm may be that of rounded tokens
    if constexpr (Reading<In, T>::rounded)
      std::memcpy(norm, tokens_.norm + p * P, sizeof norm);
    else
      panel_norms<C>(s.packed, a.features, norm);
    for (int64_t f = 0; f < count; ++f) {
      C* at = bounds_.at(p, s.group[f]);
      const Vec<C> travelled = splat(bounds_.travelled[s.group[f]]);
      for (int v = 0; v < P; v += L) {
        const Vec<C> squared = load(norm + v) * (C(1) - bounds_.slack) + load(at + v);
        const Vec<C> far = root<C>(squared < C(0) ? Vec<C>{} : squared) + travelled;
        store(at + v, far * far - load(tokens_.norm + p * P + v));
      }
    }
  }

 private:
  // The products of the packed panels p .. p + panels - 1 with the centers of the groups s.group[0..count), in
  // ascending order: use(panel, how many centers, which, places of their groups, products). T: C, or int32_t for
  // rounded ones.
  template <class T, class F>
  TP_INLINE void each_center(int64_t p, int64_t panels, int64_t count, Scratch<In>& s, Ahead* ahead, const F& use) {
    int32_t center[kCentersAtOnce], place[kCentersAtOnce];
    T* out[kCentersAtOnce];  // one after another
    for (int64_t j = 0; j < kCentersAtOnce; ++j) out[j] = reinterpret_cast<T*>(static_cast<C*>(s.products)) + j * P;
    for (int64_t f = 0, inside = 0; f < count;) {
      int64_t block = 0;
      for (; block < kCentersAtOnce && f < count; ++block) {
        center[block] = int32_t(s.group[f] * bounds_.group_size + inside);
        place[block] = int32_t(f);
        if (++inside == bounds_.group_size || center[block] + 1 == centers_.k) {
          inside = 0;
          ++f;
        }
      }
      for (int64_t q = 0; q < panels; ++q) {
        const int64_t vectors =
            (std::min<int64_t>(P, tokens_.n - (p + q) * P) + L - 1) / L;  // none past the last token
        if constexpr (std::is_same<T, C>::value)
          multiply_panel<T>(centers_.row, a.features, center, block, vectors, s.packed + q * P * a.features, out,
                            ahead);
        else
          multiply_panel<T>(rounded_.centers, rounded_.lanes, center, block, vectors,
                            s.rounded + q * P * rounded_.lanes, out, ahead);
        use(q, block, center, place, out[0]);
      }
    }
  }

  // Panel p against centers first .. first + count - 1, each of which has a bound of its own.
  template <class T>
  TP_INLINE void compare(int64_t p, int64_t first, int64_t count, const T* products, Nearest<C>& nearest) {
    const Rounding<C> rounding = rounded_.of(p);
    Nearest<C> found = nearest;
    C* lowest = bounds_.at(p, first);
    for (int64_t j = first; j < first + count; ++j, products += P, lowest += P) {
      const Reading<In, T> reading(rounded_, rounding, centers_, bounds_.slack, j);
#pragma GCC unroll 4
      for (int v = 0; v < TP_VECTORS; ++v) {
        const Vec<C> score = reading.score(products + v * L);
        found.take(v, j, score);
        store(lowest + v * L, reading.least(score));
      }
    }
    nearest = found;
  }

  // A panel has been compared with all centers. second: [group][together_][P], the second lowest of each group.
  template <class T>
  void take_nearest(int64_t p, const Nearest<C>& nearest, const C* second) {
    nearest.write(assigned_.best + p * P, assigned_.label + p * P);
    for (int r = 0; r < P && p * P + r < tokens_.n; ++r) {
      const int64_t i = p * P + r, j = assigned_.label[i], g = bounds_.group_of[j];
      C& lowest = bounds_.at(p, g)[r];  // of all but its own center: that is not always the one of the lowest bound
      if (bounds_.group_size == 1)
        lowest = std::numeric_limits<C>::infinity();
      else if (!(lowest <
                 Reading<In, T>(rounded_, rounded_.of(p), centers_, bounds_.slack, j).least(assigned_.best[i])))
        lowest = second[g * together_ * P + r];
      bounds_.held[i] = assigned_.label[i];
      if constexpr (Reading<In, T>::rounded) {
        const Rounding<C>& mine = rounded_.panels[p];
        const C norm = tokens_.norm[i] / mine.keep,
                squared = norm + assigned_.best[i] + kExact<C> * (norm + rounded_.norms[j]);
        const C far = std::sqrt(std::max(squared, C(0))) + mine.error + rounded_.units[j].error;
        assigned_.best[i] = far * far;
      } else {
        const C distance = assigned_.best[i] + tokens_.norm[i];
        assigned_.best[i] = distance < 0 ? C(0) : distance;
      }
    }
  }

  const ClusterArgs& a;
  Tokens<In>& tokens_;
  Centers<C>& centers_;
  Assignment<In>& assigned_;
  Bounds<In>& bounds_;
  Rounded<In>& rounded_;
  int64_t together_ = 1;  // panels multiplied at a time
};

}  // namespace TP_ISA
}  // namespace tokenpool
