// What one CUDA thread holds of a tensor, and the words that it makes: V neighbouring columns of ROWS rows, in
// registers. No value crosses threads. Plain C++ on one element at a time, so that any compiler can run it.
#pragma once

#include "rounding.h"
#include "rules.h"

#ifdef __CUDACC__
#define HOSFL_UNROLL _Pragma("unroll")
#else
#define HOSFL_UNROLL
#endif

namespace hosfl {
namespace cuda {

constexpr int THREADS = 128;  // of a block

// Philox4x32-10 of one column; see philox.h.
HOSFL_INLINE void column_words(uint64_t seed, uint64_t block, uint32_t stream, uint32_t tag, uint32_t (&word)[4]) {
  uint32_t c0 = uint32_t(block), c1 = uint32_t(block >> 32), c2 = stream, c3 = tag;
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  HOSFL_UNROLL
  for (int round = 0; round < 10; ++round) {
    const uint64_t m0 = uint64_t(c0) * 0xD2511F53u, m1 = uint64_t(c2) * 0xCD9E8D57u;
    c0 = uint32_t(m1 >> 32) ^ c1 ^ k0;
    c1 = uint32_t(m1);
    c2 = uint32_t(m0 >> 32) ^ c3 ^ k1;
    c3 = uint32_t(m0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  word[0] = c0, word[1] = c1, word[2] = c2, word[3] = c3;
}

template <typename Cell, int V>
struct alignas(V * sizeof(Cell)) Pack {
  Cell cell[V];
};

// Tiles are aligned to the blocks of the noise, not to the tensor: the first and last may lie partly beside it.
template <int ROWS_, int V_>
struct Tile {
  static constexpr int ROWS = ROWS_, V = V_;
  static_assert(ROWS % ROUNDING_ROWS == 0 && RADEMACHER_ROWS % ROWS == 0, "a tile has whole rounding blocks");
  static constexpr int BLOCKS_PER_ROW = COLS / (V * THREADS);
  using Values = float[ROWS][V];

  int64_t n, at;  // of the segment: its cells, and where the tile's first cell is (it may be negative)
  uint64_t row;   // the tile's first, in the tensor
  uint32_t col, stream;

  static int64_t blocks(const Segment& segment) {
    const uint64_t size = ROWS * COLS;
    return int64_t((segment.start % size + uint64_t(segment.n) + size - 1) / size) * BLOCKS_PER_ROW;
  }

  HOSFL_INLINE Tile locate(const Segment& segment, uint32_t block, uint32_t thread) {
    Tile tile;
    tile.n = segment.n;
    tile.stream = segment.stream;
    tile.row = segment.start / (ROWS * COLS) * ROWS + uint64_t(block / BLOCKS_PER_ROW) * ROWS;
    tile.col = (block % BLOCKS_PER_ROW * THREADS + thread) * V;
    tile.at = int64_t(tile.row * COLS + tile.col - segment.start);
    return tile;
  }
};

HOSFL_INLINE bool empty(int64_t at, int64_t n, int rows, int v) {
  return at >= n || at + (rows - 1) * COLS + v <= 0;
}

// Every cell exists, and the columns of a row can be read at once.
template <typename Cell, int ROWS, int V>
HOSFL_INLINE bool whole(const Tile<ROWS, V>& tile, const Cell* x) {
  return tile.at >= 0 && tile.at + (ROWS - 1) * COLS + V <= tile.n && uint64_t(x + tile.at) % (V * sizeof(Cell)) == 0;
}

// In one access also where the compiler would take a row's four stores for four.
template <typename Pack_>
HOSFL_INLINE void put(Pack_* at, const Pack_& pack) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(Pack_) == sizeof(uint4)) {
    uint4 bits;
    memcpy(&bits, &pack, sizeof bits);
    return __stwb(reinterpret_cast<uint4*>(at), bits);
  }
#endif
  *at = pack;
}

template <typename Storage, int ROWS, int V>
HOSFL_INLINE void load(const Tile<ROWS, V>& tile, const void* data, float (&y)[ROWS][V]) {
  using Cell = typename Storage::Cell;
  const Cell* const x = static_cast<const Cell*>(data);
  if (whole(tile, x)) {
    const auto* const packs = reinterpret_cast<const Pack<Cell, V>*>(x + tile.at);
    HOSFL_UNROLL
    for (int r = 0; r < ROWS; ++r) {
      const auto pack = packs[r * COLS / V];
      HOSFL_UNROLL
      for (int v = 0; v < V; ++v) y[r][v] = Storage::load(pack.cell[v]);
    }
  } else {
    HOSFL_UNROLL
    for (int r = 0; r < ROWS; ++r) {
      HOSFL_UNROLL
      for (int v = 0; v < V; ++v) {
        const int64_t i = tile.at + r * COLS + v;
        y[r][v] = i >= 0 && i < tile.n ? Storage::load(x[i]) : 0.0f;
      }
    }
  }
}

// The values are already rounded to storage, so this is exact.
template <typename Storage, int ROWS, int V>
HOSFL_INLINE void store(const Tile<ROWS, V>& tile, void* data, const float (&y)[ROWS][V]) {
  using Cell = typename Storage::Cell;
  Cell* const x = static_cast<Cell*>(data);
  if (whole(tile, x)) {
    auto* const packs = reinterpret_cast<Pack<Cell, V>*>(x + tile.at);
    HOSFL_UNROLL
    for (int r = 0; r < ROWS; ++r) {
      Pack<Cell, V> pack;
      HOSFL_UNROLL
      for (int v = 0; v < V; ++v) pack.cell[v] = Storage::template store<Rounding::nearest>(y[r][v], 0);
      put(packs + r * COLS / V, pack);
    }
  } else {
    HOSFL_UNROLL
    for (int r = 0; r < ROWS; ++r) {
      HOSFL_UNROLL
      for (int v = 0; v < V; ++v) {
        const int64_t i = tile.at + r * COLS + v;
        if (i >= 0 && i < tile.n) x[i] = Storage::template store<Rounding::nearest>(y[r][v], 0);
      }
    }
  }
}

// Calls body(row of the tile, column of the tile, s * z(seed)) for every cell.
template <Dist D, int ROWS, int V, typename Body>
HOSFL_INLINE void each_noise(const Tile<ROWS, V>& tile, uint64_t seed, float s, Body body) {
  HOSFL_UNROLL
  for (int v = 0; v < V; ++v) {
    uint32_t word[4];
    if (D == Dist::rademacher) {
      column_words(seed, tile.row / RADEMACHER_ROWS * COLS + tile.col + uint64_t(v), tile.stream, TAG_RADEMACHER, word);
      const int first = int(tile.row % RADEMACHER_ROWS);
      HOSFL_UNROLL
      for (int r = 0; r < ROWS; ++r) {
        // A word has 32 rows: a tile of 64 reads two of them, a smaller one a part of one.
        const int k = first / 32 + r / 32;
        const uint32_t signs = (k == 0 ? word[0] : k == 1 ? word[1] : k == 2 ? word[2] : word[3]) >> first % 32;
        body(r, v, signed_by(bits_of(s), signs, 31 - r % 32));
      }
    } else {
      HOSFL_UNROLL
      for (int r = 0; r < ROWS; r += GAUSSIAN_ROWS) {
        const uint64_t block = (tile.row + uint64_t(r)) / GAUSSIAN_ROWS * COLS + tile.col + uint64_t(v);
        column_words(seed, block, tile.stream, TAG_GAUSSIAN, word);
        float z[4];
        box_muller(word[0], word[1], z[0], z[1]);
        box_muller(word[2], word[3], z[2], z[3]);
        HOSFL_UNROLL
        for (int k = 0; k < 4; ++k) body(r + k, v, s * z[k]);
      }
    }
  }
}

// Every value rounded to storage.
template <typename Storage, Rounding R, int ROWS, int V>
HOSFL_INLINE void round_to_storage(const Tile<ROWS, V>& tile, uint64_t seed, float (&y)[ROWS][V]) {
  HOSFL_UNROLL
  for (int v = 0; v < V; ++v) {
    HOSFL_UNROLL
    for (int r = 0; r < ROWS; r += ROUNDING_ROWS) {
      uint32_t word[4] = {0, 0, 0, 0};
      if (R == Rounding::stochastic) {
        const uint64_t block = (tile.row + uint64_t(r)) / ROUNDING_ROWS * COLS + tile.col + uint64_t(v);
        column_words(seed, block, tile.stream, TAG_ROUNDING, word);
      }
      HOSFL_UNROLL
      for (int k = 0; k < ROUNDING_ROWS; ++k) {
        const uint32_t random = (word[k / 2] >> (16 * (k % 2))) & 0xFFFFu;
        y[r + k][v] = Storage::template rounded<R>(y[r + k][v], random);
      }
    }
  }
}

}  // namespace cuda
}  // namespace hosfl
