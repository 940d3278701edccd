// replay_: many records in one pass over the weights. A tile of columns stays in registers and cache while the
// records go by, so the weights cross the memory bus once, and every rounding happens as if one record came after
// another.
#pragma once

#include "perturb.h"

namespace hosfl {
namespace HOSFL_ISA {
namespace {

constexpr int64_t TILE = 64;    // columns of a tile
constexpr int64_t RECORDS = 32; // records whose words are in cache at once

// Words of RECORDS records for the TILE columns of a block: record-major, so that a row's inner loop is contiguous.
struct TileWords {
  alignas(64) uint32_t word[RECORDS][4][TILE];

  void fill(int64_t r, uint64_t seed, uint64_t block, uint32_t stream, uint32_t tag) {
    philox_columns(seed, block, stream, tag, 0, TILE, word[r][0], word[r][1], word[r][2], word[r][3]);
  }
};

// Where the rounding bits of a row of a tile are: the block of 8 rows, and the row in it.
struct RoundingPlace {
  uint64_t block;
  int64_t row;

  RoundingPlace(uint64_t element, int64_t tile)
      : block(element / (ROUNDING_ROWS * COLS) * COLS + uint64_t(tile)), row(int64_t(element / COLS % ROUNDING_ROWS)) {}

  RoundingPlace at_row(int64_t other) const {
    RoundingPlace place = *this;
    place.row = other;
    return place;
  }

  uint32_t bits(const uint32_t (*word)[TILE], int64_t i) const { return (word[row / 2][i] >> (16 * (row % 2))) & 0xFFFFu; }
};

// Calls body(run, tile) for every block and every tile of columns in it that the segment touches.
template <int64_t ROWS, typename Body>
void each_tile(const Segment& segment, Body body) {
  each_block<ROWS>(segment.start, segment.n, [&](const Run& run) {
    const int64_t end = run.first_col() + run.cols();
    for (int64_t tile = run.first_col() / TILE * TILE; tile < end; tile += TILE) body(run, tile);
  });
}

// A row of a tile in float32. Reads and writes the part [first, last) that belongs to the segment.
struct TileRow {
  alignas(64) float y[TILE];

  template <typename Storage>
  void load(const typename Storage::Cell* x, int64_t first, int64_t last) {
    if (last - first == TILE) {
      for (int64_t i = 0; i < TILE; ++i) y[i] = Storage::load(x[i]);
    } else {
      for (int64_t i = 0; i < TILE; ++i) y[i] = 0.0f;
      for (int64_t i = first; i < last; ++i) y[i] = Storage::load(x[i]);
    }
  }

  // The values are already rounded to storage, so this store is exact.
  template <typename Storage>
  void store(typename Storage::Cell* x, int64_t first, int64_t last) const {
    for (int64_t i = first; i < last; ++i) x[i] = Storage::template store<Rounding::nearest>(y[i], 0);
  }

  template <typename Storage, Rounding R>
  void round(int64_t i, float value, uint32_t random) {
    y[i] = Storage::load(Storage::template store<R>(value, random));
  }
};

// One row of a tile that belongs to a run: where its cells are, and which of its TILE columns are the run's.
struct TilePart {
  int64_t at;  // index in the segment of the tile's column 0; may lie before the segment's first cell
  int64_t first, last;

  TilePart(const Run& run, int64_t row, int64_t tile) {
    const int64_t left = row * COLS + tile, end = run.offset + run.count;
    at = run.at + left - run.offset;
    first = run.offset > left ? run.offset - left : 0;
    last = end - left < TILE ? end - left : TILE;
  }
};

// Signs: a row of the tile stays in registers while the records of a chunk go by.
template <typename Storage, Rounding R>
void replay_signs(const Segment& segment, const Record* records, int64_t total) {
  auto* const x = static_cast<typename Storage::Cell*>(segment.data);
  TileWords signs, random;
  each_tile<RADEMACHER_ROWS>(segment, [&](const Run& run, int64_t tile) {
    for (int64_t done = 0; done < total; done += RECORDS) {
      const Record* const chunk = records + done;
      const int64_t count = total - done < RECORDS ? total - done : RECORDS;
      for (int64_t r = 0; r < count; ++r) {
        signs.fill(r, chunk[r].seed, run.block + uint64_t(tile), segment.stream, TAG_RADEMACHER);
      }
      uint64_t filled = ~uint64_t(0);  // the rounding block whose words are in `random`
      for (int64_t row = run.row(); row * COLS < run.offset + run.count; ++row) {
        const TilePart part(run, row, tile);
        if (part.first >= part.last) continue;
        const RoundingPlace place(segment.start + uint64_t(part.at + part.first), tile);
        if (R == Rounding::stochastic && place.block != filled) {
          for (int64_t r = 0; r < count; ++r) {
            random.fill(r, chunk[r].rounding_seed, place.block, segment.stream, TAG_ROUNDING);
          }
          filled = place.block;
        }
        TileRow acc;
        acc.load<Storage>(x + part.at, part.first, part.last);
        for (int64_t r = 0; r < count; ++r) {
          const uint32_t s_bits = bits_of(chunk[r].coefficient * segment.factor);
          const uint32_t* const word = signs.word[r][row / 32];
          const int shift = int(31 - row % 32);
          for (int64_t i = 0; i < TILE; ++i) {
            acc.round<Storage, R>(i, acc.y[i] + signed_by(s_bits, word[i], shift),
                                  R == Rounding::nearest ? 0 : place.bits(random.word[r], i));
          }
        }
        acc.store<Storage>(x + part.at, part.first, part.last);
      }
    }
  });
}

// Normal numbers: the four rows of a block stay in cache while the records go by.
template <typename Storage, Rounding R>
void replay_normals(const Segment& segment, const Record* records, int64_t total) {
  auto* const x = static_cast<typename Storage::Cell*>(segment.data);
  TileWords words, random;  // of one record at a time: index 0
  each_tile<GAUSSIAN_ROWS>(segment, [&](const Run& run, int64_t tile) {
    TileRow acc[GAUSSIAN_ROWS];
    const int64_t first_row = run.row(), end_row = (run.offset + run.count + COLS - 1) / COLS;
    for (int64_t row = first_row; row < end_row; ++row) {
      const TilePart part(run, row, tile);
      acc[row].load<Storage>(x + part.at, part.first, part.last);
    }
    const RoundingPlace corner(segment.start + uint64_t(run.at), tile);
    for (int64_t r = 0; r < total; ++r) {
      words.fill(0, records[r].seed, run.block + uint64_t(tile), segment.stream, TAG_GAUSSIAN);
      if (R == Rounding::stochastic) random.fill(0, records[r].rounding_seed, corner.block, segment.stream, TAG_ROUNDING);
      const float s = records[r].coefficient * segment.factor;
      alignas(64) float z[GAUSSIAN_ROWS][TILE];
      for (int pair = 0; pair < 4; pair += 2) {
        for (int64_t i = 0; i < TILE; ++i) {
          box_muller(words.word[0][pair][i], words.word[0][pair + 1][i], z[pair][i], z[pair + 1][i]);
        }
      }
      for (int64_t row = first_row; row < end_row; ++row) {
        // A Gaussian block is half a rounding block: 4 of its 8 rows.
        const RoundingPlace place = corner.at_row(corner.row / GAUSSIAN_ROWS * GAUSSIAN_ROWS + row);
        for (int64_t i = 0; i < TILE; ++i) {
          acc[row].round<Storage, R>(i, acc[row].y[i] + s * z[row][i],
                                     R == Rounding::nearest ? 0 : place.bits(random.word[0], i));
        }
      }
    }
    for (int64_t row = first_row; row < end_row; ++row) {
      const TilePart part(run, row, tile);
      acc[row].store<Storage>(x + part.at, part.first, part.last);
    }
  });
}

void replay(const Segment& segment, const Record* records, int64_t count, Dist dist, bool stochastic) {
  with_storage(segment.dtype, stochastic, [&](auto storage, auto rounding) {
    using Storage = decltype(storage);
    constexpr Rounding R = decltype(rounding)::value;
    if (dist == Dist::rademacher) {
      replay_signs<Storage, R>(segment, records, count);
    } else {
      replay_normals<Storage, R>(segment, records, count);
    }
  });
}

}  // namespace
}  // namespace HOSFL_ISA
}  // namespace hosfl
