// The kernels for AVX-512: bindings.cpp asks the processor for every feature named here. The system headers come before
// the pragma, so that no inline function of theirs is compiled for a machine that may not be there.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512cd,avx512dq,avx512vl,bmi,bmi2"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512cd,avx512dq,avx512vl,bmi,bmi2")
#endif
#define HOSFL_ISA avx512
#define HOSFL_LANES 16
#include "ops.h"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
