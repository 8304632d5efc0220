/* A driver for CUDA without a card: memory is the processor's, kernels do nothing, and each start is
   a line of the file FAKE_CUDA_LOG. Like a driver older than the compiler it takes machine code for
   its card only, and no PTX. FAKE_CUDA_VERSION (13000) is the version of CUDA that it is for;
   below 13000 it takes no machine code either. */
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef uint64_t u64;
struct kernel { char name[256]; };
struct node { u64 kernel; unsigned grid[3], block[3], shared; void **params, **extra; };
struct graph { int nodes; };

static void note(const char *format, ...) {
  static FILE *file;
  const char *path = getenv("FAKE_CUDA_LOG");
  if (!path) return;
  if (!file) file = fopen(path, "w");
  va_list words;
  va_start(words, format);
  vfprintf(file, format, words);
  va_end(words);
  fflush(file);
}

static int version(void) {
  const char *text = getenv("FAKE_CUDA_VERSION");
  return text ? atoi(text) : 13000;
}

/* As the table of a card's limits has them. */
static int allowed(const unsigned *grid, const unsigned *block, unsigned shared) {
  if (!grid[0] || !grid[1] || !grid[2] || grid[1] > 65535 || grid[2] > 65535) return 0;
  unsigned threads = block[0] * block[1] * block[2];
  return threads && threads <= 1024 && block[2] <= 64 && shared <= 227 << 10;
}

static void note_start(const char *what, struct kernel *k, const unsigned *grid,
                       const unsigned *block, unsigned shared, void **extra) {
  size_t bytes = extra ? *(size_t *)extra[3] : 0;
  note("%s %s %u,%u,%u %u,%u,%u %u %zu\n", what, k->name, grid[0], grid[1], grid[2], block[0],
       block[1], block[2], shared, bytes);
}

int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *out) { return *out = version(), 0; }
int cuDeviceGetCount(int *out) { return *out = 1, 0; }
int cuDeviceGet(int *out, int i) { return *out = i, i != 0; }
int cuDeviceGetName(char *out, int n, int i) { return snprintf(out, n, "Fake card"), 0; }
int cuDeviceComputeCapability(int *major, int *minor, int i) { return *major = 9, *minor = 0, 0; }
int cuDeviceGetAttribute(int *out, int key, int i) { return *out = 132, 0; } /* multiprocessors */
int cuCtxCreate_v2(void **out, unsigned flags, int i) { return *out = malloc(1), 0; }
int cuCtxSetCurrent(void *context) { return 0; }
int cuCtxSynchronize(void) { return 0; }
int cuMemGetInfo_v2(size_t *free, size_t *all) { return *free = *all = 80ul << 30, 0; }
int cuGetErrorString(int code, const char **out) { return *out = "an error of the fake driver", 0; }

int cuMemAlloc_v2(u64 *out, size_t n) { return *out = (u64)calloc(n, 1), !*out; }
int cuMemFree_v2(u64 p) { return free((void *)p), 0; }
int cuMemHostAlloc(void **out, size_t n, unsigned flags) { return *out = malloc(n), !*out; }
int cuMemFreeHost(void *p) { return free(p), 0; }
int cuMemcpyHtoD_v2(u64 to, const void *from, size_t n) { return memcpy((void *)to, from, n), 0; }
int cuMemcpyHtoDAsync_v2(u64 to, const void *from, size_t n, void *s) {
  return memcpy((void *)to, from, n), 0;
}
int cuMemcpyDtoH_v2(void *to, u64 from, size_t n) { return memcpy(to, (void *)from, n), 0; }

int cuModuleLoadData(void **out, const unsigned char *image) {
  if (memcmp(image, "\177ELF", 4)) return 222; /* unsupported PTX */
  if (version() < 13000) return 200;           /* invalid image */
  u64 start = *(u64 *)(image + 0x28);
  unsigned entries = *(uint16_t *)(image + 0x3A) * *(uint16_t *)(image + 0x3C);
  u64 size = start + entries;
  u64 *module = malloc(16);
  module[0] = (u64)malloc(size), module[1] = size;
  memcpy((void *)module[0], image, size);
  return *out = module, 0;
}
int cuModuleUnload(void *module) { return free((void *)*(u64 *)module), free(module), 0; }
int cuModuleGetFunction(struct kernel **out, u64 *module, const char *name) {
  char section[300];
  snprintf(section, sizeof section, ".text.%s", name);
  if (!memmem((void *)module[0], module[1], section, strlen(section) + 1)) return 500;
  *out = malloc(sizeof **out);
  return snprintf((*out)->name, sizeof (*out)->name, "%s", name), 0;
}
int cuFuncSetAttribute(struct kernel *k, int attribute, int value) {
  return note("attribute %s %d %d\n", k->name, attribute, value), 0;
}

int cuLaunchKernel(struct kernel *k, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                   unsigned by, unsigned bz, unsigned shared, void *stream, void **params,
                   void **extra) {
  unsigned grid[] = {gx, gy, gz}, block[] = {bx, by, bz};
  if (!allowed(grid, block, shared)) return 1;
  note_start("kernel", k, grid, block, shared, extra);
  if (!strcmp(k->name, "trial")) /* of system/gpu_driver.py */
    for (unsigned i = 0; i < bx; i++) (*(float **)params[0])[i] *= 2;
  return 0;
}

int cuGraphCreate(struct graph **out, unsigned flags) {
  return *out = calloc(1, sizeof **out), 0;
}
int cuGraphAddKernelNode(void **out, struct graph *graph, void *const *after, size_t count,
                         const struct node *node) {
  if (!allowed(node->grid, node->block, node->shared)) return 1;
  note_start("node", (struct kernel *)node->kernel, node->grid, node->block, node->shared,
             node->extra);
  graph->nodes++;
  return *out = malloc(1), 0;
}
int cuGraphInstantiate_v2(struct graph **out, struct graph *graph, void *a, void *b, size_t c) {
  return *out = calloc(1, sizeof **out), **out = *graph, 0;
}
int cuGraphExecKernelNodeSetParams(struct graph *graph, void *node, const struct node *params) {
  return note("update\n"), 0;
}
int cuGraphLaunch(struct graph *graph, void *stream) {
  return note("graph %d\n", graph->nodes), 0;
}
int cuEventCreate(void **out, unsigned flags) { return *out = malloc(1), 0; }
int cuEventRecord(void *event, void *stream) { return 0; }
int cuEventSynchronize(void *event) { return 0; }
int cuEventElapsedTime(float *out, void *a, void *b) { return *out = 1, 0; }
int cuEventDestroy_v2(void *event) { return free(event), 0; }
int cuGraphDestroy(struct graph *graph) { return free(graph), 0; }
int cuGraphExecDestroy(struct graph *graph) { return free(graph), 0; }
