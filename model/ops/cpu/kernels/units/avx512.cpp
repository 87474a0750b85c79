// The kernels for processors with AVX-512, VNNI and BF16, and with AMX if dispatch.cpp enables it.
#if defined(__x86_64__)

#define VECTOR_BITS 512
#define INT16_GEMM 0

#include "../types.h"

#pragma GCC push_options
#pragma GCC target( \
    "avx2,fma,f16c,bmi2,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,amx-tile,amx-bf16,amx-int8")
#include "../functions.h"
#pragma GCC pop_options

const Kernels avx512_kernels{functions, FUNCTION_COUNT, false};

#endif
