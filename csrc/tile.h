// Tiles: some columns of a block in float32, held on the stack while records go by, and the words of those records.
// Weights cross the memory bus once however many records there are, and lie close together meanwhile: in memory the
// rows of a tile are 4 KB apart, where they would push each other out of the cache.
#pragma once

#include "layout.h"
#include "rounding.h"

namespace hosfl {
namespace HOSFL_ISA {
namespace {

constexpr int64_t TILE = 64;    // columns of a tile
constexpr int64_t RECORDS = 32; // records whose words are in cache at once

// Words of RECORDS records for the TILE columns of a block. What one row reads lies together.
struct TileWords {
  alignas(64) uint32_t word[4][RECORDS][TILE];

  void fill(int64_t r, uint64_t seed, uint64_t block, uint32_t stream, uint32_t tag) {
    philox_columns(seed, block, stream, tag, 0, TILE, word[0][r], word[1][r], word[2][r], word[3][r]);
  }
};

// Where the rounding bits of a row of a tile are: the block of 8 rows, and the row in it.
struct RoundingPlace {
  uint64_t block;
  int64_t row;

  RoundingPlace(const Run& run, int64_t rows_of_block, int64_t row_of_run, int64_t tile) {
    const uint64_t row_of_tensor = run.block / COLS * uint64_t(rows_of_block) + uint64_t(row_of_run);
    block = row_of_tensor / ROUNDING_ROWS * COLS + uint64_t(tile);
    row = int64_t(row_of_tensor % ROUNDING_ROWS);
  }

  // The words of record r; an element's bits are at `shift`.
  const uint32_t* words(const TileWords& random, int64_t r) const { return random.word[row / 2][r]; }
  int shift() const { return int(16 * (row % 2)); }
};

// Calls body(run, tile) for every block and every tile of columns in it that the segment touches.
template <int64_t ROWS, typename Body>
void each_tile(const Segment& segment, Body body) {
  each_block<ROWS>(segment.start, segment.n, [&](const Run& run) {
    const int64_t end = run.first_col() + run.cols();
    for (int64_t tile = run.first_col() / TILE * TILE; tile < end; tile += TILE) body(run, tile);
  });
}

// The rows of a run, two by two: rows 2 k and 2 k + 1 read the same word of signs.
template <typename Body>
void each_pair(const Run& run, Body body) {
  for (int64_t row = run.row() / 2 * 2; row * COLS < run.offset + run.count; row += 2) body(row);
}

// Cells of a tile in float32. Those of the pairs that are not the run's are 0, and are never written back.
template <int64_t ROWS>
struct TileRows {
  alignas(64) float y[ROWS][TILE];

  // The next tile's come from memory into the second cache meanwhile: rows 4 KB apart are none that a processor fetches
  // ahead by itself (AdamW takes 0.87 of the time with this).
  template <typename Storage>
  void load(const typename Storage::Cell* x, const Run& run, int64_t tile) {
    const int64_t next = tile + TILE < COLS ? TILE : ROWS * COLS - tile;
    each_part(run, tile, [&](float* row, int64_t at, int64_t first, int64_t last) {
      if (last - first == TILE) {
        for (int64_t i = 0; i < TILE; ++i) row[i] = Storage::load(x[at + i]);
        for (int64_t i = 0; i < TILE; i += 64 / int64_t(sizeof *x)) __builtin_prefetch(x + at + next + i, 0, 2);
      } else {
        for (int64_t i = 0; i < TILE; ++i) row[i] = 0.0f;
        for (int64_t i = first; i < last; ++i) row[i] = Storage::load(x[at + i]);
      }
    });
  }

  // The values are already rounded to storage, so this is exact.
  template <typename Storage>
  void store(typename Storage::Cell* x, const Run& run, int64_t tile) {
    each_part(run, tile, [&](const float* row, int64_t at, int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) x[at + i] = Storage::template store<Rounding::nearest>(row[i], 0);
    });
  }

 private:
  // Calls body(row, at, first, last): cells first .. last of the row are the run's (perhaps none: last <= first), and
  // `at` is the place in the segment of the row's cell 0, which may lie before the segment.
  template <typename Body>
  void each_part(const Run& run, int64_t tile, Body body) {
    const int64_t end = run.offset + run.count;
    each_pair(run, [&](int64_t pair) {
      for (int64_t row = pair; row < pair + 2; ++row) {
        const int64_t left = row * COLS + tile;
        body(y[row], run.at + left - run.offset, run.offset > left ? run.offset - left : 0,
             end - left < TILE ? end - left : TILE);
      }
    });
  }
};

// The normal numbers of one record for a tile of four rows.
struct TileNormals {
  alignas(64) float z[GAUSSIAN_ROWS][TILE];

  void fill(uint64_t seed, uint64_t block, uint32_t stream) { normal_columns(seed, block, stream, 0, TILE, z); }
};

}  // namespace
}  // namespace HOSFL_ISA
}  // namespace hosfl
