// Groups of cells to float32 and back: the bits of rounding.h, by the instructions of the set. Compilers vectorise
// rounding.h too, but do not find the conversions of float16 (with these Rademacher takes 0.6 to 0.7 of the time), and
// shuffle and compare more for bfloat16 (0.7).
#pragma once

#include "rounding.h"
#include "vectors.h"

namespace hosfl {
namespace HOSFL_ISA {
namespace {

#if HOSFL_LANES == 16

#define HOSFL_CELLS
HOSFL_INLINE U32 zero_extended(const uint16_t* x) {
  return (U32)_mm512_maskz_cvtepu16_epi32(0xFFFF, _mm256_loadu_si256((const __m256i*)x));
}
HOSFL_INLINE F32 from_halves(const uint16_t* x) {
  return (F32)_mm512_maskz_cvtph_ps(0xFFFF, _mm256_loadu_si256((const __m256i*)x));
}
HOSFL_INLINE void to_halves(uint16_t* x, F32 y) {
  _mm256_storeu_si256((__m256i*)x, _mm512_maskz_cvtps_ph(0xFFFF, (__m512)y, _MM_FROUND_TO_NEAREST_INT));
}
HOSFL_INLINE void store_upper_halves(uint16_t* x, U32 first, U32 second) {
  alignas(64) static constexpr uint16_t UPPER[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                     33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  _mm512_storeu_si512(x, _mm512_permutex2var_epi16((__m512i)first, _mm512_load_si512(UPPER), (__m512i)second));
}

#elif HOSFL_LANES == 8

#define HOSFL_CELLS
HOSFL_INLINE U32 zero_extended(const uint16_t* x) {
  return (U32)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)x));
}
HOSFL_INLINE F32 from_halves(const uint16_t* x) { return (F32)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)x)); }
HOSFL_INLINE void to_halves(uint16_t* x, F32 y) {
  _mm_storeu_si128((__m128i*)x, _mm256_cvtps_ph((__m256)y, _MM_FROUND_TO_NEAREST_INT));
}
HOSFL_INLINE void store_upper_halves(uint16_t* x, U32 first, U32 second) {
  const __m256i cells = _mm256_packus_epi32((__m256i)(first >> 16), (__m256i)(second >> 16));
  _mm256_storeu_si256((__m256i*)x, _mm256_permute4x64_epi64(cells, 0xD8));  // packed by halves of the vectors
}

#elif defined(__aarch64__)

#define HOSFL_CELLS
HOSFL_INLINE U32 zero_extended(const uint16_t* x) { return (U32)vmovl_u16(vld1_u16(x)); }
HOSFL_INLINE F32 from_halves(const uint16_t* x) { return (F32)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(x))); }
HOSFL_INLINE void to_halves(uint16_t* x, F32 y) {
  vst1_u16(x, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)y)));
}
HOSFL_INLINE void store_upper_halves(uint16_t* x, U32 first, U32 second) {
  vst1q_u16(x, vuzp2q_u16(vreinterpretq_u16_u32((uint32x4_t)first), vreinterpretq_u16_u32((uint32x4_t)second)));
}

#endif

// Whether cells of a storage are worked on in groups, by load_group and store_group.
constexpr bool in_groups(Float32) { return true; }

HOSFL_INLINE Floats load_group(Float32, const float* x) { return group_at<F32>(x); }

template <Rounding R>
HOSFL_INLINE void store_group(Float32, float* x, const Floats& y, const Words&) {
#pragma GCC unroll 4
  for (int j = 0; j < SIDE_BY_SIDE; ++j) memcpy(x + j * LANES, &y.v[j], sizeof y.v[j]);
}

#if !defined(HOSFL_CELLS)
constexpr bool in_groups(Float16) { return false; }
constexpr bool in_groups(BFloat16) { return false; }
#else
constexpr bool in_groups(Float16) { return true; }
constexpr bool in_groups(BFloat16) { return true; }

HOSFL_INLINE Floats load_group(Float16, const uint16_t* x) {
  return each_vector<F32>([&](int j) { return from_halves(x + j * LANES); });
}
HOSFL_INLINE Floats load_group(BFloat16, const uint16_t* x) {
  return each_vector<F32>([&](int j) { return (F32)(zero_extended(x + j * LANES) << 16); });
}

template <Rounding R>
HOSFL_INLINE void store_group(Float16, uint16_t* x, const Floats& y, const Words&) {
#pragma GCC unroll 4
  for (int j = 0; j < SIDE_BY_SIDE; ++j) to_halves(x + j * LANES, y.v[j]);
}

// y rounded to bfloat16, in the upper half of every lane. y is the sum of a cell and a number: if it is infinite or
// NaN, its lower half is 0, and what is added there is not carried.
template <Rounding R>
HOSFL_INLINE U32 rounded_upper_half(F32 y, U32 random) {
  const U32 bits = (U32)y;
  if (R == Rounding::stochastic) return bits + random;
#if HOSFL_LANES == 16  // a mask in place of the shift
  const __mmask16 odd = _mm512_test_epi32_mask((__m512i)bits, _mm512_set1_epi32(0x10000));
  const __m512i up = (__m512i)(bits + 0x7FFFu);
  return (U32)_mm512_mask_add_epi32(up, odd, up, _mm512_set1_epi32(1));
#else
  return bits + ((bits >> 16) & 1u) + 0x7FFFu;
#endif
}

template <Rounding R>
HOSFL_INLINE void store_group(BFloat16, uint16_t* x, const Floats& y, const Words& random) {
#pragma GCC unroll 2
  for (int j = 0; j < SIDE_BY_SIDE; j += 2) {
    store_upper_halves(x + j * LANES, rounded_upper_half<R>(y.v[j], random.v[j]),
                       rounded_upper_half<R>(y.v[j + 1], random.v[j + 1]));
  }
}

#endif

}  // namespace
}  // namespace HOSFL_ISA
}  // namespace hosfl
