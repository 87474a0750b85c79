/* A simulated GPU that takes no time: stubs of the CUDA and cuBLAS functions that torch and Triton
 * call.
 *
 * Kernels do not run. Device memory consists of addresses only: data copied to it is discarded, and
 * copies from it give zeros. Memory is counted. One stream at a time can be captured; calls that
 * CUDA forbids during a capture in global mode fail. null_gpu.py builds and loads this file.
 */
#include <driver_types.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <vector_types.h>

#define NO_OP(name) \
    int name(void) { return 0; }
#define FREES_OBJECT(name)   \
    int name(void *object) { \
        free(object);        \
        return 0;            \
    }
#define COUNT(array) (sizeof(array) / sizeof *(array))

typedef struct { /* values of an H200 */
    enum cudaDeviceAttr attribute;
    int value;
} Attribute;
static const Attribute ATTRIBUTES[] = {
    {cudaDevAttrMultiProcessorCount, 132},
    {cudaDevAttrComputeCapabilityMajor, 9},
    {cudaDevAttrComputeCapabilityMinor, 0},
    {cudaDevAttrWarpSize, 32},
    {cudaDevAttrMaxThreadsPerBlock, 1024},
    {cudaDevAttrMaxBlockDimX, 1024},
    {cudaDevAttrMaxBlockDimY, 1024},
    {cudaDevAttrMaxBlockDimZ, 64},
    {cudaDevAttrMaxGridDimX, 2147483647},
    {cudaDevAttrMaxGridDimY, 65535},
    {cudaDevAttrMaxGridDimZ, 65535},
    {cudaDevAttrMaxThreadsPerMultiProcessor, 2048},
    {cudaDevAttrMaxBlocksPerMultiprocessor, 32},
    {cudaDevAttrMaxSharedMemoryPerBlock, 49152},
    {cudaDevAttrMaxSharedMemoryPerBlockOptin, 232448},
    {cudaDevAttrMaxSharedMemoryPerMultiprocessor, 233472},
    {cudaDevAttrMaxRegistersPerBlock, 65536},
    {cudaDevAttrMaxRegistersPerMultiprocessor, 65536},
    {cudaDevAttrL2CacheSize, 62914560},
    {cudaDevAttrClockRate, 1980000},
    {cudaDevAttrMemoryClockRate, 3201000},
    {cudaDevAttrGlobalMemoryBusWidth, 6144},
    {cudaDevAttrUnifiedAddressing, 1},
    {cudaDevAttrConcurrentKernels, 1},
};
static const size_t MEMORY = 143771ul << 20;  /* bytes of the device */
static const size_t RESERVED = 600ul << 20;   /* bytes that CUDA itself uses */

static int attribute(enum cudaDeviceAttr wanted) {
    for (size_t i = 0; i < COUNT(ATTRIBUTES); i++)
        if (ATTRIBUTES[i].attribute == wanted) return ATTRIBUTES[i].value;
    return 0;
}

/* Errors, and calls that are forbidden during a capture. */
static __thread cudaError_t last_error;
static __thread enum cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;
static cudaStream_t capturing;
static enum cudaStreamCaptureMode capture_mode;
static unsigned long long captures;
static int is_invalidated; /* the current capture */

static cudaError_t failed(cudaError_t error) { return last_error = error; }

static cudaError_t forbidden_in_capture(const char *name) {
    if (!capturing || thread_mode == cudaStreamCaptureModeRelaxed ||
        capture_mode != cudaStreamCaptureModeGlobal)
        return cudaSuccess;
    fprintf(stderr, "null GPU: %s while a stream is captured\n", name);
    is_invalidated = 1;
    return failed(cudaErrorStreamCaptureUnsupported);
}
#define FORBIDDEN_IN_CAPTURE \
    if (forbidden_in_capture(__func__)) return last_error

/* Memory. */
typedef struct Block {
    char *start;
    size_t size;
    int is_device;
    struct Block *next;
} Block;
static Block *blocks;
static size_t used;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static cudaError_t allocate(void **where, size_t size, int is_device) {
    *where = 0;
    if (!size) return cudaSuccess;
    size = (size + 4095) / 4096 * 4096;
    int access = is_device ? PROT_NONE : PROT_READ | PROT_WRITE;
    void *start = mmap(0, size, access, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED) return failed(cudaErrorMemoryAllocation);
    Block *block = malloc(sizeof *block);
    pthread_mutex_lock(&lock);
    int fits = block && (!is_device || used + size + RESERVED <= MEMORY);
    if (fits) {
        *block = (Block){start, size, is_device, blocks};
        blocks = block;
        if (is_device) used += size;
    }
    pthread_mutex_unlock(&lock);
    if (!fits) {
        munmap(start, size);
        free(block);
        return failed(cudaErrorMemoryAllocation);
    }
    *where = start;
    return cudaSuccess;
}

static cudaError_t release(void *start) {
    pthread_mutex_lock(&lock);
    Block **link = &blocks;
    while (*link && (*link)->start != start) link = &(*link)->next;
    Block *block = *link;
    if (block) {
        *link = block->next;
        if (block->is_device) used -= block->size;
        munmap(block->start, block->size);
        free(block);
    }
    pthread_mutex_unlock(&lock);
    return block || !start ? cudaSuccess : failed(cudaErrorInvalidValue);
}

static enum cudaMemoryType kind_of(const void *pointer) {
    enum cudaMemoryType kind = cudaMemoryTypeUnregistered;
    const char *address = pointer;
    pthread_mutex_lock(&lock);
    for (Block *block = blocks; block; block = block->next)
        if (address >= block->start && address < block->start + block->size) {
            kind = block->is_device ? cudaMemoryTypeDevice : cudaMemoryTypeHost;
            break;
        }
    pthread_mutex_unlock(&lock);
    return kind;
}

static int is_device(const void *pointer) { return kind_of(pointer) == cudaMemoryTypeDevice; }

cudaError_t cudaMalloc(void **where, size_t size) {
    FORBIDDEN_IN_CAPTURE;
    return allocate(where, size, 1);
}
cudaError_t cudaFree(void *start) {
    FORBIDDEN_IN_CAPTURE;
    return release(start);
}
cudaError_t cudaHostAlloc(void **where, size_t size, unsigned flags) {
    FORBIDDEN_IN_CAPTURE;
    return allocate(where, size, 0);
}
cudaError_t cudaFreeHost(void *start) { return release(start); }
cudaError_t cudaMemGetInfo(size_t *available, size_t *total) {
    *available = (*total = MEMORY) - RESERVED - used;
    return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *found, const void *pointer) {
    memset(found, 0, sizeof *found);
    found->devicePointer = (void *)pointer;
    found->type = kind_of(pointer);
    return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(
    void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
    if (is_device(to)) return cudaSuccess;
    if (is_device(from)) memset(to, 0, size);
    else memcpy(to, from, size);
    return cudaSuccess;
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
    FORBIDDEN_IN_CAPTURE;
    return cudaMemcpyAsync(to, from, size, kind, 0);
}
cudaError_t cudaMemcpy2DAsync(void *to, size_t step, const void *from, size_t from_step,
    size_t width, size_t height, enum cudaMemcpyKind kind, cudaStream_t stream) {
    for (size_t row = 0; row < height; row++)
        cudaMemcpyAsync((char *)to + row * step, (char *)from + row * from_step, width, kind, 0);
    return cudaSuccess;
}
cudaError_t cudaGetSymbolAddress(void **where, const void *symbol) {
    static void *memory;
    if (!memory) allocate(&memory, 1 << 20, 1);
    *where = memory;
    return cudaSuccess;
}
NO_OP(cudaMemset)
NO_OP(cudaMemsetAsync)
NO_OP(cudaMemcpyToSymbol)

/* The device. */
static int one(int *count) {
    *count = 1;
    return 0;
}
static int zero(int *value) {
    *value = 0;
    return 0;
}
static int version(int *value) {
    *value = 13000;
    return 0;
}
int cudaGetDeviceCount(int *count) { return one(count); }
int cudaGetDevice(int *device) { return zero(device); }
int cudaDriverGetVersion(int *found) { return version(found); }
int cudaRuntimeGetVersion(int *found) { return version(found); }
int cudaDeviceCanAccessPeer(int *can, int device, int peer) { return zero(can); }
int cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr wanted, int device) {
    *value = attribute(wanted);
    return 0;
}
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *found, int device) {
    memset(found, 0, sizeof *found);
    strcpy(found->name, "null GPU");
    found->totalGlobalMem = MEMORY;
    found->major = attribute(cudaDevAttrComputeCapabilityMajor);
    found->minor = attribute(cudaDevAttrComputeCapabilityMinor);
    found->multiProcessorCount = attribute(cudaDevAttrMultiProcessorCount);
    found->warpSize = attribute(cudaDevAttrWarpSize);
    found->maxThreadsPerBlock = attribute(cudaDevAttrMaxThreadsPerBlock);
    found->maxThreadsPerMultiProcessor = attribute(cudaDevAttrMaxThreadsPerMultiProcessor);
    found->maxBlocksPerMultiProcessor = attribute(cudaDevAttrMaxBlocksPerMultiprocessor);
    found->sharedMemPerBlock = attribute(cudaDevAttrMaxSharedMemoryPerBlock);
    found->sharedMemPerBlockOptin = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    found->sharedMemPerMultiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    found->regsPerBlock = attribute(cudaDevAttrMaxRegistersPerBlock);
    found->regsPerMultiprocessor = attribute(cudaDevAttrMaxRegistersPerMultiprocessor);
    found->l2CacheSize = attribute(cudaDevAttrL2CacheSize);
    for (int i = 0; i < 3; i++) { /* the attributes of x, y and z are consecutive */
        found->maxThreadsDim[i] = attribute(cudaDevAttrMaxBlockDimX + i);
        found->maxGridSize[i] = attribute(cudaDevAttrMaxGridDimX + i);
    }
    return cudaSuccess;
}
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    *greatest = -5;
    return zero(least);
}
int cudaDeviceGetPCIBusId(char *name, int size, int device) {
    snprintf(name, size, "0000:00:00.0");
    return 0;
}
cudaError_t cudaGetLastError(void) {
    cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}
cudaError_t cudaPeekAtLastError(void) { return last_error; }
const char *cudaGetErrorString(cudaError_t error) {
    static __thread char text[32];
    snprintf(text, sizeof text, "error %d of the null GPU", error);
    return error == cudaErrorMemoryAllocation ? "out of memory" : text;
}
const char *cudaGetErrorName(cudaError_t error) { return cudaGetErrorString(error); }
NO_OP(cudaSetDevice)
NO_OP(cudaProfilerStart)
NO_OP(cudaProfilerStop)

/* Streams, events and graphs: every operation completes immediately. */
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
    *stream = malloc(1);
    return cudaSuccess;
}
int cudaStreamGetPriority(cudaStream_t stream, int *priority) { return zero(priority); }
cudaError_t cudaStreamQuery(cudaStream_t stream) {
    FORBIDDEN_IN_CAPTURE;
    return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    FORBIDDEN_IN_CAPTURE;
    return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize(void) {
    FORBIDDEN_IN_CAPTURE;
    return cudaSuccess;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, void (*call)(void *), void *data) {
    call(data);
    return cudaSuccess;
}
FREES_OBJECT(cudaStreamDestroy)
NO_OP(cudaStreamWaitEvent)

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
    *event = calloc(1, sizeof(double));
    return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }
FREES_OBJECT(cudaEventDestroy)
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    *(double *)event = now.tv_sec * 1e3 + now.tv_nsec * 1e-6;
    return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
    return cudaEventRecord(event, stream);
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
    FORBIDDEN_IN_CAPTURE;
    return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    FORBIDDEN_IN_CAPTURE;
    return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t start, cudaEvent_t end) {
    float elapsed = *(double *)end - *(double *)start;
    *ms = elapsed > 1e-3f ? elapsed : 1e-3f;
    return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) {
    enum cudaStreamCaptureMode before = thread_mode;
    thread_mode = *mode;
    *mode = before;
    return cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
    if (!stream || capturing) return failed(cudaErrorIllegalState);
    capturing = stream;
    capture_mode = mode;
    is_invalidated = 0;
    captures++;
    return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
    if (stream != capturing) return failed(cudaErrorIllegalState);
    capturing = 0;
    *graph = is_invalidated ? 0 : malloc(1);
    return is_invalidated ? failed(cudaErrorStreamCaptureInvalidated) : cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    *status = !capturing || stream != capturing ? cudaStreamCaptureStatusNone
              : is_invalidated                  ? cudaStreamCaptureStatusInvalidated
                                                : cudaStreamCaptureStatusActive;
    return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status,
    unsigned long long *id, cudaGraph_t *graph, const cudaGraphNode_t **nodes, const void **edges,
    size_t *count) {
    if (id) *id = captures;
    if (graph) *graph = 0;
    if (count) *count = 0;
    return cudaStreamIsCapturing(stream, status);
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count) {
    *count = 1; /* not empty */
    return cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(
    cudaGraphExec_t *created, cudaGraph_t graph, unsigned long long flags) {
    *created = malloc(1);
    return cudaSuccess;
}
FREES_OBJECT(cudaGraphDestroy)
FREES_OBJECT(cudaGraphExecDestroy)
NO_OP(cudaGraphLaunch)

/* Kernels: torch launches them through the runtime API, Triton through the driver API. */
static __thread struct {
    dim3 grid, block;
    size_t shared;
    void *stream;
} pushed;
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
    pushed.grid = grid, pushed.block = block, pushed.shared = shared, pushed.stream = stream;
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void **stream) {
    *grid = pushed.grid, *block = pushed.block, *shared = pushed.shared, *stream = pushed.stream;
    return cudaSuccess;
}
cudaError_t __cudaGetKernel(void **kernel, const void *function) {
    *kernel = (void *)function;
    return cudaSuccess;
}
void **__cudaRegisterFatBinary(void *binary) {
    static void *handle[1];
    return handle;
}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *found, const void *function) {
    memset(found, 0, sizeof *found);
    found->maxThreadsPerBlock = 1024, found->numRegs = 64;
    found->ptxVersion = found->binaryVersion = 90;
    return cudaSuccess;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int *count, const void *function, int threads, size_t shared, unsigned flags) {
    *count = 2;
    return 0;
}
NO_OP(__cudaInitModule)
NO_OP(__cudaRegisterFatBinaryEnd)
NO_OP(__cudaRegisterFunction)
NO_OP(__cudaRegisterVar)
NO_OP(__cudaUnregisterFatBinary)
NO_OP(__cudaLaunchKernel)
NO_OP(cudaLaunchKernel)
NO_OP(cudaLaunchKernelExC)
NO_OP(cudaFuncSetAttribute)

static int handle(void **where) {
    static char object;
    *where = &object;
    return 0;
}
int cuDeviceGet(int *device, int index) { return zero(device); }
int cuDeviceGetCount(int *count) { return one(count); }
int cuDriverGetVersion(int *found) { return version(found); }
int cuDeviceGetAttribute(int *value, enum cudaDeviceAttr wanted, int device) {
    return cudaDeviceGetAttribute(value, wanted, device);
}
int cuGetErrorString(int error, const char **text) {
    *text = cudaGetErrorString(error);
    return 0;
}
int cuCtxGetCurrent(void **context) { return handle(context); }
int cuDevicePrimaryCtxRetain(void **context, int device) { return handle(context); }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *is_active) {
    *flags = 0;
    return one(is_active);
}
int cuModuleLoad(void **module, const char *file) { return handle(module); }
int cuModuleLoadData(void **module, const void *image) { return handle(module); }
int cuModuleGetFunction(void **function, void *module, const char *name) { return handle(function); }
int cuFuncGetAttribute(int *value, int wanted, void *function) {
    *value = wanted == 0 ? 1024 : 0; /* 0: maximum threads per block */
    return 0;
}
int cuPointerGetAttribute(const void **found, int wanted, const void *pointer) {
    *found = pointer; /* the device address */
    return 0;
}
NO_OP(cuInit)
NO_OP(cuCtxGetLimit)
NO_OP(cuCtxSetCurrent)
NO_OP(cuCtxSetLimit)
NO_OP(cuModuleUnload)
NO_OP(cuFuncSetAttribute)
NO_OP(cuFuncSetCacheConfig)
NO_OP(cuLaunchKernel)
NO_OP(cuLaunchKernelEx)
NO_OP(cuOccupancyMaxActiveClusters)
NO_OP(cuTensorMapEncodeTiled)

int cuGetProcAddress_v2(const char *name, void **function, int cuda, size_t flags, int *status) {
    *function = dlsym(RTLD_DEFAULT, name);
    if (status) *status = !*function;
    return *function ? 0 : 500; /* not found */
}
int cuGetProcAddress(const char *name, void **function, int cuda, size_t flags) {
    return cuGetProcAddress_v2(name, function, cuda, flags, 0);
}
int cudaGetDriverEntryPointByVersion(
    const char *name, void **function, unsigned cuda, size_t flags, int *status) {
    return cuGetProcAddress_v2(name, function, cuda, flags, status);
}

/* cuBLAS. */
int cublasCreate_v2(void **created) { return handle(created); }
int cublasGetMathMode(void *blas, int *mode) { return zero(mode); }
int cublasGetPointerMode_v2(void *blas, int *mode) { return zero(mode); }
int cublasLtMatmulDescCreate(void **created) { return handle(created); }
int cublasLtMatrixLayoutCreate(void **created) { return handle(created); }
int cublasLtMatmulPreferenceCreate(void **created) { return handle(created); }
int cublasLtMatmulAlgoGetHeuristic(void *blas, void *product, void *a, void *b, void *c, void *d,
    void *preference, int wanted, void *results, int *count) {
    return one(count);
}
NO_OP(cublasDestroy_v2)
NO_OP(cublasSetStream_v2)
NO_OP(cublasSetWorkspace_v2)
NO_OP(cublasSetMathMode)
NO_OP(cublasSetPointerMode_v2)
NO_OP(cublasGemmEx)
NO_OP(cublasGemmStridedBatchedEx)
NO_OP(cublasSgemm_v2)
NO_OP(cublasSgemmStridedBatched)
NO_OP(cublasLtMatmul)
NO_OP(cublasLtMatmulDescDestroy)
NO_OP(cublasLtMatmulDescSetAttribute)
NO_OP(cublasLtMatrixLayoutDestroy)
NO_OP(cublasLtMatrixLayoutSetAttribute)
NO_OP(cublasLtMatmulPreferenceDestroy)
NO_OP(cublasLtMatmulPreferenceSetAttribute)
