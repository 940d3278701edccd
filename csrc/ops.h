// The ops as the bindings see them: pointers and sizes, one table of functions per instruction set.
#pragma once

#include <cstdint>

namespace hosfl {

enum class Dtype : int { float32 = 0, bfloat16 = 1, float16 = 2 };
enum class Dist : int { rademacher = 0, gaussian = 1 };

// A contiguous piece of one logical tensor: `n` cells at `data`, the first of them element `start`.
struct Segment {
  void* data;
  int64_t n;
  uint64_t start;
  uint32_t stream;
  float factor;  // a power of two
  Dtype dtype;
  float* moments[2] = {nullptr, nullptr};  // what an update rule keeps of each cell
};

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

struct Ops {
  const char* isa;
  void (*philox)(uint64_t key, uint64_t block, uint32_t stream, uint32_t tag, uint32_t words[4]);
  void (*noise)(float* out, int64_t n, uint64_t seed, uint32_t stream, uint64_t start, Dist dist);
  void (*perturb)(const Segment& segment, const Record& record, Dist dist, bool stochastic);
  void (*replay)(const Segment& segment, const Record* records, int64_t count, Dist dist, bool stochastic);
  void (*update)(const Segment& segment, const Update& update, Dist dist, bool stochastic);
  // scalars[r], 0 before, becomes the sum over a segment that lies in one block of 128 x 1024.
  void (*project)(const Segment& block, const uint64_t* seeds, int64_t count, Dist dist, double* scalars);
};

namespace baseline {
extern const Ops ops;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Ops ops;
}
namespace avx512 {
extern const Ops ops;
}
#endif

}  // namespace hosfl
