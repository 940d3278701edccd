// The kernels for the instruction set that every machine of the architecture has.
#include <type_traits>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#define HOSFL_ISA baseline
#include "project.h"
#include "replay.h"
#include "update.h"

const hosfl::Ops hosfl::baseline::ops = {"baseline", philox, noise, perturb, replay, update, project};
