// update_: many rounds of an update rule in one pass over weights and moments. As spec.py's `update` defines it.
#pragma once

#include "rules.h"
#include "tile.h"

namespace hosfl {
namespace HOSFL_ISA {
namespace {

// y[i] += s[r] * z_r[i] for the rows `row` and `row` + 1, one record after another, or the same from y[i] = 0 on;
// `word` holds the records' words of that pair. Written with vectors so that the sums stay in registers: plain loops
// store every sum (0.056 instead of 0.040 ns per element and record).
HOSFL_INLINE void add_signs_to_pair(bool from_zero, float (*y)[TILE], const float* s, const uint32_t (*word)[TILE],
                                    int64_t count, int64_t row) {
  const int shift = int(30 - row % 32);  // brings the second row's bit to the top; the first row's is one further
  for (int64_t col = 0; col < TILE; col += GROUP) {
    F32 first[SIDE_BY_SIDE], second[SIDE_BY_SIDE];
#pragma GCC unroll 4
    for (int j = 0; j < SIDE_BY_SIDE; ++j) {
      first[j] = second[j] = F32{};
      if (from_zero) continue;
      memcpy(&first[j], y[0] + col + j * LANES, sizeof(F32));
      memcpy(&second[j], y[1] + col + j * LANES, sizeof(F32));
    }
    for (int64_t r = 0; r < count; ++r) {
      const F32 plus = s[r] - F32{}, minus = -plus;
#pragma GCC unroll 4
      for (int j = 0; j < SIDE_BY_SIDE; ++j) {
        U32 bits;
        memcpy(&bits, word[r] + col + j * LANES, sizeof bits);
        bits <<= shift;
        first[j] += (I32)(bits + bits) < 0 ? minus : plus;
        second[j] += (I32)bits < 0 ? minus : plus;
      }
    }
#pragma GCC unroll 4
    for (int j = 0; j < SIDE_BY_SIDE; ++j) {
      memcpy(y[0] + col + j * LANES, &first[j], sizeof(F32));
      memcpy(y[1] + col + j * LANES, &second[j], sizeof(F32));
    }
  }
}

// One round's step of one row, given the sum g over its directions. Products and sums in the order of spec.py.
template <typename Storage, Rounding R, Rule RULE>
HOSFL_INLINE void step_row(float* __restrict x, float* __restrict m, float* __restrict v, const float* __restrict g,
                           const float* k, const Step& step, const uint32_t* __restrict random, int random_shift) {
  float none = 0.0f;  // stands for a moment that the rule does not keep
  for (int64_t i = 0; i < TILE; ++i) {
    float& mine = moments_of(RULE) > 0 ? m[i] : none;
    const float y = stepped<RULE>(x[i], mine, moments_of(RULE) > 1 ? v[i] : none, g[i], k, step);
    const uint32_t bits = R == Rounding::nearest ? 0 : (random[i] >> random_shift) & 0xFFFFu;
    x[i] = Storage::template rounded<R>(y, bits);
  }
}

// Weights and moments of a tile, in this order.
template <typename Storage, Rule RULE, int64_t ROWS>
struct TileState {
  TileRows<ROWS> rows[1 + moments_of(RULE)];

  void load(const Segment& segment, const Run& run, int64_t tile) {
    rows[0].template load<Storage>(static_cast<const typename Storage::Cell*>(segment.data), run, tile);
    for (int k = 0; k < moments_of(RULE); ++k) {
      rows[1 + k].template load<Float32>(segment.moments[k], run, tile);
    }
  }

  void store(const Segment& segment, const Run& run, int64_t tile) {
    rows[0].template store<Storage>(static_cast<typename Storage::Cell*>(segment.data), run, tile);
    for (int k = 0; k < moments_of(RULE); ++k) {
      rows[1 + k].template store<Float32>(segment.moments[k], run, tile);
    }
  }

  template <Rounding R>
  void step(int64_t row, const float* g, const Update& update, const Step& step, const uint32_t* random, int shift) {
    step_row<Storage, R, RULE>(rows[0].y[row], moment(0, row), moment(1, row), g, update.constants, step, random,
                               shift);
  }

 private:
  float* moment(int k, int64_t row) { return k < moments_of(RULE) ? rows[1 + k].y[row] : nullptr; }
};

// Records whose words are in cache together: those of whole rounds, or a part of one round that has more than RECORDS.
struct Chunk {
  int64_t round, rounds;  // first, how many
  int64_t p, count;       // of every round the directions p .. p + count
  bool ends;              // the round's last direction is among them
};

template <typename Body>
void each_chunk(const Update& update, Body body) {
  const int64_t part = update.directions < RECORDS ? update.directions : RECORDS;
  const int64_t rounds = part ? RECORDS / part : RECORDS;
  for (int64_t round = 0; round < update.rounds; round += rounds) {
    const int64_t left = update.rounds - round;
    for (int64_t p = 0; p == 0 || p < update.directions; p += part) {
      const int64_t to_come = update.directions - p, count = part < to_come ? part : to_come;
      body(Chunk{round, rounds < left ? rounds : left, p, count, count == to_come});
      if (part == 0) break;
    }
  }
}

// Signs: two rows of the tile, weights and moments, stay close while the rounds of a chunk go by.
template <typename Storage, Rounding R, Rule RULE>
HOSFL_LOOP void update_segment(Rademacher, const Segment& segment, const Update& update) {
  TileWords signs, random;
  TileState<Storage, RULE, RADEMACHER_ROWS> state;
  TileRows<RADEMACHER_ROWS> sums;  // of a round's directions; one pair's, unless a round has more than one chunk
  const bool whole = update.directions <= RECORDS;
  float s[RECORDS];
  each_tile<RADEMACHER_ROWS>(segment, [&](const Run& run, int64_t tile) {
    state.load(segment, run, tile);
    each_chunk(update, [&](const Chunk& chunk) {
      for (int64_t k = 0; k < chunk.rounds; ++k) {
        for (int64_t p = 0; p < chunk.count; ++p) {
          const Record& record = update.records[(chunk.round + k) * update.directions + chunk.p + p];
          signs.fill(k * chunk.count + p, record.seed, run.block + uint64_t(tile), segment.stream, TAG_RADEMACHER);
          s[k * chunk.count + p] = record.coefficient * segment.factor;
        }
      }
      const Step* const steps = update.steps + chunk.round;
      uint64_t filled = ~uint64_t(0);  // the rounding block whose words are in `random`
      each_pair(run, [&](int64_t pair) {
        const RoundingPlace first(run, RADEMACHER_ROWS, pair, tile), second(run, RADEMACHER_ROWS, pair + 1, tile);
        if (R == Rounding::stochastic && chunk.ends && first.block != filled) {
          for (int64_t k = 0; k < chunk.rounds; ++k) {
            random.fill(k, steps[k].rounding_seed, first.block, segment.stream, TAG_ROUNDING);
          }
          filled = first.block;
        }
        float(*const g)[TILE] = sums.y + (whole ? 0 : pair);
        for (int64_t k = 0; k < chunk.rounds; ++k) {
          const int64_t r = k * chunk.count;
          add_signs_to_pair(chunk.p == 0, g, s + r, signs.word[pair / 32] + r, chunk.count, pair);
          if (chunk.ends) {
            state.template step<R>(pair, g[0], update, steps[k], first.words(random, k), first.shift());
            state.template step<R>(pair + 1, g[1], update, steps[k], second.words(random, k), second.shift());
          }
        }
      });
    });
    state.store(segment, run, tile);
  });
}

// Normal numbers: the four rows of a block stay in cache while all rounds go by.
template <typename Storage, Rounding R, Rule RULE>
HOSFL_LOOP void update_segment(Gaussian, const Segment& segment, const Update& update) {
  TileWords random;  // of one round at a time: index 0
  TileNormals normals;
  TileState<Storage, RULE, GAUSSIAN_ROWS> state;
  each_tile<GAUSSIAN_ROWS>(segment, [&](const Run& run, int64_t tile) {
    state.load(segment, run, tile);
    const Record* record = update.records;
    for (const Step* step = update.steps; step < update.steps + update.rounds; ++step) {
      TileRows<GAUSSIAN_ROWS> g = {};
      for (int64_t p = 0; p < update.directions; ++p, ++record) {
        normals.fill(record->seed, run.block + uint64_t(tile), segment.stream);
        const float s = record->coefficient * segment.factor;
        for (int64_t row = 0; row < GAUSSIAN_ROWS; ++row) {
          for (int64_t i = 0; i < TILE; ++i) g.y[row][i] += s * normals.z[row][i];
        }
      }
      if (R == Rounding::stochastic) {  // a Gaussian block is half a rounding block
        const uint64_t block = RoundingPlace(run, GAUSSIAN_ROWS, 0, tile).block;
        random.fill(0, step->rounding_seed, block, segment.stream, TAG_ROUNDING);
      }
      each_pair(run, [&](int64_t pair) {
        for (int64_t row = pair; row < pair + 2; ++row) {
          const RoundingPlace place(run, GAUSSIAN_ROWS, row, tile);
          state.template step<R>(row, g.y[row], update, *step, place.words(random, 0), place.shift());
        }
      });
    }
    state.store(segment, run, tile);
  });
}

void update(const Segment& segment, const Update& update, bool stochastic) {
  with_storage(segment.dtype, stochastic, [&](auto storage, auto rounding) {
    with_rule(update.rule, [&](auto rule) {
      with_dist(segment.dist, [&](auto dist) {
        update_segment<decltype(storage), decltype(rounding)::value, decltype(rule)::value>(dist, segment, update);
      });
    });
  });
}

}  // namespace
}  // namespace HOSFL_ISA
}  // namespace hosfl
