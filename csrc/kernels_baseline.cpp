// The kernels for the instruction set that every machine of the architecture has.
#include <type_traits>
#if defined(__SSE2__)
#include <emmintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define HOSFL_ISA baseline
#include "ops.h"
