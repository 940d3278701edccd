// The kernels for AVX-512 (x86-64-v4). The system headers come before the pragma, so that no inline function of theirs
// is compiled for a machine that may not be there.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("arch=x86-64-v4"))), apply_to = function)
#else
#pragma GCC target("arch=x86-64-v4")
#endif
#define HOSFL_ISA avx512
#define HOSFL_LANES 16
#include "project.h"
#include "replay.h"
#include "update.h"

const hosfl::Ops hosfl::avx512::ops = {"avx512", philox, noise, perturb, replay, update, project};
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
