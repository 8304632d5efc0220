/* What the fuzzers of kernels share: an input's bytes become sizes first, then the contents of
   buffers, which end where their last element does and begin at the alignment of one element. */

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const uint8_t *input, *input_end;
static void *buffers[64];
static int buffer_count;

static void begin(const uint8_t *data, size_t size) { input = data, input_end = data + size; }

static unsigned next_byte(void) { return input < input_end ? *input++ : 0; }

/* From low to high, both included. */
static long size_between(long low, long high) {
  unsigned long x = next_byte();
  if (high - low > 255) x |= (unsigned long)next_byte() << 8;
  return low + (long)(x % (unsigned long)(high - low + 1));
}

/* `count` elements of `size` bytes: whatever bits the input holds, again and again; NaN, infinity
   and subnormals among them. The pointer is aligned to one element only. */
static void *filled(size_t count, size_t size) {
  uint8_t *memory = malloc((count + 1) * size);
  if (!memory || buffer_count == 64) abort();
  buffers[buffer_count++] = memory;
  size_t left = (size_t)(input_end - input), bytes = count * size;
  memset(memory, 0xff, size);
  for (size_t i = 0; i < bytes; i++) memory[size + i] = left ? input[i % left] : 0;
  if (left) input += left > 8 ? 3 : 0; /* the next one begins elsewhere */
  return memory + size;
}

/* Like filled, without contents: NaN. */
static void *empty(size_t count, size_t size) {
  uint8_t *memory = malloc((count + 1) * size);
  if (!memory || buffer_count == 64) abort();
  buffers[buffer_count++] = memory;
  return memset(memory, 0xff, (count + 1) * size), memory + size;
}

static void release_all(void) {
  while (buffer_count) free(buffers[--buffer_count]);
}

/* The same bits, whatever the number of threads. */
static void same(const char *what, const void *a, const void *b, size_t bytes) {
  if (memcmp(a, b, bytes) == 0) return;
  fprintf(stderr, "%s depends on the number of threads\n", what);
  abort();
}
