// project: sums of z(seed) * x for many seeds in one pass over the weights. Every sum in the order of spec.py.
#pragma once

#include "tile.h"

namespace hosfl {
namespace HOSFL_ISA {
namespace {

// sums[i] += z * y[row][i] for the rows first .. last, which share the word `word`. From the last row up, because the
// next bit then comes to the top by an addition (0.07 instead of 0.08 ns per element and record); written with vectors
// so that words and sums stay in registers.
HOSFL_INLINE void add_signed_rows(float* sums, const float (*y)[TILE], const uint32_t* word, int64_t first,
                                  int64_t last) {
  const int shift = int(31 - (last - 1) % 32);
  for (int64_t col = 0; col < TILE; col += GROUP) {
    F32 sum[SIDE_BY_SIDE];
    U32 bits[SIDE_BY_SIDE];
#pragma GCC unroll 4
    for (int j = 0; j < SIDE_BY_SIDE; ++j) {
      memcpy(&sum[j], sums + col + j * LANES, sizeof(F32));
      memcpy(&bits[j], word + col + j * LANES, sizeof(U32));
      bits[j] <<= shift;
    }
    for (int64_t row = last; row-- > first;) {
#pragma GCC unroll 4
      for (int j = 0; j < SIDE_BY_SIDE; ++j) {
        U32 x;
        memcpy(&x, y[row] + col + j * LANES, sizeof x);
        sum[j] += (F32)(x ^ (bits[j] & 0x80000000u));
        bits[j] += bits[j];
      }
    }
#pragma GCC unroll 4
    for (int j = 0; j < SIDE_BY_SIDE; ++j) memcpy(sums + col + j * LANES, &sum[j], sizeof(F32));
  }
}

// The same with normal numbers; plain loops take a tenth longer in all.
HOSFL_INLINE void add_scaled_rows(float* sums, const float (*y)[TILE], const float (*z)[TILE], int64_t first,
                                  int64_t last) {
  for (int64_t col = 0; col < TILE; col += LANES) {
    F32 sum, x, w;
    memcpy(&sum, sums + col, sizeof sum);
    for (int64_t row = last; row-- > first;) {
      memcpy(&x, y[row] + col, sizeof x);
      memcpy(&w, z[row % GAUSSIAN_ROWS] + col, sizeof w);
      sum += x * w;
    }
    memcpy(sums + col, &sum, sizeof sum);
  }
}

// The columns' sums added: halves onto each other, so that no instruction set has an order of its own.
HOSFL_INLINE double total_of(const float* sums) {
  double total[TILE];
  for (int64_t i = 0; i < TILE; ++i) total[i] = sums[i];
  for (int64_t half = TILE / 2; half; half /= 2) {
    for (int64_t i = 0; i < half; ++i) total[i] += total[i + half];
  }
  return total[0];
}

// Calls body(first, last) for the rows of a run from the last up, those of the same COUNT rows of the block together.
template <int64_t COUNT, typename Body>
void each_rows(const Run& run, Body body) {
  int64_t last = (run.offset + run.count + COLS - 1) / COLS;
  while (last > run.row()) {
    const int64_t part = (last - 1) / COUNT * COUNT, first = part > run.row() ? part : run.row();
    body(first, last);
    last = first;
  }
}

// The rows that share their words stay in the closest cache while the records of a chunk go by. A tile of normal
// numbers has the rows of 32 of their blocks, so that the sums are cut where those of signs are.
template <typename Storage, Dist D>
HOSFL_LOOP void project_block(const Segment& block, const uint64_t* seeds, int64_t total, double* scalars) {
  constexpr bool SIGNS = D == Dist::rademacher;
  const auto* const x = static_cast<const typename Storage::Cell*>(block.data);
  TileWords signs;
  TileNormals normals;
  TileRows<RADEMACHER_ROWS> rows;
  each_tile<RADEMACHER_ROWS>(block, [&](const Run& run, int64_t tile) {
    rows.load<Storage>(x, run, tile);
    for (int64_t done = 0; done < total; done += RECORDS) {
      const int64_t count = total - done < RECORDS ? total - done : RECORDS;
      alignas(64) float sums[RECORDS][TILE] = {};
      for (int64_t r = 0; SIGNS && r < count; ++r) {
        signs.fill(r, seeds[done + r], run.block + uint64_t(tile), block.stream, TAG_RADEMACHER);
      }
      each_rows<SIGNS ? 32 : GAUSSIAN_ROWS>(run, [&](int64_t first, int64_t last) {
        const uint64_t row = run.block / COLS * RADEMACHER_ROWS + uint64_t(first);
        for (int64_t r = 0; r < count; ++r) {
          if (SIGNS) {
            add_signed_rows(sums[r], rows.y, signs.word[first / 32][r], first, last);
          } else {
            normals.fill(seeds[done + r], row / GAUSSIAN_ROWS * COLS + uint64_t(tile), block.stream);
            add_scaled_rows(sums[r], rows.y, normals.z, first, last);
          }
        }
      });
      for (int64_t r = 0; r < count; ++r) scalars[done + r] += total_of(sums[r]);
    }
  });
}

void project(const Segment& block, const uint64_t* seeds, int64_t count, double* scalars) {
  with_storage(block.dtype, false, [&](auto storage, auto) {
    with_dist(block.dist, [&](auto dist) {
      project_block<decltype(storage), decltype(dist)::value>(block, seeds, count, scalars);
    });
  });
  for (int64_t r = 0; r < count; ++r) scalars[r] *= block.factor;
}

}  // namespace
}  // namespace HOSFL_ISA
}  // namespace hosfl
