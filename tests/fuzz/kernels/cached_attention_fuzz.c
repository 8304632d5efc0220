/* cache_write.c and cached_attention.c: any bits, any position in the cache from 0 on. */

// variants: -DT=1 -DROWS=1; -DT=7 -DROWS=4 -DD=20 -DACT=2; -DT=9 -DROWS=4 -DWINDOW=11 -DVW=16
// variants: -DT=9 -DROWS=4 -DD=6 -DACT=1 -DWINDOW=5 -DVW=4

#include "fuzz.h"

#ifndef ACT
#define ACT 0
#endif
#ifndef WINDOW
#define WINDOW 0
#endif
#ifndef D
#define D 16
#endif
#define H 6
#define KV 2
#define S 48
#define SCALE 0.125f
#define SCRATCH_FLOATS (ROWS * S)
static int NT;

#include "../../../tinyllama/ops/cpu/common.h"

#include "../../../tinyllama/ops/cpu/cache.h"

#define KERNEL cache_write
#include "../../../tinyllama/ops/cpu/cache_write.c"
#undef KERNEL
#define KERNEL cached_attention
#include "../../../tinyllama/ops/cpu/cached_attention.c"

typedef ELEM(ACT) stored;

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  begin(data, size);
  NT = (int)size_between(1, 5);
  /* What is past the cache's end is left out, and so is what does not fit. */
  int *position = empty(1, 4), from = (int)size_between(0, S - 1);
  position[0] = from;
  size_t queries = (size_t)T * H * D, news = (size_t)T * KV * D, cached = (size_t)KV * S * D;
  stored *q = filled(queries, sizeof(stored)), *k = filled(news, sizeof(stored));
  stored *v = filled(news, sizeof(stored)), *out = empty(queries, sizeof(stored));
  stored *keys = filled(cached, sizeof(stored)), *values = filled(cached, sizeof(stored));
  float *scratch = empty((size_t)NT * SCRATCH_FLOATS, 4);
  for (int core = 0; core < NT; core++) cache_write(keys, values, k, v, position, core);
  for (int core = 0; core < NT; core++)
    cached_attention(out, scratch, q, keys, values, position, core);
  release_all();
  return 0;
}
