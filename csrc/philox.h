// Philox4x32-10 for many columns at once. Key = seed, counter = (block, stream, tag), as in spec.py.
//
// The ten rounds are one long chain of dependent multiplications, so several vectors go through them side by side;
// and compilers turn the 32 x 32 -> 64 bit product into a storm of shuffles, so that one step is spelled out.
#pragma once

#include <cstdint>

namespace hosfl {
namespace HOSFL_ISA {
namespace {

#if defined(HOSFL_LANES)
constexpr int LANES = HOSFL_LANES;
#else
constexpr int LANES = 4;
#endif
constexpr int SIDE_BY_SIDE = 4;
constexpr int GROUP = LANES * SIDE_BY_SIDE;  // columns are made in groups of this many

typedef uint32_t U32 __attribute__((vector_size(4 * LANES)));
typedef uint64_t U64 __attribute__((vector_size(4 * LANES)));

// The 64-bit products of the even lanes.
static inline __attribute__((always_inline)) U64 multiply_even(U64 x, U64 m) {
#if HOSFL_LANES == 16
  return (U64)_mm512_mul_epu32((__m512i)x, (__m512i)m);
#elif HOSFL_LANES == 8
  return (U64)_mm256_mul_epu32((__m256i)x, (__m256i)m);
#elif defined(__SSE2__)
  return (U64)_mm_mul_epu32((__m128i)x, (__m128i)m);
#else
  return (x & 0xFFFFFFFFu) * (m & 0xFFFFFFFFu);
#endif
}

static inline __attribute__((always_inline)) U32 multiply_high(U32 x, uint32_t m) {
  const U64 factor = U64{} + m;
  const U64 even = multiply_even((U64)x, factor), odd = multiply_even((U64)x >> 32, factor);
  return (U32)((even >> 32) | (odd & 0xFFFFFFFF00000000u));
}

// The four words of the columns first .. first + count of a block, rounded outwards to whole groups: a, b, c, d must
// have room for them. `block` is a multiple of 64, so adding a column below 1024 to a block's number never carries.
void philox_columns(uint64_t seed, uint64_t block, uint32_t stream, uint32_t tag, int64_t first, int64_t count,
                    uint32_t* a, uint32_t* b, uint32_t* c, uint32_t* d) {
  U32 lane;
  for (int i = 0; i < LANES; ++i) lane[i] = uint32_t(block) + uint32_t(i);
  for (int64_t col = first / GROUP * GROUP; col < first + count; col += GROUP) {
    U32 c0[SIDE_BY_SIDE], c1[SIDE_BY_SIDE], c2[SIDE_BY_SIDE], c3[SIDE_BY_SIDE];
#pragma GCC unroll 4
    for (int j = 0; j < SIDE_BY_SIDE; ++j) {
      c0[j] = lane + uint32_t(col + j * LANES);
      c1[j] = U32{} + uint32_t(block >> 32);
      c2[j] = U32{} + stream;
      c3[j] = U32{} + tag;
    }
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
#pragma GCC unroll 4
      for (int j = 0; j < SIDE_BY_SIDE; ++j) {
        const U32 high0 = multiply_high(c0[j], 0xD2511F53u), high1 = multiply_high(c2[j], 0xCD9E8D57u);
        const U32 low0 = c0[j] * 0xD2511F53u, low1 = c2[j] * 0xCD9E8D57u;
        c0[j] = high1 ^ c1[j] ^ k0;
        c1[j] = low1;
        c2[j] = high0 ^ c3[j] ^ k1;
        c3[j] = low0;
      }
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
#pragma GCC unroll 4
    for (int j = 0; j < SIDE_BY_SIDE; ++j) {
      __builtin_memcpy(a + col + j * LANES, &c0[j], sizeof(U32));
      __builtin_memcpy(b + col + j * LANES, &c1[j], sizeof(U32));
      __builtin_memcpy(c + col + j * LANES, &c2[j], sizeof(U32));
      __builtin_memcpy(d + col + j * LANES, &c3[j], sizeof(U32));
    }
  }
}

// One call, for checking against published words.
void philox(uint64_t key, uint64_t block, uint32_t stream, uint32_t tag, uint32_t words[4]) {
  uint32_t a[GROUP], b[GROUP], c[GROUP], d[GROUP];
  philox_columns(key, block, stream, tag, 0, 1, a, b, c, d);
  words[0] = a[0], words[1] = b[0], words[2] = c[0], words[3] = d[0];
}

}  // namespace
}  // namespace HOSFL_ISA
}  // namespace hosfl
