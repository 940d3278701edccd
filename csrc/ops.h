// The table of ops, one for each instruction set: the bindings call through it, and the files kernels_*.cpp fill it.
#pragma once

#include "segment.h"

namespace hosfl {

struct Ops {
  const char* isa;
  void (*philox)(uint64_t key, uint64_t block, uint32_t stream, uint32_t tag, uint32_t words[4]);
  void (*noise)(const Segment& out, uint64_t seed);
  void (*replay)(const Segment& segment, const Record* records, int64_t count, bool stochastic);
  void (*update)(const Segment& segment, const Update& update, bool stochastic);
  // scalars[r], 0 before, becomes the sum over a segment that lies in one block of 128 x 1024.
  void (*project)(const Segment& block, const uint64_t* seeds, int64_t count, double* scalars);
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

#ifdef HOSFL_ISA  // in kernels_*.cpp: the loops of every op, for the set of that name
#include "project.h"
#include "replay.h"
#include "update.h"

#define HOSFL_STRING(name) #name
#define HOSFL_NAME(name) HOSFL_STRING(name)
const hosfl::Ops hosfl::HOSFL_ISA::ops = {HOSFL_NAME(HOSFL_ISA), philox, noise, replay, update, project};
#endif
