#include <immintrin.h>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#pragma GCC target("avx2,bmi,bmi2,f16c")
#define HOSFL_ISA avx2
#define HOSFL_LANES 8
#include "philox.h"
namespace hosfl { namespace avx2 { void go(uint64_t s,uint64_t b,uint32_t t,int64_t n,float (*z)[1024]) { normal_columns(s,b,t,0,1024,z); } } }
