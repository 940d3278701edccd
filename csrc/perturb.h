// perturb_ and noise: x += s * z(seed), one pass, no temporary larger than 64 KB of stack.
#pragma once

#include "layout.h"
#include "rounding.h"

namespace hosfl {
namespace HOSFL_ISA {
namespace {

template <typename Storage, Rounding R>
void add_signs(typename Storage::Cell* __restrict x, int64_t n, float s, const uint32_t* __restrict word, int shift,
               const uint32_t* __restrict random, int random_shift) {
  const uint32_t s_bits = bits_of(s);
  for (int64_t i = 0; i < n; ++i) {
    const float y = Storage::load(x[i]) + signed_by(s_bits, word[i], shift);
    x[i] = Storage::template store<R>(y, R == Rounding::nearest ? 0 : (random[i] >> random_shift) & 0xFFFFu);
  }
}

template <typename Storage, Rounding R>
void add_scaled(typename Storage::Cell* __restrict x, int64_t n, float s, const float* __restrict z,
                const uint32_t* __restrict random, int random_shift) {
  for (int64_t i = 0; i < n; ++i) {
    const float y = Storage::load(x[i]) + s * z[i];
    x[i] = Storage::template store<R>(y, R == Rounding::nearest ? 0 : (random[i] >> random_shift) & 0xFFFFu);
  }
}

// Cells of float16 to float32 and back, by the processor where it can. perturb_ converts for one sum, where these two are
// most of the work (Rademacher on AVX2: 0.75 in place of 1.78 ns per element); a tile is converted once for all its records.
void widen(const uint16_t* __restrict x, int64_t n, float* __restrict y) {
  int64_t i = 0;
#if HOSFL_LANES == 16
  for (; i + 16 <= n; i += 16) _mm512_storeu_ps(y + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(x + i))));
#elif HOSFL_LANES == 8
  for (; i + 8 <= n; i += 8) _mm256_storeu_ps(y + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(x + i))));
#endif
  for (; i < n; ++i) y[i] = Float16::load(x[i]);
}

void narrow(const float* __restrict y, int64_t n, uint16_t* __restrict x) {
  int64_t i = 0;
#if HOSFL_LANES == 16
  for (; i + 16 <= n; i += 16) {
    _mm256_storeu_si256((__m256i*)(x + i), _mm512_cvtps_ph(_mm512_loadu_ps(y + i), _MM_FROUND_TO_NEAREST_INT));
  }
#elif HOSFL_LANES == 8
  for (; i + 8 <= n; i += 8) {
    _mm_storeu_si128((__m128i*)(x + i), _mm256_cvtps_ph(_mm256_loadu_ps(y + i), _MM_FROUND_TO_NEAREST_INT));
  }
#endif
  for (; i < n; ++i) x[i] = Float16::store<Rounding::nearest>(y[i], 0);
}

// Calls add(storage, cells) for `count` cells of one row: float16 as float32.
template <typename Storage, typename Add>
void with_row(typename Storage::Cell* x, int64_t count, Add add) {
  if constexpr (std::is_same<Storage, Float16>::value) {
    alignas(64) float y[COLS];
    widen(x, count, y);
    add(Float32{}, y);
    narrow(y, count, x);
  } else {
    add(Storage{}, x);
  }
}

// The rounding bits of the row that holds cell `at` of the segment.
template <Rounding R>
RoundingBits::Row random_row(RoundingBits& rounding, const Segment& segment, const Record& record, int64_t at) {
  if (R == Rounding::nearest) return RoundingBits::Row{nullptr, 0};
  return rounding.row(segment.start + uint64_t(at), record.rounding_seed, segment.stream);
}

template <typename Storage, Rounding R>
HOSFL_LOOP void perturb_segment(Rademacher, const Segment& segment, const Record& record) {
  auto* x = static_cast<typename Storage::Cell*>(segment.data);
  const float s = record.coefficient * segment.factor;
  RoundingBits rounding(segment);
  BlockWords signs;
  each_block<RADEMACHER_ROWS>(segment.start, segment.n, [&](const Run& run) {
    signs.fill(record.seed, run.block, segment.stream, TAG_RADEMACHER, run.first_col(), run.cols());
    each_row(run, [&](int64_t row, int64_t col, int64_t count, int64_t at) {
      const auto random = random_row<R>(rounding, segment, record, at);
      with_row<Storage>(x + at, count, [&](auto storage, auto* cells) {
        add_signs<decltype(storage), R>(cells, count, s, signs.word[row / 32] + col, int(31 - row % 32),
                                        random.word + (R == Rounding::nearest ? 0 : col), random.shift);
      });
    });
  });
}

template <typename Storage, Rounding R>
HOSFL_LOOP void perturb_segment(Gaussian, const Segment& segment, const Record& record) {
  auto* x = static_cast<typename Storage::Cell*>(segment.data);
  const float s = record.coefficient * segment.factor;
  RoundingBits rounding(segment);
  alignas(64) float z[GAUSSIAN_ROWS][COLS];
  each_block<GAUSSIAN_ROWS>(segment.start, segment.n, [&](const Run& run) {
    // The cells come from memory while the numbers are made.
    for (int64_t i = 0; i < run.count; i += 64 / int64_t(sizeof *x)) __builtin_prefetch(x + run.at + i, 1);
    normal_columns(record.seed, run.block, segment.stream, run.first_col(), run.cols(), z);
    each_row(run, [&](int64_t row, int64_t col, int64_t count, int64_t at) {
      const auto random = random_row<R>(rounding, segment, record, at);
      with_row<Storage>(x + at, count, [&](auto storage, auto* cells) {
        add_scaled<decltype(storage), R>(cells, count, s, z[row] + col,
                                         random.word + (R == Rounding::nearest ? 0 : col), random.shift);
      });
    });
  });
}

void noise_segment(Rademacher, const Segment& out, uint64_t seed) {
  auto* const z = static_cast<float*>(out.data);
  BlockWords signs;
  each_block<RADEMACHER_ROWS>(out.start, out.n, [&](const Run& run) {
    signs.fill(seed, run.block, out.stream, TAG_RADEMACHER, run.first_col(), run.cols());
    each_row(run, [&](int64_t row, int64_t col, int64_t count, int64_t at) {
      const uint32_t* word = signs.word[row / 32] + col;
      for (int64_t i = 0; i < count; ++i) z[at + i] = signed_by(0x3F800000u, word[i], int(31 - row % 32));
    });
  });
}

void noise_segment(Gaussian, const Segment& out, uint64_t seed) {
  auto* const cells = static_cast<float*>(out.data);
  alignas(64) float z[GAUSSIAN_ROWS][COLS];
  each_block<GAUSSIAN_ROWS>(out.start, out.n, [&](const Run& run) {
    normal_columns(seed, run.block, out.stream, run.first_col(), run.cols(), z);
    each_row(run, [&](int64_t row, int64_t col, int64_t count, int64_t at) {
      memcpy(cells + at, z[row] + col, size_t(count) * sizeof(float));
    });
  });
}

void noise(const Segment& out, uint64_t seed) {
  with_dist(out.dist, [&](auto dist) { noise_segment(dist, out, seed); });
}

void perturb(const Segment& segment, const Record& record, bool stochastic) {
  with_storage(segment.dtype, stochastic, [&](auto storage, auto rounding) {
    with_dist(segment.dist, [&](auto dist) {
      perturb_segment<decltype(storage), decltype(rounding)::value>(dist, segment, record);
    });
  });
}

}  // namespace
}  // namespace HOSFL_ISA
}  // namespace hosfl
