// The kernels for processors with AVX-512 and VNNI; linears multiply 16-bit integers.
#if defined(__x86_64__)

#define VECTOR_BITS 512
#define INT16_GEMM 1

#include "../types.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")
#include "../functions.h"
#pragma GCC pop_options

const Kernels vnni_kernels{functions, FUNCTION_COUNT, true};

#endif
