/* Memory of harnesses and fuzzers: it ends with its last byte and begins one element into the
   allocator's alignment, so that the sanitizers see what is read or written beyond, and kernels
   that count on an alignment. All of it is NaN (0xff bytes) until written. */

#include <stdlib.h>
#include <string.h>

static void *memories[4096];
static int memory_count;

static void *allocate(size_t count, size_t size) {
  char *memory = malloc((count + 1) * size);
  if (!memory || memory_count == 4096) abort();
  memories[memory_count++] = memory;
  memset(memory, 0xff, (count + 1) * size);
  return memory + size;
}

/* Free what was allocated while `memory_count` was `count` or more. */
static void release_from(int count) {
  while (memory_count > count) free(memories[--memory_count]);
}
