/* cache_write.c and cached_attention.c: any bits, any position in the cache from 0 on. */

// variants: -DT=1 -DROWS=1; -DT=7 -DROWS=4 -DD=20 -DACT=2; -DT=9 -DROWS=4 -DWINDOW=11 -DVW=16
// variants: -DT=9 -DROWS=4 -DD=6 -DACT=1 -DWINDOW=5 -DVW=4

#include "fuzz.h"

#ifndef D
#define D 16
#endif
#include "../../ops/kernels/cached_attention.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  begin(data, size);
  NT = (int)size_between(1, 5);
  /* What is past the cache's end is left out, and so is what does not fit. */
  int *position = allocate(1, 4), from = (int)size_between(0, S - 1);
  position[0] = from;
  size_t queries = (size_t)T * H * D, news = (size_t)T * KV * D, cached = (size_t)KV * S * D;
  stored *q = filled(queries, sizeof(stored)), *k = filled(news, sizeof(stored));
  stored *v = filled(news, sizeof(stored)), *out = allocate(queries, sizeof(stored));
  stored *keys = filled(cached, sizeof(stored)), *values = filled(cached, sizeof(stored));
  float *scratch = allocate((size_t)NT * SCRATCH_FLOATS, 4);
  for (int core = 0; core < NT; core++) cache_write(keys, values, k, v, position, core);
  for (int core = 0; core < NT; core++)
    cached_attention(out, scratch, q, keys, values, position, core);
  release_from(0);
  return 0;
}
