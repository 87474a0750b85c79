// The kernels for processors with AVX-VNNI but without AVX-512, as Intel's for PCs and laptops are;
// linears multiply 16-bit integers.
#if defined(__x86_64__)

#define VECTOR_BITS 256
#define INT16_GEMM 1
#define AVX_VNNI 1

#include "../types.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2")
#include "../functions.h"
#pragma GCC pop_options

const Kernels avx_vnni_kernels{functions, FUNCTION_COUNT, true};

#endif
