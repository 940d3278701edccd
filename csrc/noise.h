// Words to noise, one element at a time: the same operations, in the same order, as spec.py.
// Every function is inlined into loops that the compiler vectorises; nothing here branches on data.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __FAST_MATH__
#error "hosfl needs IEEE arithmetic: build without -ffast-math"
#endif

#ifdef __CUDACC__
#define HOSFL_INLINE static __host__ __device__ __forceinline__
#else
#define HOSFL_INLINE static inline __attribute__((always_inline))
#endif

namespace hosfl {

constexpr uint32_t TAG_RADEMACHER = 1, TAG_GAUSSIAN = 2, TAG_ROUNDING = 3;
constexpr int64_t COLS = 1024, RADEMACHER_ROWS = 128, GAUSSIAN_ROWS = 4, ROUNDING_ROWS = 8;

HOSFL_INLINE uint32_t bits_of(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}

HOSFL_INLINE float from_bits(uint32_t u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}

// uint32 -> float, rounded to nearest even. Both halves are exact, so the one sum is the one rounding; written
// this way because AVX2 and SSE2 convert signed integers only.
HOSFL_INLINE float to_float(uint32_t a) {
  return float(int32_t(a >> 16)) * 65536.0f + float(int32_t(a & 0xFFFFu));
}

// What box_muller needs of a number beside its operators: here of one, in vectors.h of many.
HOSFL_INLINE float signed_to_float(uint32_t a) { return float(int32_t(a)); }
HOSFL_INLINE uint32_t shift_signed(uint32_t a, int n) { return uint32_t(int32_t(a) >> n); }
HOSFL_INLINE float root(float x) { return sqrtf(x); }

// The sign bit of bit `row` of a word, in place: word << (31 - row % 32).
HOSFL_INLINE float signed_by(uint32_t s_bits, uint32_t word, int shift) {
  return from_bits(s_bits ^ ((word << shift) & 0x80000000u));
}

// Two words to two normal numbers; of packs, lane by lane. One chain after another: with their steps side by side nvcc
// spills registers of one kernel for sm_80, and packs have chains enough.
template <typename F, typename U>
HOSFL_INLINE void box_muller(const U a, const U b, F& z0, F& z1) {
  const F u = to_float(a) * 0x1p-32f + 0x1p-33f;
  const U bits = bits_of(u);
  const U k = shift_signed(bits - 0x3f3504f3u, 23);
  const F f = from_bits(bits - (k << 23)) - 1.0f;
  F l = f * 0x1.6626eap-4f + -0x1.26729ep-3f;
  l = l * f + 0x1.322850p-3f;
  l = l * f + -0x1.5329bep-3f;
  l = l * f + 0x1.98b80ap-3f;
  l = l * f + -0x1.0005a6p-2f;
  l = l * f + 0x1.555790p-2f;
  l = l * f + -0x1.fffff8p-2f;
  l = l * f + 0x1p+0f;
  const F r = root((f * l + signed_to_float(k) * from_bits(0x3f317218u)) * -2.0f);

  const U q = (b + 0x20000000u) >> 30;
  const F t = signed_to_float(b - (q << 30)) * 0x1p-32f;
  const F t2 = t * t;
  F s = t2 * -0x1.2d9b7cp+6f + 0x1.465ec4p+6f;
  s = s * t2 + -0x1.4abbbap+5f;
  s = s * t2 + 0x1.921fb6p+2f;
  s = t * s;
  F c = t2 * 0x1.d9c326p+5f + -0x1.55c57ap+6f;
  c = c * t2 + 0x1.03c1dcp+6f;
  c = c * t2 + -0x1.3bd3ccp+4f;
  c = c * t2 + 0x1p+0f;
  // Swap and sign by integer masks: cheaper than selects, and the same bits.
  const U swap = (bits_of(s) ^ bits_of(c)) & (U{} - (q & 1u));
  z0 = r * from_bits((bits_of(c) ^ swap) ^ (((q + 1u) & 2u) << 30));
  z1 = r * from_bits((bits_of(s) ^ swap) ^ ((q & 2u) << 30));
}

}  // namespace hosfl
