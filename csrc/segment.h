// What an op works on: pieces of tensors that know where they lie in the noise, records, rounds of an update rule.
#pragma once

#include <cstdint>
#include <type_traits>

namespace hosfl {

enum class Dtype : int { float32 = 0, bfloat16 = 1, float16 = 2 };
enum class Dist : int { rademacher = 0, gaussian = 1 };

using Rademacher = std::integral_constant<Dist, Dist::rademacher>;
using Gaussian = std::integral_constant<Dist, Dist::gaussian>;

// Calls run(Rademacher{}) or run(Gaussian{}): the one place where a distribution becomes a constant.
template <typename Run_>
static inline void with_dist(Dist dist, Run_ run) {
  switch (dist) {
    case Dist::rademacher:
      return run(Rademacher{});
    case Dist::gaussian:
      return run(Gaussian{});
  }
}

// A contiguous piece of one logical tensor: `n` cells at `data`, the first of them element `start`.
struct Segment {
  void* data;
  int64_t n;
  uint64_t start;
  uint32_t stream;
  float factor;  // a power of two
  Dtype dtype;
  Dist dist;
  float* moments[2] = {nullptr, nullptr};  // what an update rule keeps of each cell
};

static inline int64_t size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

// Its cells [from, to).
static inline Segment piece_of(const Segment& segment, int64_t from, int64_t to) {
  Segment piece = segment;
  piece.data = static_cast<char*>(segment.data) + from * size_of(segment.dtype);
  for (float*& moment : piece.moments) moment += moment ? from : 0;
  piece.n = to - from;
  piece.start = segment.start + uint64_t(from);
  return piece;
}

// One record: x += coefficient * factor * z(seed).
struct Record {
  uint64_t seed;
  float coefficient;
  uint64_t rounding_seed;
};

enum class Rule : int { sgd = 0, momentum = 1, adamw = 2 };

// What a round's step needs beside its directions.
struct Step {
  float rate, keep, root;
  uint64_t rounding_seed;
};

// Rounds of an update rule; `records` holds the directions of the first round, then those of the next.
struct Update {
  Rule rule;
  float constants[5];  // as spec.py's `direction` lists them
  const Record* records;
  const Step* steps;
  int64_t rounds, directions;
};

}  // namespace hosfl
