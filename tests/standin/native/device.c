/* The device: an H100 unless a program says otherwise. */
#include "standin.h"

size_t total_memory(void);

enum {
  MULTIPROCESSORS = 132,
  MAX_THREADS_PER_BLOCK = 1024,
  MAX_THREADS_PER_MULTIPROCESSOR = 2048,
  REGISTERS = 65536,
  SHARED_MEMORY_PER_BLOCK = 49152,
  SHARED_MEMORY_OPT_IN = 232448,
  SHARED_MEMORY_PER_MULTIPROCESSOR = 233472,
  RUNTIME_VERSION = 13000,
};
static int major = 9, minor = 0;
static char name[64] = "stand-in for an H100";

EXPORT void standin_set_capability(int new_major, int new_minor) {
  major = new_major;
  minor = new_minor;
  snprintf(name, sizeof name, "stand-in of compute capability %d.%d", major, minor);
}

cudaError_t cudaGetDeviceCount(int *count) { return *count = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int *device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return device ? cudaErrorInvalidDevice : cudaSuccess; }
cudaError_t cudaDriverGetVersion(int *version) { return *version = RUNTIME_VERSION, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { return *version = RUNTIME_VERSION, cudaSuccess; }
cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) { return *can = 0, cudaSuccess; }
cudaError_t cudaGetLastError(void) { return cudaSuccess; }
cudaError_t cudaPeekAtLastError(void) { return cudaSuccess; }

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *properties, int device) {
  memset(properties, 0, sizeof *properties);
  strcpy(properties->name, name);
  properties->totalGlobalMem = total_memory();
  properties->major = major;
  properties->minor = minor;
  properties->warpSize = 32;
  properties->multiProcessorCount = MULTIPROCESSORS;
  properties->maxThreadsPerBlock = MAX_THREADS_PER_BLOCK;
  properties->maxThreadsPerMultiProcessor = MAX_THREADS_PER_MULTIPROCESSOR;
  properties->maxBlocksPerMultiProcessor = 32;
  properties->maxThreadsDim[0] = properties->maxThreadsDim[1] = 1024;
  properties->maxThreadsDim[2] = 64;
  properties->maxGridSize[0] = 2147483647;
  properties->maxGridSize[1] = properties->maxGridSize[2] = 65535;
  properties->regsPerBlock = properties->regsPerMultiprocessor = REGISTERS;
  properties->sharedMemPerBlock = SHARED_MEMORY_PER_BLOCK;
  properties->sharedMemPerBlockOptin = SHARED_MEMORY_OPT_IN;
  properties->sharedMemPerMultiprocessor = SHARED_MEMORY_PER_MULTIPROCESSOR;
  properties->l2CacheSize = 50 << 20;
  properties->memoryBusWidth = 5120;
  properties->unifiedAddressing = 1;
  properties->textureAlignment = 512;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = minor; break;
    case cudaDevAttrMultiProcessorCount: *value = MULTIPROCESSORS; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = MAX_THREADS_PER_BLOCK; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = MAX_THREADS_PER_MULTIPROCESSOR; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = SHARED_MEMORY_PER_BLOCK; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = SHARED_MEMORY_OPT_IN; break;
    default: *value = 1;
  }
  return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char *id, int length, int device) {
  snprintf(id, length, "0000:00:00.0");
  return cudaSuccess;
}
