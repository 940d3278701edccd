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

// Two words to two normal numbers; of packs, lane by lane. The same bits as spec.py's box_muller in fewer operations:
// scaling by a power of two changes no rounding, so `u` is 2^32 times spec.py's and `l` is -2 times its polynomial, and
// masks take the place of shifts there and back. The polynomials alternate because neither waits for the other.
template <typename F, typename U>
HOSFL_INLINE void box_muller(const U a, const U b, F& z0, F& z1) {
  const F u = to_float(a) + 0.5f;
  const U bits = bits_of(u) - (0x3f3504f3u + (32u << 23));
  const F f = from_bits((bits & 0x007fffffu) + 0x3f3504f3u) - 1.0f;
  const U turned = b + 0x20000000u;  // its bits 31 and 30 count quarter turns: spec.py's q
  const F t = signed_to_float(b - (turned & 0xc0000000u)) * 0x1p-32f;
  const F t2 = t * t;
  F l = f * -0x1.6626eap-3f + 0x1.26729ep-2f;
  F c = t2 * 0x1.d9c326p+5f + -0x1.55c57ap+6f;
  l = l * f + -0x1.322850p-2f;
  c = c * t2 + 0x1.03c1dcp+6f;
  l = l * f + 0x1.5329bep-2f;
  c = c * t2 + -0x1.3bd3ccp+4f;
  l = l * f + -0x1.98b80ap-2f;
  c = c * t2 + 0x1p+0f;
  l = l * f + 0x1.0005a6p-1f;
  F s = t2 * -0x1.2d9b7cp+6f + 0x1.465ec4p+6f;
  l = l * f + -0x1.555790p-1f;
  s = s * t2 + -0x1.4abbbap+5f;
  l = l * f + 0x1.fffff8p-1f;
  s = s * t2 + 0x1.921fb6p+2f;
  l = l * f + -0x1p+1f;
  s = t * s;
  const F r = root(f * l + signed_to_float(shift_signed(bits, 23)) * -0x1.62e430p+0f);

  // Swap and sign by integer masks: cheaper than selects, and the same bits.
  const U swap = (bits_of(s) ^ bits_of(c)) & shift_signed(turned << 1, 31);
  z0 = r * from_bits((bits_of(c) ^ swap) ^ ((turned ^ (turned << 1)) & 0x80000000u));
  z1 = r * from_bits((bits_of(s) ^ swap) ^ (turned & 0x80000000u));
}

}  // namespace hosfl
