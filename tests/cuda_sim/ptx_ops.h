// PTX instructions as C++ functions, named after them (dots become underscores), for the text that ptx.py writes.
// Registers hold bits: float32 in uint32_t, float64 in uint64_t. From "PTX ISA 9.0". An instruction that is missing
// here does not compile.
//
// What this finds that the kernels' own source compiled as C++ (sim.cpp) cannot: an access that is not aligned to its
// size or past the shared memory that was asked for, a wrong inline assembly, results that rest on how nvcc contracts
// multiplications and additions or on tensor cores rounding as float64 would (they cut off low bits, here too).
#pragma once

#include <array>
#include <cmath>

#include "cuda_sim.h"

namespace ptx {

using b8 = uint8_t;
using b16 = uint16_t;
using b32 = uint32_t;
using b64 = uint64_t;
using s32 = int32_t;
using s64 = int64_t;

template <typename To, typename From>
inline To as(From bits) {
  static_assert(sizeof(To) == sizeof(From), "a change of view keeps the size");
  To v;
  std::memcpy(&v, &bits, sizeof(To));
  return v;
}
inline float f(b32 bits) {
  return as<float>(bits);
}
inline double d(b64 bits) {
  return as<double>(bits);
}
inline b32 bits(float v) {
  return as<b32>(v);
}
inline b64 bits(double v) {
  return as<b64>(v);
}

struct Kernel {
  void (*run)(const void* parameters);
  uint32_t static_shared;  // bytes, before the dynamic ones
};

// ---------------------------------------------------------------- memory
inline unsigned char* shared_at(b32 address, size_t size) {
  const cuda_sim::Machine& m = cuda_sim::machine();
  if (address % size != 0) cuda_sim::fail("a misaligned access to shared memory");
  if (address + size > m.shared_bytes) cuda_sim::fail("an access past the block's shared memory");
  return m.shared.get() + address;
}
inline unsigned char* global_at(b64 address, size_t size) {
  if (address % size != 0) cuda_sim::fail("a misaligned access to global memory");
  return reinterpret_cast<unsigned char*>(address);
}
inline const unsigned char* parameter_at(b64 address, size_t) {
  return reinterpret_cast<const unsigned char*>(address);
}
// Generic addresses: shared memory lies at the host's address of the block's buffer.
inline b64 cvta_shared_u64(b64 address) {
  return reinterpret_cast<b64>(cuda_sim::machine().shared.get()) + address;
}
inline b64 cvta_to_global_u64(b64 address) {
  return address;
}
inline b64 cvta_to_shared_u64(b64 address) {
  return address - reinterpret_cast<b64>(cuda_sim::machine().shared.get());
}

template <typename T>
inline T load(const unsigned char* from) {
  T v;
  std::memcpy(&v, from, sizeof(T));
  return v;
}
template <typename T>
inline void store(unsigned char* to, T v) {
  std::memcpy(to, &v, sizeof(T));
}

inline void cp_async_cg_shared_global(b32 shared, b64 global, int bytes) {
  if (bytes != 16) cuda_sim::fail("cp.async.cg copies 16 bytes");
  copy_async(shared_at(shared, 16), global_at(global, 16));
}
inline void cp_async_wait_all() {
  wait_for_copies();
}
inline void membar_gl() {
  __threadfence();
}

template <typename T, typename Combine>
inline T atomic(unsigned char* at, Combine combine) {
  T* word = reinterpret_cast<T*>(at);
  T old = __atomic_load_n(word, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(word, &old, combine(old), false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}
inline b32 add_to(unsigned char* at, b32 v) {
  return atomic<b32>(at, [v](b32 old) { return old + v; });
}
inline b32 atom_shared_add_u32(b32 at, b32 v) {
  return add_to(shared_at(at, 4), v);
}
inline b32 atom_global_add_u32(b64 at, b32 v) {
  return add_to(global_at(at, 4), v);
}
inline b32 atom_add_u32(b64 at, b32 v) {
  return add_to(global_at(at, 4), v);
}
inline b32 atom_shared_min_s32(b32 at, b32 v) {
  return static_cast<b32>(atomic<s32>(shared_at(at, 4), [v](s32 old) { return std::min(old, static_cast<s32>(v)); }));
}

// ---------------------------------------------------------------- moves, conversions
#define PTX_MOVES(type, width)                         \
  inline width mov_##type(width v) {                   \
    return v;                                          \
  }                                                    \
  inline width selp_##type(width a, width b, bool p) { \
    return p ? a : b;                                  \
  }
PTX_MOVES(u16, b16)
PTX_MOVES(b16, b16)
PTX_MOVES(u32, b32)
PTX_MOVES(b32, b32)
PTX_MOVES(s32, b32)
PTX_MOVES(f32, b32)
PTX_MOVES(u64, b64)
PTX_MOVES(b64, b64)
PTX_MOVES(f64, b64)
inline bool mov_pred(bool v) {
  return v;
}

inline b32 pack(b16 low, b16 high) {
  return low | static_cast<b32>(high) << 16;
}

inline b64 cvt_s64_s32(b32 v) {
  return static_cast<b64>(static_cast<s64>(static_cast<s32>(v)));
}
inline b64 cvt_u64_u32(b32 v) {
  return v;
}
inline b32 cvt_u32_u64(b64 v) {
  return static_cast<b32>(v);
}
inline b32 cvt_u32_u16(b16 v) {
  return v;
}
inline b32 cvt_s32_u16(b16 v) {
  return v;
}
inline b16 cvt_u16_u32(b32 v) {
  return static_cast<b16>(v);
}
inline b32 cvt_rn_f32_s32(b32 v) {
  return bits(static_cast<float>(static_cast<s32>(v)));
}
inline b32 cvt_rn_f32_f64(b64 v) {
  return bits(static_cast<float>(d(v)));
}
inline b64 cvt_f64_f32(b32 v) {
  return bits(static_cast<double>(f(v)));
}
inline b32 cvt_f32_f16(b16 v) {
  return bits(__half2float(__half{v}));
}
inline b32 cvt_f32_bf16(b16 v) {
  return bits(__bfloat162float(__nv_bfloat16{v}));
}
inline b16 cvt_rn_f16_f32(b32 v) {
  return __float2half_rn(f(v)).bits;
}
inline b16 cvt_rn_bf16_f32(b32 v) {
  return __float2bfloat16_rn(f(v)).bits;
}
inline b32 cvt_sat_f32_f32(b32 v) {
  return f(v) > 0.0f ? bits(std::fmin(f(v), 1.0f)) : 0;
}  // NaN: 0

// ---------------------------------------------------------------- integers
#define PTX_INTEGERS(u, s, width, number)                                                          \
  inline width add_##s(width a, width b) {                                                         \
    return a + b;                                                                                  \
  }                                                                                                \
  inline width sub_##s(width a, width b) {                                                         \
    return a - b;                                                                                  \
  }                                                                                                \
  inline width mul_lo_##s(width a, width b) {                                                      \
    return a * b;                                                                                  \
  }                                                                                                \
  inline width mad_lo_##s(width a, width b, width c) {                                             \
    return a * b + c;                                                                              \
  }                                                                                                \
  inline width min_##s(width a, width b) {                                                         \
    return static_cast<number>(a) < static_cast<number>(b) ? a : b;                                \
  }                                                                                                \
  inline width max_##s(width a, width b) {                                                         \
    return static_cast<number>(a) < static_cast<number>(b) ? b : a;                                \
  }                                                                                                \
  inline width min_##u(width a, width b) {                                                         \
    return std::min(a, b);                                                                         \
  }                                                                                                \
  inline width max_##u(width a, width b) {                                                         \
    return std::max(a, b);                                                                         \
  }                                                                                                \
  inline width div_##u(width a, width b) {                                                         \
    return b == 0 ? ~width{0} : a / b;                                                             \
  }                                                                                                \
  inline width rem_##u(width a, width b) {                                                         \
    return b == 0 ? a : a % b;                                                                     \
  }                                                                                                \
  inline width div_##s(width a, width b) {                                                         \
    return static_cast<width>(static_cast<number>(a) / static_cast<number>(b));                    \
  }                                                                                                \
  inline width rem_##s(width a, width b) {                                                         \
    return static_cast<width>(static_cast<number>(a) % static_cast<number>(b));                    \
  }                                                                                                \
  inline width neg_##s(width a) {                                                                  \
    return width{0} - a;                                                                           \
  }                                                                                                \
  inline width shr_##u(width a, b32 by) {                                                          \
    return by >= 8 * sizeof(width) ? 0 : a >> by;                                                  \
  }                                                                                                \
  inline width shr_##s(width a, b32 by) {                                                          \
    return static_cast<width>(static_cast<number>(a) >> std::min<b32>(by, 8 * sizeof(width) - 1)); \
  }                                                                                                \
  inline bool setp_lt_##s(width a, width b) {                                                      \
    return static_cast<number>(a) < static_cast<number>(b);                                        \
  }                                                                                                \
  inline bool setp_le_##s(width a, width b) {                                                      \
    return static_cast<number>(a) <= static_cast<number>(b);                                       \
  }                                                                                                \
  inline bool setp_gt_##s(width a, width b) {                                                      \
    return static_cast<number>(a) > static_cast<number>(b);                                        \
  }                                                                                                \
  inline bool setp_ge_##s(width a, width b) {                                                      \
    return static_cast<number>(a) >= static_cast<number>(b);                                       \
  }                                                                                                \
  inline bool setp_eq_##s(width a, width b) {                                                      \
    return a == b;                                                                                 \
  }                                                                                                \
  inline bool setp_ne_##s(width a, width b) {                                                      \
    return a != b;                                                                                 \
  }                                                                                                \
  inline bool setp_lt_##u(width a, width b) {                                                      \
    return a < b;                                                                                  \
  }                                                                                                \
  inline bool setp_le_##u(width a, width b) {                                                      \
    return a <= b;                                                                                 \
  }                                                                                                \
  inline bool setp_gt_##u(width a, width b) {                                                      \
    return a > b;                                                                                  \
  }                                                                                                \
  inline bool setp_ge_##u(width a, width b) {                                                      \
    return a >= b;                                                                                 \
  }                                                                                                \
  inline bool setp_eq_##u(width a, width b) {                                                      \
    return a == b;                                                                                 \
  }                                                                                                \
  inline bool setp_ne_##u(width a, width b) {                                                      \
    return a != b;                                                                                 \
  }
PTX_INTEGERS(u16, s16, b16, int16_t)
PTX_INTEGERS(u32, s32, b32, s32)
PTX_INTEGERS(u64, s64, b64, s64)

#define PTX_BITS(type, width)                                         \
  inline width and_##type(width a, width b) {                         \
    return a & b;                                                     \
  }                                                                   \
  inline width or_##type(width a, width b) {                          \
    return a | b;                                                     \
  }                                                                   \
  inline width xor_##type(width a, width b) {                         \
    return a ^ b;                                                     \
  }                                                                   \
  inline width not_##type(width a) {                                  \
    return static_cast<width>(~a);                                    \
  }                                                                   \
  inline width shl_##type(width a, b32 by) {                          \
    return by >= 8 * sizeof(width) ? 0 : static_cast<width>(a << by); \
  }                                                                   \
  inline bool setp_eq_##type(width a, width b) {                      \
    return a == b;                                                    \
  }                                                                   \
  inline bool setp_ne_##type(width a, width b) {                      \
    return a != b;                                                    \
  }
PTX_BITS(b16, b16)
PTX_BITS(b32, b32)
PTX_BITS(b64, b64)
inline bool and_pred(bool a, bool b) {
  return a && b;
}
inline bool or_pred(bool a, bool b) {
  return a || b;
}
inline bool xor_pred(bool a, bool b) {
  return a != b;
}
inline bool not_pred(bool a) {
  return !a;
}
inline b64 mul_wide_s32(b32 a, b32 b) {
  return static_cast<b64>(static_cast<s64>(static_cast<s32>(a)) * static_cast<s32>(b));
}
inline b64 mul_wide_u32(b32 a, b32 b) {
  return static_cast<b64>(a) * b;
}
inline b32 bfi_b32(b32 a, b32 b, b32 at, b32 length) {
  const b32 mask = at > 31 ? 0 : ((length > 31 ? 0 : 1u << length) - 1u) << at;
  return (b & ~mask) | ((at > 31 ? 0 : a << at) & mask);
}
inline b32 popc_b32(b32 a) {
  return static_cast<b32>(__builtin_popcount(a));
}

// ---------------------------------------------------------------- floating point
inline b32 add_f32(b32 a, b32 b) {
  return bits(f(a) + f(b));
}
inline b32 sub_f32(b32 a, b32 b) {
  return bits(f(a) - f(b));
}
inline b32 mul_f32(b32 a, b32 b) {
  return bits(f(a) * f(b));
}
inline b64 add_f64(b64 a, b64 b) {
  return bits(d(a) + d(b));
}
inline b64 mul_f64(b64 a, b64 b) {
  return bits(d(a) * d(b));
}
inline b32 fma_rn_f32(b32 a, b32 b, b32 c) {
  return bits(std::fma(f(a), f(b), f(c)));
}
inline b64 fma_rn_f64(b64 a, b64 b, b64 c) {
  return bits(std::fma(d(a), d(b), d(c)));
}
__attribute__((noinline)) inline b32 fma_rm_f32(b32 a, b32 b, b32 c) {
  // The exact sum in steps of float32, downwards: float64 holds the product exactly, and the remainder of the sum
  // decides.
  const double product = static_cast<double>(f(a)) * f(b), sum = product + f(c);
  const double part = sum - product, lost = (product - (sum - part)) + (static_cast<double>(f(c)) - part);
  float low = static_cast<float>(sum);
  if (static_cast<double>(low) > sum || (static_cast<double>(low) == sum && lost < 0))
    low = std::nextafterf(low, -INFINITY);
  return bits(low);
}
inline b32 div_rn_f32(b32 a, b32 b) {
  return bits(f(a) / f(b));
}
inline b32 rcp_rn_f32(b32 a) {
  return bits(1.0f / f(a));
}
inline b32 sqrt_rn_f32(b32 a) {
  return bits(std::sqrt(f(a)));
}
inline b32 neg_f32(b32 a) {
  return a ^ 0x80000000u;
}
inline b32 abs_f32(b32 a) {
  return a & 0x7fffffffu;
}
// NaN loses against a number; -0 is less than +0.
inline b32 max_f32(b32 a, b32 b) {
  if (std::isnan(f(a))) return std::isnan(f(b)) ? 0x7fffffffu : b;
  if (std::isnan(f(b))) return a;
  return f(a) == f(b) ? a & b : f(a) < f(b) ? b : a;
}
inline b32 min_f32(b32 a, b32 b) {
  if (std::isnan(f(a))) return std::isnan(f(b)) ? 0x7fffffffu : b;
  if (std::isnan(f(b))) return a;
  return f(a) == f(b) ? a | b : f(a) < f(b) ? a : b;
}
inline b32 ex2_approx_ftz_f32(b32 a) {
  const float v = std::exp2(f(a));
  return bits(std::fabs(v) < 1.17549435e-38f ? std::copysign(0.0f, v) : v);
}
#define PTX_COMPARISONS(type, width, view)           \
  inline bool setp_eq_##type(width a, width b) {     \
    return view(a) == view(b);                       \
  }                                                  \
  inline bool setp_lt_##type(width a, width b) {     \
    return view(a) < view(b);                        \
  }                                                  \
  inline bool setp_le_##type(width a, width b) {     \
    return view(a) <= view(b);                       \
  }                                                  \
  inline bool setp_gt_##type(width a, width b) {     \
    return view(a) > view(b);                        \
  }                                                  \
  inline bool setp_ge_##type(width a, width b) {     \
    return view(a) >= view(b);                       \
  }                                                  \
  inline bool setp_ne_##type(width a, width b) {     \
    return view(a) < view(b) || view(a) > view(b);   \
  }                                                  \
  inline bool setp_neu_##type(width a, width b) {    \
    return !(view(a) == view(b));                    \
  }                                                  \
  inline bool setp_ltu_##type(width a, width b) {    \
    return !(view(a) >= view(b));                    \
  }                                                  \
  inline bool setp_leu_##type(width a, width b) {    \
    return !(view(a) > view(b));                     \
  }                                                  \
  inline bool setp_gtu_##type(width a, width b) {    \
    return !(view(a) <= view(b));                    \
  }                                                  \
  inline bool setp_geu_##type(width a, width b) {    \
    return !(view(a) < view(b));                     \
  }                                                  \
  inline bool setp_num_##type(width a, width b) {    \
    return view(a) == view(a) && view(b) == view(b); \
  }                                                  \
  inline bool setp_nan_##type(width a, width b) {    \
    return !setp_num_##type(a, b);                   \
  }
PTX_COMPARISONS(f32, b32, f)
PTX_COMPARISONS(f64, b64, d)

// ---------------------------------------------------------------- block and warp
inline void bar_sync(int barrier) {
  if (barrier != 0) cuda_sim::fail("only barrier 0 is simulated");
  __syncthreads();
}
inline bool bar_red_or_pred(int barrier, bool p) {
  if (barrier != 0) cuda_sim::fail("only barrier 0 is simulated");
  return __syncthreads_or(p) != 0;
}
inline void bar_warp_sync(b32 mask) {
  __syncwarp(mask);
}

enum class Shuffle { kUp, kBfly, kIdx };
inline b32 shuffle(Shuffle mode, bool* taken, b32 a, b32 b, b32 c, b32 mask) {
  const int lane = cuda_sim::my_lane(), by = static_cast<int>(b & 31), clamp = static_cast<int>(c & 31);
  const int segments = static_cast<int>(c >> 8 & 31), last = (lane & segments) | (clamp & ~segments),
            first = lane & segments;
  int from = mode == Shuffle::kUp ? lane - by : mode == Shuffle::kBfly ? lane ^ by : (first | (by & ~segments));
  *taken = mode == Shuffle::kUp ? from >= last : from <= last;
  if (!*taken) from = lane;
  return cuda_sim::exchange(mask, a, [from](const uint64_t* all) { return static_cast<b32>(all[from]); });
}
inline b32 shfl_sync_up_b32(bool* p, b32 a, b32 b, b32 c, b32 mask) {
  return shuffle(Shuffle::kUp, p, a, b, c, mask);
}
inline b32 shfl_sync_bfly_b32(bool* p, b32 a, b32 b, b32 c, b32 mask) {
  return shuffle(Shuffle::kBfly, p, a, b, c, mask);
}
inline b32 shfl_sync_idx_b32(bool* p, b32 a, b32 b, b32 c, b32 mask) {
  return shuffle(Shuffle::kIdx, p, a, b, c, mask);
}
inline b32 match_any_sync_b32(b32 a, b32 mask) {
  return __match_any_sync(mask, a);
}
inline b32 redux_sync_max_s32(b32 a, b32 mask) {
  return static_cast<b32>(__reduce_max_sync(mask, static_cast<s32>(a)));
}
inline b32 redux_sync_min_s32(b32 a, b32 mask) {
  return static_cast<b32>(__reduce_min_sync(mask, static_cast<s32>(a)));
}

// One number of the 16 x 8 result of a tensor core: the addends are cut off two bits below float32's last one of the
// largest, and their sum is cut off at float32's. Hardware was seen to do so, with 0 to 2 bits more kept (Fasi et al.,
// "Numerical behavior of NVIDIA tensor cores", 2021); the manual leaves it open.
inline float tensor_sum(float c, const float* a, const float* b, int count) {
  double addends[17];
  int largest = -1000;
  addends[0] = c;
  for (int i = 0; i < count; ++i) addends[i + 1] = static_cast<double>(a[i]) * b[i];
  for (int i = 0; i <= count; ++i) {
    if (!std::isfinite(addends[i])) {  // infinity and NaN as in any sum
      double sum = 0;
      for (int j = 0; j <= count; ++j) sum += addends[j];
      return static_cast<float>(sum);
    }
    if (addends[i] != 0) largest = std::max(largest, std::ilogb(addends[i]));
  }
  if (largest == -1000) return c + 0.0f;
  const int unit = std::max(largest - 25, -149);
  double sum = 0;  // of whole numbers below 2^31: exact
  for (int i = 0; i <= count; ++i) sum += std::trunc(std::ldexp(addends[i], -unit));
  sum = std::ldexp(sum, unit);
  float cut = static_cast<float>(sum);
  if (std::fabs(static_cast<double>(cut)) > std::fabs(sum)) cut = std::nextafterf(cut, 0.0f);
  return cut;
}

using Four = std::array<b32, 4>;
using Two = std::array<b32, 2>;

// mma.m16n8k16, its fragments as the manual gives them ("Matrix fragments for mma.m16n8k16 with floating point type").
template <typename T>
inline Four mma(const Four& a, const Two& b, const Four& c, T type) {
  Four out;
  cuda_sim::WarpState& warp = cuda_sim::my_warp();
  const int lane = cuda_sim::my_lane(), group = lane >> 2, in_group = lane % 4;
  for (int i = 0; i < 4; ++i) warp.a[lane][i] = a[i];
  for (int i = 0; i < 2; ++i) warp.b[lane][i] = b[i];
  cuda_sim::warp_barrier(0xffffffffu);
  for (int i = 0; i < 4; ++i) {
    const int row = i < 2 ? group : group + 8, column = in_group * 2 + (i & 1);
    float left[16], right[16];
    for (int l = 0; l < 32; ++l) {
      for (int j = 0; j < 8; ++j) {
        const int a_row = (j < 2 || (4 <= j && j < 6)) ? l >> 2 : (l >> 2) + 8,
                  a_column = l % 4 * 2 + (j & 1) + (j >= 4 ? 8 : 0);
        if (a_row == row) left[a_column] = cuda_sim::widen(static_cast<b16>(warp.a[l][j / 2] >> 16 * (j & 1)), type);
      }
      for (int j = 0; j < 4; ++j) {
        const int b_row = l % 4 * 2 + (j & 1) + (j >= 2 ? 8 : 0), b_column = l >> 2;
        if (b_column == column)
          right[b_row] = cuda_sim::widen(static_cast<b16>(warp.b[l][j / 2] >> 16 * (j & 1)), type);
      }
    }
    out[i] = bits(tensor_sum(f(c[i]), left, right, 16));
  }
  cuda_sim::warp_barrier(0xffffffffu);
  return out;
}
inline Four mma_sync_aligned_m16n8k16_row_col_f32_f16_f16_f32(const Four& a, const Two& b, const Four& c) {
  return mma(a, b, c, __half{});
}
inline Four mma_sync_aligned_m16n8k16_row_col_f32_bf16_bf16_f32(const Four& a, const Two& b, const Four& c) {
  return mma(a, b, c, __nv_bfloat16{});
}

inline Four ldmatrix_sync_aligned_m8n8_x4_shared_b16(b32 address) {
  uint32_t out[4];
  load_matrices(out, shared_at(address, 16));
  return Four{out[0], out[1], out[2], out[3]};
}

}  // namespace ptx
