// Member lists of clusters, shares of means, and the repair of empty clusters.
#pragma once

#include "vec.h"

namespace tokenpool {
namespace TP_ISA {

// Memory handed out in pieces and taken back all at once. Every thread has one and keeps its blocks from image to
// image, and, if they come to kKept bytes or less, from call to call.
class Arena {
 public:
  static Arena& of_this_thread() {
    static thread_local Arena arena;
    return arena;
  }
  void trim() {
    constexpr int64_t kKept = 8 << 20;
    int64_t bytes = 0;
    for (const int64_t size : sizes_) bytes += size;
    if (bytes <= kKept) return;
    blocks_.clear();
    sizes_.clear();
    reset();
  }
  void reset() {
    block_ = 0;
    used_ = 0;
  }
  template <class T>
  T* take(int64_t count) {
    const int64_t bytes = round_up(std::max<int64_t>(count, 1) * int64_t(sizeof(T)), 64);
    while (block_ < int64_t(blocks_.size()) && used_ + bytes > sizes_[size_t(block_)]) {
      if (used_ == 0) {  // too small even when empty: give way to a larger one
        blocks_.erase(blocks_.begin() + block_);
        sizes_.erase(sizes_.begin() + block_);
        continue;
      }
      ++block_;
      used_ = 0;
    }
    if (block_ == int64_t(blocks_.size())) {
      const int64_t size = std::max<int64_t>(bytes, 1 << 18);
      blocks_.emplace_back(new Buffer<char>(size));
      sizes_.push_back(size);
      prefer_large_pages(*blocks_.back(), size);
      used_ = 0;
    }
    T* p = reinterpret_cast<T*>(static_cast<char*>(*blocks_[size_t(block_)]) + used_);
    used_ += bytes;
    return p;
  }

 private:
  std::vector<std::unique_ptr<Buffer<char>>> blocks_;
  std::vector<int64_t> sizes_;
  int64_t block_ = 0, used_ = 0;
};

// The largest power of two not above `largest`, as a factor that brings it into [1, 2). 1 inside the range where no
// square can overflow or vanish (the factor is exact, so it changes no bit of a result there), and 1 for zero or
// non-finite.
template <class C>
inline C safe_scale(C largest, int ordinary = std::is_same<C, float>::value ? 40 : 300) {
  const int limit = std::is_same<C, float>::value ? 126 : 1022;
  if (!(largest > 0) || largest > std::numeric_limits<C>::max()) return C(1);
  int exponent;
  std::frexp(largest, &exponent);
  if (exponent > -ordinary && exponent < ordinary) return C(1);
  return std::ldexp(C(1), std::min(std::max(1 - exponent, -limit), limit));
}

// Members of every cluster in the order in which `order` lists the tokens (null: ascending): member[start[j]] ..
// member[start[j + 1]]. Labels outside 0..k-1 are left out.
template <class Label>
inline void group(const Label* label, int64_t n, int64_t k, int32_t* start, int32_t* member,
                  const int32_t* order = nullptr) {
  std::memset(start, 0, size_t(k + 1) * sizeof(int32_t));
  for (int64_t i = 0; i < n; ++i)
    if (label[i] >= 0 && label[i] < k) ++start[label[i] + 1];
  for (int64_t j = 0; j < k; ++j) start[j + 1] += start[j];
  for (int64_t m = 0; m < n; ++m) {
    const int64_t i = order ? order[m] : m;
    if (label[i] >= 0 && label[i] < k) member[start[label[i]]++] = int32_t(i);
  }
  for (int64_t j = k; j > 0; --j) start[j] = start[j - 1];
  start[0] = 0;
}

// Each member's share of its cluster's mean: w/W, or 1/count where W = 0. Returns W (saturated). Weights are brought to
// a safe range by an exact power of two, so that neither huge nor tiny ones are lost.
template <class C>
inline C shares(const int32_t* member, int64_t count, const C* weight, C* share) {
  if (!weight) {
    for (int64_t m = 0; m < count; ++m) share[m] = C(1) / C(count);
    return C(count);
  }
  C heaviest = 0;
  for (int64_t m = 0; m < count; ++m) heaviest = std::max(heaviest, weight[member[m]]);
  const C scale = safe_scale(heaviest);
  double sum = 0;
  for (int64_t m = 0; m < count; ++m) sum += double(weight[member[m]] * scale);
  const C total = C(sum);
  for (int64_t m = 0; m < count; ++m) share[m] = total > 0 ? weight[member[m]] * scale / total : C(1) / C(count);
  return std::min(total / scale, std::numeric_limits<C>::max());
}

// Fill every empty cluster below k, in ascending order, with the token of the largest cost whose cluster has at least
// two members (tie: the first in `order`; null: ascending), whose distance then is 0. Needs n >= k. Was there any?
template <class C, class Label>
inline bool repair_empty(int64_t n, int64_t k, const C* weight, C* distance, const int32_t* order, Label* label,
                         int32_t* count) {
  bool repaired = false;
  std::memset(count, 0, size_t(k) * sizeof(int32_t));
  for (int64_t i = 0; i < n; ++i) ++count[label[i]];
  for (int64_t j = 0; j < k; ++j) {
    if (count[j]) continue;
    int64_t donor = -1;
    C most = -1;
    for (int64_t m = 0; m < n; ++m) {
      const int64_t i = order ? order[m] : m;
      if (count[label[i]] < 2) continue;
      C cost = (weight ? weight[i] : C(1)) * distance[i];
      if (!(cost == cost)) cost = 0;
      if (donor < 0 || cost > most) {
        most = cost;
        donor = i;
      }
    }
    --count[label[donor]];
    label[donor] = Label(j);
    distance[donor] *= 0;  // NaN stays NaN
    count[j] = 1;
    repaired = true;
  }
  return repaired;
}

}  // namespace TP_ISA
}  // namespace tokenpool
