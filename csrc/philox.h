// Philox4x32-10 for many columns at once. Key = seed, counter = (block, stream, tag), as in spec.py.
//
// Compilers turn the 32 x 32 -> 64 bit product into a storm of shuffles, so that one step is spelled out.
#pragma once

#include "vectors.h"

namespace hosfl {
namespace HOSFL_ISA {
namespace {

// The 64-bit products of the even lanes.
HOSFL_INLINE U64 multiply_even(U64 x, U64 m) {
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

// The products' high halves. Shuffles where there are two sources of lanes to choose from: the ports that multiply also
// shift. Arm multiplies neighbours, and no lanes of 64 bits: for those compilers leave the vectors.
HOSFL_INLINE U32 multiply_high(U32 x, uint32_t m) {
#if defined(__aarch64__)
  const uint64x2_t first = vmull_n_u32(vget_low_u32((uint32x4_t)x), m), last = vmull_high_n_u32((uint32x4_t)x, m);
  return (U32)vuzp2q_u32(vreinterpretq_u32_u64(first), vreinterpretq_u32_u64(last));
#else
  const U64 factor = U64{} + m;
#if HOSFL_LANES == 16
  constexpr auto ODD = _MM_PERM_ENUM(0xF5);  // every lane becomes the odd one of its pair
  const U64 even = multiply_even((U64)x, factor);
  const U64 odd = multiply_even((U64)_mm512_maskz_shuffle_epi32(0xFFFF, (__m512i)x, ODD), factor);
  return (U32)_mm512_mask_shuffle_epi32((__m512i)odd, 0x5555, (__m512i)even, ODD);
#elif HOSFL_LANES == 8
  const U64 even = multiply_even((U64)x, factor);
  const U64 odd = multiply_even((U64)_mm256_shuffle_epi32((__m256i)x, 0xF5), factor);
  return (U32)_mm256_blend_epi32(_mm256_shuffle_epi32((__m256i)even, 0xF5), (__m256i)odd, 0xAA);
#else
  const U64 even = multiply_even((U64)x, factor), odd = multiply_even((U64)x >> 32, factor);
  return (U32)((even >> 32) | (odd & 0xFFFFFFFF00000000u));
#endif
#endif
}

// The four words of GROUP columns of a block, from `col` on. `block` is a multiple of 64, so adding a column below 1024
// to a block's number never carries.
HOSFL_INLINE void philox_group(uint64_t seed, uint64_t block, uint32_t stream, uint32_t tag, int64_t col,
                               Words (&word)[4]) {
  U32 lane;
  for (int i = 0; i < LANES; ++i) lane[i] = uint32_t(block) + uint32_t(i);
#pragma GCC unroll 4
  for (int j = 0; j < SIDE_BY_SIDE; ++j) {
    word[0].v[j] = lane + uint32_t(col + j * LANES);
    word[1].v[j] = U32{} + uint32_t(block >> 32);
    word[2].v[j] = U32{} + stream;
    word[3].v[j] = U32{} + tag;
  }
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
#pragma GCC unroll 4
    for (int j = 0; j < SIDE_BY_SIDE; ++j) {
      U32 &c0 = word[0].v[j], &c1 = word[1].v[j], &c2 = word[2].v[j], &c3 = word[3].v[j];
      const U32 high0 = multiply_high(c0, 0xD2511F53u), high1 = multiply_high(c2, 0xCD9E8D57u);
      const U32 low0 = c0 * 0xD2511F53u, low1 = c2 * 0xCD9E8D57u;
      c0 = high1 ^ c1 ^ k0;
      c1 = low1;
      c2 = high0 ^ c3 ^ k1;
      c3 = low0;
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// The four words of the columns first .. first + count of a block, rounded outwards to whole groups: a, b, c, d must
// have room for them.
void philox_columns(uint64_t seed, uint64_t block, uint32_t stream, uint32_t tag, int64_t first, int64_t count,
                    uint32_t* a, uint32_t* b, uint32_t* c, uint32_t* d) {
  for (int64_t col = first / GROUP * GROUP; col < first + count; col += GROUP) {
    Words word[4];
    philox_group(seed, block, stream, tag, col, word);
    memcpy(a + col, &word[0], sizeof(Words));
    memcpy(b + col, &word[1], sizeof(Words));
    memcpy(c + col, &word[2], sizeof(Words));
    memcpy(d + col, &word[3], sizeof(Words));
  }
}

// The four normal numbers of the same columns, a row of z each. The words never reach memory.
// cells: of a whole block, `size` bytes each; none: of size 0. Those of a group of columns come from memory while its
// numbers are made: all asked for at once would keep the first numbers waiting.
template <int64_t WIDTH>
HOSFL_LOOP void normal_columns(uint64_t seed, uint64_t block, uint32_t stream, int64_t first, int64_t count,
                              float (*z)[WIDTH], const char* cells = nullptr, int64_t size = 0) {
  for (int64_t col = first / GROUP * GROUP; col < first + count; col += GROUP) {
    asm("" : "+r"(size));  // or GCC makes a second copy of the loop, for size 0
    for (int64_t row = 0; row < GAUSSIAN_ROWS; ++row) fetch(cells + row * COLS * size, GROUP * size);
    cells += GROUP * size;
    Words word[4];
    philox_group(seed, block, stream, TAG_GAUSSIAN, col, word);
#pragma GCC unroll 2
    for (int pair = 0; pair < 4; pair += 2) {
      Floats z0, z1;
      box_muller(word[pair], word[pair + 1], z0, z1);
      memcpy(z[pair] + col, &z0, sizeof z0);
      memcpy(z[pair + 1] + col, &z1, sizeof z1);
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
