/* attention_forward.c and attention_backward.c: any bits, and any places where documents begin
   (`starts` of a row never fall, and are at most the query's own place). */

// variants: -DT=7 -DD=16 -DH=4 -DKV=2; -DT=33 -DD=6 -DH=2 -DKV=1 -DACT=1; -DT=65 -DD=20 -DACT=2
// variants: -DT=33 -DD=34 -DH=1 -DKV=1 -DTILE_AMX -DTILE_IN_C -DVW=16 -DACT=1
// variants: -DT=1 -DD=2 -DH=1 -DKV=1; -DT=40 -DD=18 -DH=3 -DKV=1 -DVW=16

#include "fuzz.h"

#define B 2
#define NT 3
#ifndef H
#define H 2
#define KV 2
#endif
#ifndef ACT
#define ACT 0
#endif
#define SCALE (1.0f / __builtin_sqrtf(D))

#include "../../../tinyllama/ops/cpu/common.h"

#include "../../../tinyllama/ops/cpu/attention.h"
#ifdef TILE_AMX
#include "../../../tinyllama/ops/cpu/pairs.h"

#include "../../ops/kernels/tile_in_c.h"

#include "../../../tinyllama/ops/cpu/amx.h"

#include "../../../tinyllama/ops/cpu/attention_amx.h"
#define KERNEL attention_forward
#include "../../../tinyllama/ops/cpu/attention_forward_amx.c"
#undef KERNEL
#define KERNEL attention_backward
#include "../../../tinyllama/ops/cpu/attention_backward_amx.c"
#else
#define KERNEL attention_forward
#include "../../../tinyllama/ops/cpu/attention_forward.c"
#undef KERNEL
#define KERNEL attention_backward
#include "../../../tinyllama/ops/cpu/attention_backward.c"
#endif

typedef ELEM(ACT) elem;

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  begin(data, size);
  int *starts = empty(B * T, 4);
  for (int b = 0; b < B; b++)
    for (int t = 0, start = 0; t < T; t++) {
      unsigned byte = next_byte();
      start += byte & 1 ? (int)(byte >> 1) % (t - start + 1) : 0;
      starts[b * T + t] = start;
    }
  size_t queries = (size_t)B * T * H * D, keys = (size_t)B * T * KV * D;
  elem *q = filled(queries, sizeof(elem)), *k = filled(keys, sizeof(elem));
  elem *v = filled(keys, sizeof(elem)), *dout = filled(queries, sizeof(elem));
  elem *out = empty(queries, sizeof(elem)), *dq = empty(queries, sizeof(elem));
  elem *dk = empty(keys, sizeof(elem)), *dv = empty(keys, sizeof(elem));
  float *lse = empty((size_t)B * H * T, 4);
  for (int core = 0; core < NT; core++) {
    float *scratch = empty(NT * FORWARD_SCRATCH_FLOATS + 16, 4);
    attention_forward(out, lse, scratch, q, k, v, starts, core);
  }
  for (int core = 0; core < NT; core++) {
    float *scratch = empty(NT * BACKWARD_SCRATCH_FLOATS + 16, 4);
    attention_backward(dq, dk, dv, scratch, dout, out, lse, q, k, v, starts, core);
  }
  release_all();
  return 0;
}
