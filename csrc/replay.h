// noise, and replay_: x += s_r * z(seed_r), record after record, in one pass over the weights; perturb_ is one record.
// Every rounding happens as if one record came after another. No temporary larger than 128 KB of stack.
#pragma once

#include "cells.h"
#include "layout.h"

namespace hosfl {
namespace HOSFL_ISA {
namespace {

// The first cells of a row, in groups: x += add(i) for the group from cell i on. Returns how many cells those are.
template <typename Storage, Rounding R, typename Add>
HOSFL_INLINE int64_t add_in_groups(typename Storage::Cell* __restrict x, int64_t n, const uint32_t* __restrict random,
                                   int random_shift, Add add) {
  int64_t i = 0;
#if defined(HOSFL_CELLS)
  if constexpr (!std::is_same<Storage, Float32>::value) {
    for (; i + GROUP <= n; i += GROUP) {
      Words bits{};
      if (R == Rounding::stochastic) bits = (group_at<U32>(random + i) >> random_shift) & 0xFFFFu;
      store_group<R>(Storage{}, x + i, load_group(Storage{}, x + i) + add(i), bits);
    }
  }
#endif
  return i;
}

// The signs of N records, one after another: a cell is in a register meanwhile.
template <typename Storage, Rounding R, int N>
void add_signs(typename Storage::Cell* __restrict x, int64_t n, const uint32_t (&s_bits)[N],
               const uint32_t* const (&word)[N], int shift, const uint32_t* __restrict random, int random_shift) {
  int64_t i = 0;
  if constexpr (N == 1) {
    i = add_in_groups<Storage, R>(x, n, random, random_shift, [&](int64_t at) {
      return from_bits(((group_at<U32>(word[0] + at) << shift) & 0x80000000u) ^ s_bits[0]);
    });
  }
  for (; i < n; ++i) {
    const uint32_t bits = R == Rounding::nearest ? 0 : (random[i] >> random_shift) & 0xFFFFu;
    float y = Storage::load(x[i]);
#pragma GCC unroll 4
    for (int r = 0; r < N - 1; ++r) y = Storage::template rounded<R>(y + signed_by(s_bits[r], word[r][i], shift), bits);
    x[i] = Storage::template store<R>(y + signed_by(s_bits[N - 1], word[N - 1][i], shift), bits);
  }
}

template <typename Storage, Rounding R>
void add_scaled(typename Storage::Cell* __restrict x, int64_t n, float s, const float* __restrict z,
                const uint32_t* __restrict random, int random_shift) {
  int64_t i = add_in_groups<Storage, R>(x, n, random, random_shift,
                                        [&](int64_t at) { return group_at<F32>(z + at) * s; });
  for (; i < n; ++i) {
    const float y = Storage::load(x[i]) + s * z[i];
    x[i] = Storage::template store<R>(y, R == Rounding::nearest ? 0 : (random[i] >> random_shift) & 0xFFFFu);
  }
}

// The rounding bits of the row that holds cell `at` of the segment.
template <Rounding R>
RoundingBits::Row random_row(RoundingBits& rounding, const Segment& segment, const Record& record, int64_t at) {
  if (R == Rounding::nearest) return RoundingBits::Row{nullptr, 0};
  return rounding.row(segment.start + uint64_t(at), record.rounding_seed, segment.stream);
}

// Records whose signs go by while a cell is in a register: of four records a cell then comes and goes once.
constexpr int AT_ONCE = 4;

// Cells that come from memory meanwhile, this many ahead: a processor's own prefetching stops at the end of a page.
constexpr int64_t AHEAD = 2 * COLS;

// first: whether these are the first records that go through the block, whose cells are in memory then.
template <typename Storage, Rounding R, int N>
HOSFL_LOOP void replay_signs(const Segment& segment, const Run& run, const Record* records, bool first) {
  auto* const x = static_cast<typename Storage::Cell*>(segment.data);
  RoundingBits rounding(segment);  // of one record: N is 1 where anything is rounded by them
  BlockWords signs[N];
  uint32_t s_bits[N];
  const int64_t end = first ? run.at + run.count : 0;
  if (first) fetch(x + run.at, run.count < AHEAD ? run.count : AHEAD);
  for (int r = 0; r < N; ++r) {
    s_bits[r] = bits_of(records[r].coefficient * segment.factor);
    signs[r].fill(records[r].seed, run.block, segment.stream, TAG_RADEMACHER, run.first_col(), run.cols());
  }
  each_row(run, [&](int64_t row, int64_t col, int64_t count, int64_t at) {
    const auto random = random_row<R>(rounding, segment, records[0], at);
    const int64_t left = end - (at + AHEAD);
    fetch(x + at + AHEAD, left < count ? left : count);
    const uint32_t* word[N];
    for (int r = 0; r < N; ++r) word[r] = signs[r].word[row / 32] + col;
    add_signs<Storage, R, N>(x + at, count, s_bits, word, int(31 - row % 32),
                             random.word + (R == Rounding::nearest ? 0 : col), random.shift);
  });
}

// A block's weights are in cache after the first records; of other dtypes than float32 a sum's rounding is most of the
// work.
template <typename Storage, Rounding R>
void replay_segment(Rademacher, const Segment& segment, const Record* records, int64_t total) {
  each_block<RADEMACHER_ROWS>(segment.start, segment.n, [&](const Run& run) {
    int64_t r = 0;
    if constexpr (std::is_same<Storage, Float32>::value) {
      for (; total - r >= AT_ONCE; r += AT_ONCE) replay_signs<Storage, R, AT_ONCE>(segment, run, records + r, r == 0);
      if (total - r == 3) return replay_signs<Storage, R, 3>(segment, run, records + r, r == 0);
      if (total - r == 2) return replay_signs<Storage, R, 2>(segment, run, records + r, r == 0);
    }
    for (; r < total; ++r) replay_signs<Storage, R, 1>(segment, run, records + r, r == 0);
  });
}

template <typename Storage, Rounding R>
HOSFL_LOOP void replay_segment(Gaussian, const Segment& segment, const Record* records, int64_t total) {
  auto* const x = static_cast<typename Storage::Cell*>(segment.data);
  RoundingBits rounding(segment);
  alignas(64) float z[GAUSSIAN_ROWS][COLS];
  each_block<GAUSSIAN_ROWS>(segment.start, segment.n, [&](const Run& run) {
    const bool whole = run.count == GAUSSIAN_ROWS * COLS;
    if (!whole) fetch(x + run.at, run.count);
    for (const Record* record = records; record < records + total; ++record) {
      const float s = record->coefficient * segment.factor;
      const int64_t size = whole && record == records ? sizeof *x : 0;
      normal_columns(record->seed, run.block, segment.stream, run.first_col(), run.cols(), z,
                     reinterpret_cast<const char*>(x + run.at), size);
      each_row(run, [&](int64_t row, int64_t col, int64_t count, int64_t at) {
        const auto random = random_row<R>(rounding, segment, *record, at);
        add_scaled<Storage, R>(x + at, count, s, z[row] + col, random.word + (R == Rounding::nearest ? 0 : col),
                               random.shift);
      });
    }
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

void replay(const Segment& segment, const Record* records, int64_t count, bool stochastic) {
  with_storage(segment.dtype, stochastic, [&](auto storage, auto rounding) {
    with_dist(segment.dist, [&](auto dist) {
      replay_segment<decltype(storage), decltype(rounding)::value>(dist, segment, records, count);
    });
  });
}

}  // namespace
}  // namespace HOSFL_ISA
}  // namespace hosfl
