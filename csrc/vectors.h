// Vectors of one instruction set, and packs of them: the numbers that the loops written by hand work on.
// Included once per instruction set, inside that set's namespace.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "noise.h"

// A function of its own in the machine code, where tests/test_disassembly.py finds it by its name.
#define HOSFL_LOOP __attribute__((noinline))

namespace hosfl {
namespace HOSFL_ISA {
namespace {

#if defined(HOSFL_LANES)
constexpr int LANES = HOSFL_LANES;
#else
constexpr int LANES = 4;
#endif

typedef uint32_t U32 __attribute__((vector_size(4 * LANES)));
typedef uint64_t U64 __attribute__((vector_size(4 * LANES)));
typedef int32_t I32 __attribute__((vector_size(4 * LANES)));
typedef float F32 __attribute__((vector_size(4 * LANES)));

// Vectors side by side. Philox and box_muller are long chains of operations that wait for one another: every operation
// is made on all vectors of a pack before the next, which gives the processor four chains to work at (measured: normal
// numbers take 0.8 of the time with AVX2 and AVX-512, though not all of them fit AVX2's registers).
constexpr int SIDE_BY_SIDE = 4;
constexpr int GROUP = LANES * SIDE_BY_SIDE;  // lanes of a pack: columns are made in groups of this many

template <typename V>
struct Pack {
  V v[SIDE_BY_SIDE];
};
using Floats = Pack<F32>;
using Words = Pack<U32>;

template <typename V, typename Make>
HOSFL_INLINE Pack<V> each_vector(Make make) {
  Pack<V> made;
#pragma GCC unroll 4
  for (int j = 0; j < SIDE_BY_SIDE; ++j) made.v[j] = make(j);
  return made;
}

// The GROUP numbers at `p`, vector by vector: a copy of all at once goes through the stack.
template <typename V, typename T>
HOSFL_INLINE Pack<V> group_at(const T* p) {
  return each_vector<V>([&](int j) {
    V v;
    memcpy(&v, p + j * LANES, sizeof v);
    return v;
  });
}

// b may be a pack, or one number for all lanes.
template <typename V>
HOSFL_INLINE V nth(const Pack<V>& pack, int j) {
  return pack.v[j];
}
template <typename T>
HOSFL_INLINE T nth(const T& number, int) {
  return number;
}
#define HOSFL_OPERATOR(op)                                                       \
  template <typename V, typename B>                                              \
  HOSFL_INLINE Pack<V> operator op(const Pack<V>& a, const B& b) {               \
    return each_vector<V>([&](int j) { return V(a.v[j] op nth(b, j)); });       \
  }
HOSFL_OPERATOR(+)
HOSFL_OPERATOR(-)
HOSFL_OPERATOR(*)
HOSFL_OPERATOR(&)
HOSFL_OPERATOR(^)
HOSFL_OPERATOR(<<)
HOSFL_OPERATOR(>>)
#undef HOSFL_OPERATOR

// Beside those of noise.h for one number, which they would hide.
using hosfl::bits_of;
using hosfl::from_bits;
HOSFL_INLINE Words bits_of(const Floats& x) {
  return each_vector<U32>([&](int j) { return (U32)x.v[j]; });
}
HOSFL_INLINE Floats from_bits(const Words& u) {
  return each_vector<F32>([&](int j) { return (F32)u.v[j]; });
}
HOSFL_INLINE Words shift_signed(const Words& a, int n) {
  return each_vector<U32>([&](int j) { return (U32)((I32)a.v[j] >> n); });
}
HOSFL_INLINE Floats signed_to_float(const Words& a) {
  return each_vector<F32>([&](int j) { return __builtin_convertvector((I32)a.v[j], F32); });
}
HOSFL_INLINE Floats to_float(const Words& a) {
#if HOSFL_LANES == 16 || defined(__aarch64__)  // which convert unsigned integers
  return each_vector<F32>([&](int j) { return __builtin_convertvector(a.v[j], F32); });
#else
  return signed_to_float(a >> 16) * 65536.0f + signed_to_float(a & 0xFFFFu);
#endif
}

HOSFL_INLINE F32 root(F32 x) {
#if HOSFL_LANES == 16
  return (F32)_mm512_sqrt_ps((__m512)x);
#elif HOSFL_LANES == 8
  return (F32)_mm256_sqrt_ps((__m256)x);
#elif defined(__SSE2__)
  return (F32)_mm_sqrt_ps((__m128)x);
#else
  for (int i = 0; i < LANES; ++i) x[i] = sqrtf(x[i]);
  return x;
#endif
}
HOSFL_INLINE Floats root(const Floats& x) {
  return each_vector<F32>([&](int j) { return root(x.v[j]); });
}

// Asks for cells that are to be written, so that they come from memory meanwhile.
template <typename Cell>
HOSFL_INLINE void fetch(const Cell* x, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / int64_t(sizeof *x)) __builtin_prefetch(x + i, 1);
}

}  // namespace
}  // namespace HOSFL_ISA
}  // namespace hosfl
