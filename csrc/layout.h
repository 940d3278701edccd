// How the elements of a segment lie in blocks of ROWS x 1024, and the words and normal numbers of a block.
// Included once per instruction set, inside that set's namespace.
#pragma once

#include "noise.h"
#include "segment.h"
#include "philox.h"

namespace hosfl {
namespace HOSFL_ISA {
namespace {

// The four words of some columns of one block.
struct BlockWords {
  // The rows of words do not lie 4 KB apart, where those of some records would push each other out of the cache.
  alignas(64) uint32_t word[4][COLS + 16];

  void fill(uint64_t seed, uint64_t block, uint32_t stream, uint32_t tag, int64_t col, int64_t count) {
    philox_columns(seed, block, stream, tag, col, count, word[0], word[1], word[2], word[3]);
  }
};

// A run of elements inside one block: offset = row * COLS + col of the first, and where they lie in the segment.
struct Run {
  uint64_t block;  // first Philox block: block index * COLS
  int64_t offset, count, at;

  int64_t row() const { return offset / COLS; }
  int64_t col() const { return offset % COLS; }
  bool one_row() const { return col() + count <= COLS; }
  // The columns touched: those of the run where it stays in one row, otherwise all.
  int64_t first_col() const { return one_row() ? col() : 0; }
  int64_t cols() const { return one_row() ? count : COLS; }
};

template <int64_t ROWS, typename Body>
void each_block(uint64_t start, int64_t n, Body body) {
  constexpr int64_t size = ROWS * COLS;
  for (int64_t at = 0; at < n;) {
    const uint64_t i = start + uint64_t(at);
    const int64_t offset = int64_t(i % size), left = size - offset;
    const int64_t count = left < n - at ? left : n - at;
    body(Run{i / size * COLS, offset, count, at});
    at += count;
  }
}

// Calls body(row, col, count, at) for every row of a run.
template <typename Body>
void each_row(const Run& run, Body body) {
  for (int64_t done = 0; done < run.count;) {
    const int64_t offset = run.offset + done, left = COLS - offset % COLS;
    const int64_t count = left < run.count - done ? left : run.count - done;
    body(offset / COLS, offset % COLS, count, run.at + done);
    done += count;
  }
}

// The 16 rounding bits of one row of a segment at a time; words are made when a row enters a new block of 8,
// or when the seed is another.
struct RoundingBits {
  BlockWords words;
  uint64_t block = ~uint64_t(0), of = 0;  // the seed
  int64_t col, count;                     // the columns that the segment touches

  explicit RoundingBits(const Segment& segment) : col(int64_t(segment.start % COLS)), count(segment.n) {
    if (col + count > COLS) col = 0, count = COLS;
  }

  struct Row {
    const uint32_t* word;
    int shift;
  };

  // `i` is an element of the row that is wanted.
  Row row(uint64_t i, uint64_t seed, uint32_t stream) {
    const uint64_t wanted = i / (ROUNDING_ROWS * COLS) * COLS;
    if (wanted != block || seed != of) {
      words.fill(seed, wanted, stream, TAG_ROUNDING, col, count);
      block = wanted, of = seed;
    }
    const int r = int(i / COLS % ROUNDING_ROWS);
    return {words.word[r / 2], 16 * (r % 2)};
  }
};

}  // namespace
}  // namespace HOSFL_ISA
}  // namespace hosfl
