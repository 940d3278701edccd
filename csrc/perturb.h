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

template <typename Storage, Rounding R, Dist D>
void perturb_segment(const Segment& segment, const Record& record) {
  auto* x = static_cast<typename Storage::Cell*>(segment.data);
  const float s = record.coefficient * segment.factor;
  RoundingBits rounding(segment);
  const auto random_row = [&](int64_t at) {
    if (R == Rounding::nearest) return RoundingBits::Row{nullptr, 0};
    return rounding.row(segment.start + uint64_t(at), record.rounding_seed, segment.stream);
  };
  if (D == Dist::rademacher) {
    BlockWords signs;
    each_block<RADEMACHER_ROWS>(segment.start, segment.n, [&](const Run& run) {
      signs.fill(record.seed, run.block, segment.stream, TAG_RADEMACHER, run.first_col(), run.cols());
      each_row(run, [&](int64_t row, int64_t col, int64_t count, int64_t at) {
        const auto random = random_row(at);
        add_signs<Storage, R>(x + at, count, s, signs.word[row / 32] + col, int(31 - row % 32),
                              random.word + (R == Rounding::nearest ? 0 : col), random.shift);
      });
    });
  } else {
    Normals normals;
    each_block<GAUSSIAN_ROWS>(segment.start, segment.n, [&](const Run& run) {
      normals.fill(record.seed, run.block, segment.stream, run.first_col(), run.cols());
      each_row(run, [&](int64_t row, int64_t col, int64_t count, int64_t at) {
        const auto random = random_row(at);
        add_scaled<Storage, R>(x + at, count, s, normals.z[row] + col,
                               random.word + (R == Rounding::nearest ? 0 : col), random.shift);
      });
    });
  }
}

void noise(float* out, int64_t n, uint64_t seed, uint32_t stream, uint64_t start, Dist dist) {
  if (dist == Dist::rademacher) {
    BlockWords signs;
    each_block<RADEMACHER_ROWS>(start, n, [&](const Run& run) {
      signs.fill(seed, run.block, stream, TAG_RADEMACHER, run.first_col(), run.cols());
      each_row(run, [&](int64_t row, int64_t col, int64_t count, int64_t at) {
        const uint32_t* word = signs.word[row / 32] + col;
        for (int64_t i = 0; i < count; ++i) out[at + i] = signed_by(0x3F800000u, word[i], int(31 - row % 32));
      });
    });
  } else {
    Normals normals;
    each_block<GAUSSIAN_ROWS>(start, n, [&](const Run& run) {
      normals.fill(seed, run.block, stream, run.first_col(), run.cols());
      each_row(run, [&](int64_t row, int64_t col, int64_t count, int64_t at) {
        memcpy(out + at, normals.z[row] + col, size_t(count) * sizeof(float));
      });
    });
  }
}

void perturb(const Segment& segment, const Record& record, Dist dist, bool stochastic) {
  with_storage(segment.dtype, stochastic, [&](auto storage, auto rounding) {
    using Storage = decltype(storage);
    constexpr Rounding R = decltype(rounding)::value;
    if (dist == Dist::rademacher) {
      perturb_segment<Storage, R, Dist::rademacher>(segment, record);
    } else {
      perturb_segment<Storage, R, Dist::gaussian>(segment, record);
    }
  });
}

}  // namespace
}  // namespace HOSFL_ISA
}  // namespace hosfl
