/* Kernels: their names are registered when torch's libraries load, and a launch is logged, not executed. */
#include "standin.h"

typedef struct {
  const void *function;
  const char *name;
} Kernel;

typedef struct {
  unsigned x, y, z;
} Size3;

static Kernel *kernels;
static size_t count, capacity;
static int sorted;

static int by_function(const void *a, const void *b) {
  const void *x = ((const Kernel *)a)->function, *y = ((const Kernel *)b)->function;
  return (x > y) - (x < y);
}

static const char *name_of(const void *function) {
  pthread_mutex_lock(&standin_lock);
  if (!sorted) qsort(kernels, count, sizeof(Kernel), by_function);
  sorted = 1;
  Kernel wanted = {function, 0};
  Kernel *found = bsearch(&wanted, kernels, count, sizeof(Kernel), by_function);
  pthread_mutex_unlock(&standin_lock);
  return found ? found->name : "unknown";
}

static cudaError_t launch(const void *function, Size3 grid, Size3 block, cudaStream_t stream) {
  const char *name = name_of(function);
  if (is_recording()) {
    char text[600];
    snprintf(text, sizeof text, "%u.%u.%u/%u %.540s", grid.x, grid.y, grid.z, block.x * block.y * block.z, name);
    record("kernel", text, stream);
  }
  enqueue(name, stream);
  return cudaSuccess;
}

/* A launch of Triton, or of a library that is not run, reported from Python. */
EXPORT void standin_launch(const char *name, cudaStream_t stream) {
  record("kernel", name, stream);
  enqueue(name, stream);
}

/* ---- registration, called by initialisers that nvcc generates ---- */
void **__cudaRegisterFatBinary(void *binary) {
  static void *handle[4];
  return handle;
}
void __cudaRegisterFatBinaryEnd(void **handle) {}
void __cudaUnregisterFatBinary(void **handle) {}
char __cudaInitModule(void **handle) { return 1; }
void __cudaRegisterVar(void **handle, char *host, char *address, const char *variable, int external, size_t size,
                       int constant, int global) {}
void __cudaRegisterManagedVar(void **handle, void **host, char *address, const char *variable, int external,
                              size_t size, int constant, int global) {}
void __cudaRegisterFunction(void **handle, const char *function, char *device_function, const char *name,
                            int thread_limit, void *thread, void *block, void *block_size, void *grid_size,
                            int *warp_size) {
  if (count == capacity) {
    capacity = 2 * capacity + 1024;
    kernels = realloc(kernels, capacity * sizeof(Kernel));
  }
  kernels[count++] = (Kernel){function, name};
  sorted = 0;
}

/* ---- launches ---- */
cudaError_t __cudaGetKernel(const void **kernel, const void *function) { return *kernel = function, cudaSuccess; }

cudaError_t __cudaLaunchKernel(const void *kernel, Size3 grid, Size3 block, void **arguments, size_t shared,
                               cudaStream_t stream) {
  return launch(kernel, grid, block, stream);
}

cudaError_t cudaLaunchKernelExC(const void *configuration, const void *function, void **arguments) {
  const struct {
    Size3 grid, block;
    size_t shared;
    cudaStream_t stream;
  } *values = configuration; /* the first fields of cudaLaunchConfig_t */
  return launch(function, values->grid, values->block, values->stream);
}

cudaError_t cudaLaunchHostFunc(cudaStream_t stream, void (*function)(void *), void *data) {
  record("cudaLaunchHostFunc", "", stream);
  enqueue("host function", stream);
  if (!is_capturing(stream)) function(data);
  return cudaSuccess;
}

/* ---- properties of a kernel ---- */
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *function) {
  memset(attributes, 0, sizeof *attributes);
  attributes->maxThreadsPerBlock = 1024;
  attributes->numRegs = 32;
  attributes->ptxVersion = attributes->binaryVersion = 90;
  attributes->maxDynamicSharedSizeBytes = 232448;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void *function, enum cudaFuncAttribute attribute, int value) {
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *function, int threads,
                                                                   size_t shared, unsigned flags) {
  return *blocks = threads ? 2048 / threads : 2, cudaSuccess;
}
cudaError_t cudaGetSymbolAddress(void **address, const void *symbol) { return *address = (void *)symbol, cudaSuccess; }
cudaError_t cudaMemcpyToSymbol(const void *symbol, const void *from, size_t size, size_t offset,
                               enum cudaMemcpyKind kind) {
  return cudaSuccess;
}

/* ---- functions of the driver, asked for by name ---- */
static int succeed(void) { return 0; }
cudaError_t cudaGetDriverEntryPointByVersion(const char *symbol, void **function, unsigned version,
                                             unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *result) {
  *function = (void *)succeed;
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
