/* What the fuzzers of kernels share: an input's bytes become sizes first, then the contents of
   buffers, see memory.h. */

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include "../../ops/kernels/memory.h"

static const uint8_t *input, *input_end;

static void begin(const uint8_t *data, size_t size) { input = data, input_end = data + size; }

static unsigned next_byte(void) { return input < input_end ? *input++ : 0; }

/* From low to high, both included. */
static long size_between(long low, long high) {
  unsigned long x = next_byte();
  if (high - low > 255) x |= (unsigned long)next_byte() << 8;
  return low + (long)(x % (unsigned long)(high - low + 1));
}

/* `count` elements of `size` bytes: whatever bits the input holds, again and again; NaN, infinity
   and subnormals among them. */
static void *filled(size_t count, size_t size) {
  uint8_t *memory = allocate(count, size);
  size_t left = (size_t)(input_end - input), bytes = count * size;
  for (size_t i = 0; i < bytes; i += left) {
    if (!left) return memset(memory, 0, bytes);
    memcpy(memory + i, input, bytes - i < left ? bytes - i : left);
  }
  if (left) input += left > 8 ? 3 : 0; /* the next one begins elsewhere */
  return memory;
}

/* The same bits, whatever the number of threads. */
static void same(const char *what, const void *a, const void *b, size_t bytes) {
  if (memcmp(a, b, bytes) == 0) return;
  fprintf(stderr, "%s depends on the number of threads\n", what);
  abort();
}
