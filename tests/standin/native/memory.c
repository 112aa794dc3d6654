/* Device and host memory, and copies. Device memory is host memory whose pages appear when they are touched. */
#include "standin.h"
#include <sys/mman.h>

/* Larger copies within the device are not done: they would touch gigabytes, and values have no meaning there. */
#define LARGEST_DEVICE_COPY ((size_t)16 << 20)

typedef struct {
  char *start;
  size_t size;
} Range;

typedef struct {
  Range *ranges;
  int count, capacity;
} Ranges;

static Ranges on_device, pinned;
static size_t used;
static size_t total = (size_t)85e9;

static void add(Ranges *to, void *start, size_t size) {
  pthread_mutex_lock(&standin_lock);
  if (to->count == to->capacity) {
    to->capacity = 2 * to->capacity + 64;
    to->ranges = realloc(to->ranges, to->capacity * sizeof(Range));
  }
  to->ranges[to->count++] = (Range){start, size};
  pthread_mutex_unlock(&standin_lock);
}

/* Returns the size of the range that began there, or 0. */
static size_t take(Ranges *from, void *start) {
  size_t size = 0;
  pthread_mutex_lock(&standin_lock);
  for (int i = 0; i < from->count && !size; i++)
    if (from->ranges[i].start == start) {
      size = from->ranges[i].size;
      from->ranges[i] = from->ranges[--from->count];
    }
  pthread_mutex_unlock(&standin_lock);
  return size;
}

static int contains(const Ranges *ranges, const void *address) {
  int found = 0;
  pthread_mutex_lock(&standin_lock);
  for (int i = 0; i < ranges->count && !found; i++) {
    const Range *range = &ranges->ranges[i];
    found = (const char *)address >= range->start && (const char *)address < range->start + range->size;
  }
  pthread_mutex_unlock(&standin_lock);
  return found;
}

EXPORT void standin_set_memory(size_t bytes) { total = bytes; }
size_t total_memory(void) { return total; }

/* ---- allocation ---- */
cudaError_t cudaMalloc(void **pointer, size_t size) {
  record_size("cudaMalloc", size, 0);
  if (is_unsafe_here()) return refuse("cudaMalloc", "in a capture", 0, cudaErrorStreamCaptureUnsupported);
  if (used + size > total) return cudaErrorMemoryAllocation;
  void *start = mmap(0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (start == MAP_FAILED) return cudaErrorMemoryAllocation;
  add(&on_device, start, size);
  used += size;
  *pointer = start;
  return cudaSuccess;
}

cudaError_t cudaFree(void *pointer) {
  if (!pointer) return cudaSuccess;
  record("cudaFree", "", 0);
  if (is_unsafe_here()) return refuse("cudaFree", "in a capture", 0, cudaErrorStreamCaptureUnsupported);
  size_t size = take(&on_device, pointer);
  if (size) munmap(pointer, size);
  used -= size;
  return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total_bytes) {
  *total_bytes = total;
  *free_bytes = total > used ? total - used : 0;
  return cudaSuccess;
}

cudaError_t cudaHostAlloc(void **pointer, size_t size, unsigned flags) {
  record_size("cudaHostAlloc", size, 0);
  if (is_unsafe_here()) return refuse("cudaHostAlloc", "in a capture", 0, cudaErrorStreamCaptureUnsupported);
  *pointer = aligned_alloc(4096, (size + 4095) / 4096 * 4096);
  add(&pinned, *pointer, size);
  return cudaSuccess;
}

cudaError_t cudaFreeHost(void *pointer) {
  record("cudaFreeHost", "", 0);
  take(&pinned, pointer);
  free(pointer);
  return cudaSuccess;
}

cudaError_t cudaHostRegister(void *pointer, size_t size, unsigned flags) {
  record_size("cudaHostRegister", size, 0);
  add(&pinned, pointer, size);
  return cudaSuccess;
}

cudaError_t cudaHostUnregister(void *pointer) {
  record("cudaHostUnregister", "", 0);
  return take(&pinned, pointer) ? cudaSuccess : cudaErrorHostMemoryNotRegistered;
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *pointer) {
  memset(attributes, 0, sizeof *attributes);
  attributes->type = contains(&on_device, pointer) ? cudaMemoryTypeDevice
                     : contains(&pinned, pointer)  ? cudaMemoryTypeHost
                                                   : cudaMemoryTypeUnregistered;
  attributes->devicePointer = (void *)pointer;
  return cudaSuccess;
}

/* ---- copies ---- */

/* "H2D 4096 pinned": direction, bytes, and for the host's side whether it is page-locked. */
static int describe(char *text, size_t size, void *to, const void *from, size_t bytes) {
  int from_device = contains(&on_device, from), to_device = contains(&on_device, to);
  const char *host = "";
  if (!from_device) host = contains(&pinned, from) ? " pinned" : " pageable";
  if (!to_device) host = contains(&pinned, to) ? " pinned" : " pageable";
  snprintf(text, size, "%c2%c %zu%s", from_device ? 'D' : 'H', to_device ? 'D' : 'H', bytes, host);
  return from_device && to_device;
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
  char text[64];
  int within_device = describe(text, sizeof text, to, from, size);
  record(is_capturing(stream) && !within_device ? "captured host copy" : "cudaMemcpyAsync", text, stream);
  enqueue(text, stream);
  if (!is_capturing(stream) && (!within_device || size <= LARGEST_DEVICE_COPY)) memcpy(to, from, size);
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
  char text[64];
  describe(text, sizeof text, to, from, size);
  record("cudaMemcpy", text, 0);
  if (is_unsafe_here()) return refuse("cudaMemcpy", "in a capture", 0, cudaErrorStreamCaptureImplicit);
  memcpy(to, from, size);
  return cudaSuccess;
}

cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width,
                              size_t height, enum cudaMemcpyKind kind, cudaStream_t stream) {
  char text[64];
  int within_device = describe(text, sizeof text, to, from, width * height);
  record(is_capturing(stream) && !within_device ? "captured host copy" : "cudaMemcpyAsync", text, stream);
  enqueue(text, stream);
  if (!is_capturing(stream))
    for (size_t row = 0; row < height; row++)
      memcpy((char *)to + row * to_pitch, (const char *)from + row * from_pitch, width);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void *to, int value, size_t size, cudaStream_t stream) {
  record_size("cudaMemsetAsync", size, stream);
  enqueue("memset", stream);
  if (!is_capturing(stream) && size <= LARGEST_DEVICE_COPY) memset(to, value, size);
  return cudaSuccess;
}

cudaError_t cudaMemset(void *to, int value, size_t size) { return cudaMemsetAsync(to, value, size, 0); }
