// float32, float16 and bfloat16 in memory, and the one rounding that each store makes. As spec.py defines them.
#pragma once

#include <type_traits>

#include "noise.h"
#include "ops.h"

namespace hosfl {

enum class Rounding { nearest, stochastic };

// Each storage type: what a cell of memory holds, and how it becomes float32 and comes back. `random` is the
// element's 16 rounding bits; only bfloat16 rounds stochastically.
struct Float32 {
  using Cell = float;
  HOSFL_INLINE float load(Cell x) { return x; }
  template <Rounding R>
  HOSFL_INLINE Cell store(float y, uint32_t) {
    return y;
  }
};

struct BFloat16 {
  using Cell = uint16_t;
  HOSFL_INLINE float load(Cell x) { return from_bits(uint32_t(x) << 16); }
  template <Rounding R>
  HOSFL_INLINE Cell store(float y, uint32_t random) {
    const uint32_t bits = bits_of(y);
    const uint32_t up = R == Rounding::nearest ? 0x7FFFu + ((bits >> 16) & 1u) : random;
    const uint32_t finite = (bits & 0x7F800000u) != 0x7F800000u ? ~0u : 0u;  // infinities and NaN pass through
    return Cell((bits + (up & finite)) >> 16);
  }
};

// Integer conversions, because baseline x86-64 has none in hardware; exact for every value but NaN payloads.
struct Float16 {
  using Cell = uint16_t;
  HOSFL_INLINE float load(Cell h) {
    const uint32_t shifted = uint32_t(h & 0x7FFFu) << 13;
    const uint32_t exponent = shifted & 0x0F800000u;
    const uint32_t sign = uint32_t(h & 0x8000u) << 16;
    const uint32_t normal = shifted + 0x38000000u;
    const uint32_t special = shifted + 0x70000000u;  // infinity, NaN
    const uint32_t subnormal = bits_of(from_bits(shifted + 0x38800000u) - 0x1p-14f);
    const uint32_t magnitude = exponent == 0x0F800000u ? special : exponent == 0u ? subnormal : normal;
    return from_bits(sign | magnitude);
  }
  template <Rounding R>
  HOSFL_INLINE Cell store(float y, uint32_t) {
    const uint32_t bits = bits_of(y), sign = (bits >> 16) & 0x8000u, a = bits & 0x7FFFFFFFu;
    const uint32_t normal = (a - 0x38000000u + 0xFFFu + ((a >> 13) & 1u)) >> 13;
    const uint32_t subnormal = bits_of(from_bits(a) + 0.5f) - 0x3F000000u;  // the sum rounds at 2^-24
    const uint32_t special = a > 0x7F800000u ? 0x7E00u : 0x7C00u;
    const uint32_t magnitude = a >= 0x477FF000u ? special : a < 0x38800000u ? subnormal : normal;
    return Cell(sign | magnitude);
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
