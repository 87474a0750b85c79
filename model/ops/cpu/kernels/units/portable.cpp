// The kernels for architectures other than x86-64, with the compiler's vector extension.
#if !defined(__x86_64__)

#define VECTOR_BITS 128
#define INT16_GEMM 0

#include "../functions.h"

const Kernels portable_kernels{functions, FUNCTION_COUNT, false};

#endif
