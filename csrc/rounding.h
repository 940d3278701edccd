// float32, float16 and bfloat16 in memory, and the one rounding that each store makes. As spec.py defines them.
#pragma once

#include <type_traits>

#include "noise.h"
#include "segment.h"

namespace hosfl {

enum class Rounding { nearest, stochastic };

// Each storage type: what a cell of memory holds, how it becomes float32 and comes back, and `rounded`, which is both
// ways at once: load(store(y)). `random` is the element's 16 rounding bits; only bfloat16 rounds stochastically.
struct Float32 {
  using Cell = float;
  HOSFL_INLINE float load(Cell x) { return x; }
  template <Rounding R>
  HOSFL_INLINE float rounded(float y, uint32_t) {
    return y;
  }
  template <Rounding R>
  HOSFL_INLINE Cell store(float y, uint32_t) {
    return y;
  }
};

struct BFloat16 {
  using Cell = uint16_t;
  HOSFL_INLINE float load(Cell x) { return from_bits(uint32_t(x) << 16); }
  template <Rounding R>
  HOSFL_INLINE float rounded(float y, uint32_t random) {
    const uint32_t bits = bits_of(y);
    const uint32_t up = R == Rounding::nearest ? 0x7FFFu + ((bits >> 16) & 1u) : random;
    const uint32_t finite = (bits & 0x7F800000u) != 0x7F800000u ? ~0u : 0u;  // infinities and NaN pass through
    return from_bits((bits + (up & finite)) & 0xFFFF0000u);
  }
  template <Rounding R>
  HOSFL_INLINE Cell store(float y, uint32_t random) {
    return Cell(bits_of(rounded<R>(y, random)) >> 16);
  }
};

// By integers and float32 sums, because baseline x86-64 has no conversions; `store` makes the bits of the hardware's
// for every float, NaN among them. Every choice is between two values that are there, after a comparison of signed
// integers: compilers make branches of nested choices, which then are not vectorised, and SSE2 and AVX2 compare no
// unsigned integers.
struct Float16 {
  using Cell = uint16_t;
  HOSFL_INLINE float load(Cell h) {
    const int32_t a = int32_t(h & 0x7FFFu) << 13;
    const int32_t normal = a + 0x38000000;
    const int32_t special = a + 0x70000000;  // infinity, NaN
    const int32_t subnormal = int32_t(bits_of(from_bits(uint32_t(a + 0x38800000)) - 0x1p-14f));
    const int32_t upper = a >= 0x0F800000 ? special : normal;
    return from_bits(uint32_t(h & 0x8000u) << 16 | uint32_t(a < 0x00800000 ? subnormal : upper));
  }
  // |y| + c - c rounds |y| to the last bit of c: with c 2^13 times the power of two in y that is the last bit of
  // float16, and with c = 1/2 that of its subnormal numbers.
  template <Rounding R>
  HOSFL_INLINE float rounded(float y, uint32_t) {
    const uint32_t bits = bits_of(y);
    const int32_t a = int32_t(bits & 0x7FFFFFFFu), power = a & 0x7F800000;
    const float c = from_bits(uint32_t(power > 0x38800000 ? power : 0x38800000) + (13u << 23));
    const int32_t finite = int32_t(bits_of(from_bits(uint32_t(a)) + c - c));
    const int32_t special = a > 0x7F800000 ? a : 0x7F800000;  // NaN, infinity
    return from_bits((bits & 0x80000000u) | uint32_t(a >= 0x477FF000 ? special : finite));
  }
  template <Rounding R>
  HOSFL_INLINE Cell store(float y, uint32_t) {
    const uint32_t bits = bits_of(y);
    const int32_t a = int32_t(bits & 0x7FFFFFFFu);
    const int32_t normal = (a - 0x38000000 + 0x0FFF + ((a >> 13) & 1)) >> 13;
    const int32_t subnormal = int32_t(bits_of(from_bits(uint32_t(a)) + 0.5f)) - 0x3F000000;  // the sum rounds at 2^-24
    const int32_t special = a > 0x7F800000 ? 0x7E00 | ((a >> 13) & 0x03FF) : 0x7C00;  // NaN, infinity
    const int32_t upper = a >= 0x477FF000 ? special : normal;
    return Cell((bits >> 16 & 0x8000u) | uint32_t(a < 0x38800000 ? subnormal : upper));
  }
};

// Calls run(storage, rounding) for a dtype; float32 and float16 only round to nearest.
template <typename Run_>
static inline void with_storage(Dtype dtype, bool stochastic, Run_ run) {
  switch (dtype) {
    case Dtype::float32:
      return run(Float32{}, std::integral_constant<Rounding, Rounding::nearest>{});
    case Dtype::float16:
      return run(Float16{}, std::integral_constant<Rounding, Rounding::nearest>{});
    case Dtype::bfloat16:
      if (stochastic) return run(BFloat16{}, std::integral_constant<Rounding, Rounding::stochastic>{});
      return run(BFloat16{}, std::integral_constant<Rounding, Rounding::nearest>{});
  }
}

}  // namespace hosfl
