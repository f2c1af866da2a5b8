// Rows of any dtype to and from the accumulation type, a vector at a time.
#pragma once

#include "vec.h"

namespace tokenpool {
namespace TP_ISA {

struct BF16 {
  uint16_t bits;
};
struct FP16 {
  uint16_t bits;
};

template <class In>
struct AccOf {
  using Type = float;
};
template <>
struct AccOf<double> {
  using Type = double;
};

TP_INLINE float to_float(float v) {
  return v;
}
TP_INLINE double to_float(double v) {
  return v;
}
TP_INLINE float to_float(BF16 v) {
  uint32_t bits = uint32_t(v.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// The largest finite number of a dtype, with a sign.
inline void take_largest(bool negative, float& out) {
  out = negative ? -std::numeric_limits<float>::max() : std::numeric_limits<float>::max();
}
inline void take_largest(bool negative, double& out) {
  out = negative ? -std::numeric_limits<double>::max() : std::numeric_limits<double>::max();
}
inline void take_largest(bool negative, BF16& out) {
  out.bits = uint16_t(negative ? 0xff7f : 0x7f7f);
}
inline void take_largest(bool negative, FP16& out) {
  out.bits = uint16_t(negative ? 0xfbff : 0x7bff);
}

TP_INLINE BF16 to_bf16(float f) {  // round to nearest even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return BF16{uint16_t(f != f ? 0x7fc0 : rounded)};
}

inline float to_float(FP16 v) {
#if defined(TP_F16C)
  return _cvtsh_ss(v.bits);
#else
  uint32_t sign = uint32_t(v.bits & 0x8000) << 16, exponent = (v.bits >> 10) & 31, fraction = v.bits & 0x3ff;
  float f;
  if (exponent == 0) {
    f = float(fraction) * 5.9604644775390625e-8f;  // 2^-24
    return sign ? -f : f;
  }
  uint32_t bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13;
  std::memcpy(&f, &bits, 4);
  return f;
#endif
}

inline FP16 to_fp16(float f) {  // round to nearest even
#if defined(TP_F16C)
  return FP16{uint16_t(_cvtss_sh(f, 0))};
#else
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  uint32_t sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return FP16{uint16_t(sign | 0x7e00)};
  if (magnitude >= 0x477ff000) return FP16{uint16_t(sign | 0x7c00)};  // rounds to infinity
  if (magnitude < 0x38800000) {                                       // subnormal: let the addition round
    float a;
    std::memcpy(&a, &magnitude, 4);
    a += 0.5f;
    uint32_t r;
    std::memcpy(&r, &a, 4);
    return FP16{uint16_t(sign | (r - 0x3f000000))};
  }
  uint32_t r = magnitude - 0x38000000;
  return FP16{uint16_t(sign | ((r + 0xfff + ((r >> 13) & 1)) >> 13))};
#endif
}

// A vector of acc from consecutive inputs.
TP_INLINE Vec<float> load_acc(const float* in) {
  return load(in);
}
TP_INLINE Vec<double> load_acc(const double* in) {
  return load(in);
}
TP_INLINE Vec<float> load_acc(const BF16* in) {
#if defined(__x86_64__) && TP_VECTOR_BYTES == 32
  // Both halves hold all eight: one shuffle puts each where it belongs, above 16 bits of zero.
  const __m256i all = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in)));
  return (Vec<float>)_mm256_shuffle_epi8(
      all, _mm256_setr_epi8(-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7, -1, -1, 8, 9, -1, -1, 10, 11, -1,
                            -1, 12, 13, -1, -1, 14, 15));
#elif defined(__x86_64__) && TP_VECTOR_BYTES == 64
  // Each 16 bits to the upper half of a lane, by one instruction, with zeros between.
  const __m512i upper = _mm512_set_epi16(15, 0, 14, 0, 13, 0, 12, 0, 11, 0, 10, 0, 9, 0, 8, 0, 7, 0, 6, 0, 5, 0, 4, 0,
                                         3, 0, 2, 0, 1, 0, 0, 0);
  const __m512i all = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(in)));
  return (Vec<float>)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, upper, all);
#else
  typedef uint16_t Half __attribute__((vector_size(TP_VECTOR_BYTES / 2), aligned(2), may_alias));
  typedef uint32_t Word __attribute__((vector_size(TP_VECTOR_BYTES)));
  return (Vec<float>)(__builtin_convertvector(*reinterpret_cast<const Half*>(in), Word) << 16);
#endif
}
TP_INLINE Vec<float> load_acc(const FP16* in) {
#if defined(TP_F16C) && TP_VECTOR_BYTES == 32
  return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in)));
#elif defined(TP_F16C) && TP_VECTOR_BYTES == 64
  return (Vec<float>)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in)));
#else
  Vec<float> v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = to_float(in[i]);
  return v;
#endif
}

// out[i] = in[i] as acc.
inline void widen(const float* in, float* out, int64_t n) {
  std::copy(in, in + n, out);
}
inline void widen(const double* in, double* out, int64_t n) {
  std::copy(in, in + n, out);
}
inline void widen(const BF16* in, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = to_float(in[i]);
}
inline void widen(const FP16* in, float* out, int64_t n) {
  int64_t i = 0;
#if defined(TP_F16C)
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
#endif
  for (; i < n; ++i) out[i] = to_float(in[i]);
}

// out[i] = in[i] * factor, rounded to the output's dtype.
inline void narrow(const float* in, float factor, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = in[i] * factor;
}
inline void narrow(const double* in, double factor, double* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = in[i] * factor;
}
inline void narrow(const float* in, float factor, BF16* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = to_bf16(in[i] * factor);
}
inline void narrow(const float* in, float factor, FP16* out, int64_t n) {
  int64_t i = 0;
#if defined(TP_F16C)
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i),
                     _mm256_cvtps_ph(_mm256_mul_ps(_mm256_loadu_ps(in + i), _mm256_set1_ps(factor)), 0));
#endif
  for (; i < n; ++i) out[i] = to_fp16(in[i] * factor);
}

// A row as acc: the row itself when it already is, else converted into `scratch`.
TP_INLINE const float* as_acc(const float* row, float*, int64_t) {
  return row;
}
TP_INLINE const double* as_acc(const double* row, double*, int64_t) {
  return row;
}
template <class In>
TP_INLINE const float* as_acc(const In* row, float* scratch, int64_t n) {
  widen(row, scratch, n);
  return scratch;
}

// out is a mean of finite tokens, brought from a safe range where it was `mean`: rounding must not make it infinite.
template <class In, class C>
inline void keep_finite(const C* mean, In* out, int64_t n) {
  for (int64_t d = 0; d < n; ++d)
    if (std::isinf(to_float(out[d])) && std::isfinite(mean[d])) take_largest(mean[d] < 0, out[d]);
}

}  // namespace TP_ISA
}  // namespace tokenpool
