// noise, and replay_: x += s_r * z(seed_r), record after record, in one pass over the weights; perturb_ is one record.
// Every rounding happens as if one record came after another. No temporary larger than 128 KB of stack.
#pragma once

#include "cells.h"
#include "layout.h"

namespace hosfl {
namespace HOSFL_ISA {
namespace {

// The first cells of a row, in groups: x = change(x, i) for the group from cell i on. Those `ahead` cells further come
// from memory meanwhile: asked for a row at a time, they would keep the sums waiting. Returns the number of cells
// changed.
template <typename Storage, Rounding R, typename Change>
HOSFL_INLINE int64_t change_groups(typename Storage::Cell* __restrict x, int64_t n, int64_t ahead,
                                   const uint32_t* __restrict random, int random_shift, Change change) {
  int64_t i = 0;
  if constexpr (in_groups(Storage{})) {
    for (; i + GROUP <= n; i += GROUP) {
      fetch(x + i + ahead, GROUP);
      Words bits{};
      if (R == Rounding::stochastic) bits = (group_at<U32>(random + i) >> random_shift) & 0xFFFFu;
      store_group<R>(Storage{}, x + i, change(load_group(Storage{}, x + i), i), bits);
    }
  }
  return i;
}

// The signs of N records, one after another: a cell is in a register meanwhile. Several are of float32 alone.
template <typename Storage, Rounding R, int N>
void add_signs(typename Storage::Cell* __restrict x, int64_t n, int64_t ahead, const uint32_t (&s_bits)[N],
               const uint32_t* const (&word)[N], int shift, const uint32_t* __restrict random, int random_shift) {
  static_assert(N == 1 || std::is_same<Storage, Float32>::value, "nothing is rounded between two records");
  int64_t i = change_groups<Storage, R>(x, n, ahead, random, random_shift, [&](Floats y, int64_t at) {
#pragma GCC unroll 4
    for (int r = 0; r < N; ++r) y = y + from_bits(((group_at<U32>(word[r] + at) << shift) & 0x80000000u) ^ s_bits[r]);
    return y;
  });
  for (; i < n; ++i) {
    float y = Storage::load(x[i]);
#pragma GCC unroll 4
    for (int r = 0; r < N; ++r) y = y + signed_by(s_bits[r], word[r][i], shift);
    x[i] = Storage::template store<R>(y, R == Rounding::nearest ? 0 : (random[i] >> random_shift) & 0xFFFFu);
  }
}

template <typename Storage, Rounding R>
void add_scaled(typename Storage::Cell* __restrict x, int64_t n, float s, const float* __restrict z,
                const uint32_t* __restrict random, int random_shift) {
  int64_t i = change_groups<Storage, R>(x, n, 0, random, random_shift,
                                        [&](Floats y, int64_t at) { return y + group_at<F32>(z + at) * s; });
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

// How many cells further those are that come from memory meanwhile: a processor's own prefetching stops where a page
// ends.
constexpr int64_t AHEAD = 2 * COLS;

// first: whether these are the first records that go through the block, whose cells are in memory then.
template <typename Storage, Rounding R, int N>
HOSFL_LOOP void replay_signs(const Segment& segment, const Run& run, const Record* records, bool first) {
  auto* const x = static_cast<typename Storage::Cell*>(segment.data);
  RoundingBits rounding(segment);  // of one record: N is 1 where anything is rounded by them
  BlockWords signs[N];
  uint32_t s_bits[N];
  for (int r = 0; r < N; ++r) {
    s_bits[r] = bits_of(records[r].coefficient * segment.factor);
    signs[r].fill(records[r].seed, run.block, segment.stream, TAG_RADEMACHER, run.first_col(), run.cols());
  }
  each_row(run, [&](int64_t row, int64_t col, int64_t count, int64_t at) {
    const auto random = random_row<R>(rounding, segment, records[0], at);
    const bool in_memory = first && at + AHEAD < run.at + run.count;
    const uint32_t* word[N];
    for (int r = 0; r < N; ++r) word[r] = signs[r].word[row / 32] + col;
    add_signs<Storage, R, N>(x + at, count, in_memory ? AHEAD : 0, s_bits, word, int(31 - row % 32),
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
