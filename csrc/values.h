// Looks at values in memory for the validation in Python, and makes simple starts there: an op of torch would take
// longer to start (tokenpool_ext/values.py says when that is allowed).
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

namespace tokenpool {

template <class T>
bool any_negative(uintptr_t values, int64_t count) {
  const T* v = reinterpret_cast<const T*>(values);
  bool found = false;
  for (int64_t i = 0; i < count; ++i) found |= v[i] < 0;
  return found;
}

inline std::pair<int64_t, int64_t> extremes(uintptr_t values, int64_t count) {
  const int64_t* v = reinterpret_cast<const int64_t*>(values);
  std::pair<int64_t, int64_t> found{INT64_MAX, INT64_MIN};
  for (int64_t i = 0; i < count; ++i) {
    found.first = std::min(found.first, v[i]);
    found.second = std::max(found.second, v[i]);
  }
  return found;
}

inline void fill_strided(uintptr_t indices, int64_t images, int64_t tokens, int64_t clusters) {
  int64_t* to = reinterpret_cast<int64_t*>(indices);
  for (int64_t b = 0; b < images; ++b)
    for (int64_t j = 0; j < clusters; ++j) *to++ = (2 * j + 1) * tokens / (2 * clusters);
}

// Token indices of the largest scores of each image; ties to the lowest index, NaN before all numbers, as torch sorts
// them.
inline void fill_largest(uintptr_t indices, uintptr_t scores, int64_t images, int64_t tokens, int64_t clusters) {
  int64_t* to = reinterpret_cast<int64_t*>(indices);
  const float* score = reinterpret_cast<const float*>(scores);
  std::vector<uint64_t> key(tokens);  // ascending keys are descending scores, then ascending indices
  for (int64_t b = 0; b < images; ++b, score += tokens, to += clusters) {
    for (int64_t i = 0; i < tokens; ++i) {
      const float v = score[i] + 0.0f;  // -0 becomes 0
      uint32_t bits;
      std::memcpy(&bits, &v, sizeof bits);
      const uint32_t ascending = v != v ? UINT32_MAX : bits >> 31 ? ~bits : bits | 0x80000000u;
      key[i] = uint64_t(~ascending) << 32 | uint32_t(i);
    }
    if (clusters < tokens) std::nth_element(key.begin(), key.begin() + clusters, key.end());
    std::sort(key.begin(), key.begin() + clusters);
    for (int64_t j = 0; j < clusters; ++j) to[j] = uint32_t(key[j]);
  }
}

}  // namespace tokenpool
