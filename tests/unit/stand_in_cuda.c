/* The functions of the CUDA driver that kdcompress calls, over ordinary memory: one GPU that copies at once. */
#include <stdlib.h>
#include <string.h>
#include <stdint.h>
#define OUT_OF_MEMORY 2
static int devices(void) { const char *n = getenv("STAND_IN_GPUS"); return n ? atoi(n) : 1; }
int cuInit(unsigned flags) { (void)flags; return devices() < 0 ? 100 : 0; }
int cuGetErrorString(int code, const char **text) {
  *text = code == OUT_OF_MEMORY ? "out of memory" : code == 100 ? "no CUDA-capable device is detected" : "unknown";
  return 0;
}
int cuDeviceGetCount(int *count) { *count = devices(); return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
int cuDeviceGetName(char *name, int length, int device) { (void)device; strncpy(name, "Stand-in GPU", length); return 0; }
int cuDriverGetVersion(int *version) { *version = 12060; return 0; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { (void)device; *bytes = 8000000000u; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  (void)device;
  *value = attribute == 75 ? 8 : attribute == 76 ? 7 : 1;
  return 0;
}
int cuDevicePrimaryCtxRetain(void **context, int device) { (void)device; *context = (void *)1; return 0; }
int cuCtxSetCurrent(void *context) { return context == (void *)1 ? 0 : 201; }
int cuStreamCreate(void **stream, unsigned flags) { (void)flags; *stream = (void *)7; return 0; }
int cuStreamSynchronize(void *stream) { return stream == (void *)7 ? 0 : 400; }
int cuEventCreate(void **event, unsigned flags) { (void)flags; *event = malloc(8); return 0; }
int cuEventRecord(void *event, void *stream) { return event && stream == (void *)7 ? 0 : 400; }
int cuEventSynchronize(void *event) { return event ? 0 : 400; }
int cuEventElapsedTime(float *ms, void *start, void *end) { *ms = start != end ? 1.5f : 0.0f; return 0; }
int cuMemAlloc_v2(uint64_t *address, size_t bytes) {
  if (bytes > 1000000000u) return OUT_OF_MEMORY;
  *address = (uint64_t)(uintptr_t)malloc(bytes);
  return 0;
}
int cuMemFree_v2(uint64_t address) { free((void *)(uintptr_t)address); return 0; }
int cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t bytes, void *stream) {
  memcpy((void *)(uintptr_t)to, from, bytes);
  return stream == (void *)7 ? 0 : 400;
}
int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t bytes, void *stream) {
  memcpy(to, (void *)(uintptr_t)from, bytes);
  return stream == (void *)7 ? 0 : 400;
}
