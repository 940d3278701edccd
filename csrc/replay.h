// replay_: many records in one pass over the weights. Every rounding happens as if one record came after another.
#pragma once

#include "perturb.h"
#include "tile.h"

namespace hosfl {
namespace HOSFL_ISA {
namespace {

// y = (y + added) rounded to storage, for one row of a tile.
template <typename Storage, Rounding R, typename Added>
HOSFL_INLINE void add_and_round(float* y, Added added, const uint32_t* random, int random_shift) {
  for (int64_t i = 0; i < TILE; ++i) {
    const uint32_t bits = R == Rounding::nearest ? 0 : (random[i] >> random_shift) & 0xFFFFu;
    y[i] = Storage::template rounded<R>(y[i] + added(i), bits);
  }
}

// Signs: a row of the tile stays in registers while the records of a chunk go by.
template <typename Storage, Rounding R>
HOSFL_LOOP void replay_segment(Rademacher, const Segment& segment, const Record* records, int64_t total) {
  auto* const x = static_cast<typename Storage::Cell*>(segment.data);
  TileWords signs, random;
  TileRows<RADEMACHER_ROWS> rows;
  float s[RECORDS];
  each_tile<RADEMACHER_ROWS>(segment, [&](const Run& run, int64_t tile) {
    rows.load<Storage>(x, run, tile);
    for (int64_t done = 0; done < total; done += RECORDS) {
      const Record* const chunk = records + done;
      const int64_t count = total - done < RECORDS ? total - done : RECORDS;
      for (int64_t r = 0; r < count; ++r) {
        signs.fill(r, chunk[r].seed, run.block + uint64_t(tile), segment.stream, TAG_RADEMACHER);
        s[r] = chunk[r].coefficient * segment.factor;
      }
      uint64_t filled = ~uint64_t(0);  // the rounding block whose words are in `random`
      each_pair(run, [&](int64_t pair) {
        if (std::is_same<Storage, Float32>::value) {
          add_signs_to_pair(false, rows.y + pair, s, signs.word[pair / 32], count, pair);
          return;
        }
        for (int64_t row = pair; row < pair + 2; ++row) {
          const RoundingPlace place(run, RADEMACHER_ROWS, row, tile);
          if (R == Rounding::stochastic && place.block != filled) {
            for (int64_t r = 0; r < count; ++r) {
              random.fill(r, chunk[r].rounding_seed, place.block, segment.stream, TAG_ROUNDING);
            }
            filled = place.block;
          }
          for (int64_t r = 0; r < count; ++r) {
            const uint32_t s_bits = bits_of(s[r]);
            const uint32_t* const word = signs.word[row / 32][r];
            const int shift = int(31 - row % 32);
            const auto added = [=](int64_t i) { return signed_by(s_bits, word[i], shift); };
            add_and_round<Storage, R>(rows.y[row], added, place.words(random, r), place.shift());
          }
        }
      });
    }
    rows.store<Storage>(x, run, tile);
  });
}

// Normal numbers: the four rows of a block stay in cache while the records go by.
template <typename Storage, Rounding R>
HOSFL_LOOP void replay_segment(Gaussian, const Segment& segment, const Record* records, int64_t total) {
  auto* const x = static_cast<typename Storage::Cell*>(segment.data);
  TileWords random;  // of one record at a time: index 0
  TileNormals normals;
  TileRows<GAUSSIAN_ROWS> rows;
  each_tile<GAUSSIAN_ROWS>(segment, [&](const Run& run, int64_t tile) {
    rows.load<Storage>(x, run, tile);
    for (int64_t r = 0; r < total; ++r) {
      normals.fill(records[r].seed, run.block + uint64_t(tile), segment.stream);
      if (R == Rounding::stochastic) {  // a Gaussian block is half a rounding block
        const uint64_t block = RoundingPlace(run, GAUSSIAN_ROWS, 0, tile).block;
        random.fill(0, records[r].rounding_seed, block, segment.stream, TAG_ROUNDING);
      }
      const float s = records[r].coefficient * segment.factor;
      each_pair(run, [&](int64_t pair) {
        for (int64_t row = pair; row < pair + 2; ++row) {
          const RoundingPlace place(run, GAUSSIAN_ROWS, row, tile);
          const float* const z = normals.z[row];
          add_and_round<Storage, R>(rows.y[row], [=](int64_t i) { return s * z[i]; }, place.words(random, 0),
                                    place.shift());
        }
      });
    }
    rows.store<Storage>(x, run, tile);
  });
}

// Up to so many records a block goes through perturb_ for each, in cache after the first: its rows are read as they lie,
// where a tile of 128 columns skips from row to row. Two records are what a client's probe moves by. The baseline set
// converts 2-byte cells for longer than memory takes, and a tile is converted once.
#if HOSFL_LANES >= 8
constexpr int64_t FEW = 16;
#else
constexpr int64_t FEW = 4;
#endif

void replay(const Segment& segment, const Record* records, int64_t count, bool stochastic) {
  if (segment.dist == Dist::rademacher && count <= FEW) {
    each_block<RADEMACHER_ROWS>(segment.start, segment.n, [&](const Run& run) {
      const Segment block = piece_of(segment, run.at, run.at + run.count);
      for (int64_t r = 0; r < count; ++r) perturb(block, records[r], stochastic);
    });
    return;
  }
  with_storage(segment.dtype, stochastic, [&](auto storage, auto rounding) {
    with_dist(segment.dist, [&](auto dist) {
      replay_segment<decltype(storage), decltype(rounding)::value>(dist, segment, records, count);
    });
  });
}

}  // namespace
}  // namespace HOSFL_ISA
}  // namespace hosfl
