/* attention_forward.c and attention_backward.c: any bits, and any places where documents begin
   (`starts` of a row never fall, and are at most the query's own place). */

// variants: -DT=7 -DD=16 -DH=4 -DKV=2; -DT=33 -DD=6 -DH=2 -DKV=1 -DACT=1; -DT=65 -DD=20 -DACT=2
// variants: -DT=33 -DD=34 -DH=1 -DKV=1 -DTILE_AMX -DTILE_IN_C
// variants: -DT=1 -DD=2 -DH=1 -DKV=1; -DT=40 -DD=18 -DH=3 -DKV=1 -DVW=16

#include "fuzz.h"

#define B 2
#define NT 3
#ifndef H
#define H 2
#define KV 2
#endif
#include "../../ops/kernels/attention.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  /* As large as it must be, and the same for every input: filling it takes longer than the rest. */
  static float *forward, *backward;
  static int kept;
  if (!forward) {
    forward = allocate(NT * FORWARD_SCRATCH_FLOATS + 16, 4);
    backward = allocate(NT * BACKWARD_SCRATCH_FLOATS + 16, 4);
    kept = memory_count;
  }
  begin(data, size);
  int *starts = allocate(B * T, 4);
  for (int b = 0; b < B; b++)
    for (int t = 0, start = 0; t < T; t++) {
      unsigned byte = next_byte();
      start += byte & 1 ? (int)(byte >> 1) % (t - start + 1) : 0;
      starts[b * T + t] = start;
    }
  size_t queries = (size_t)B * T * H * D, keys = (size_t)B * T * KV * D;
  elem *q = filled(queries, sizeof(elem)), *k = filled(keys, sizeof(elem));
  elem *v = filled(keys, sizeof(elem)), *dout = filled(queries, sizeof(elem));
  elem *out = allocate(queries, sizeof(elem)), *dq = allocate(queries, sizeof(elem));
  elem *dk = allocate(keys, sizeof(elem)), *dv = allocate(keys, sizeof(elem));
  float *lse = allocate((size_t)B * H * T, 4);
  for (int core = 0; core < NT; core++)
    attention_forward(out, lse, forward, q, k, v, starts, core);
  for (int core = 0; core < NT; core++)
    attention_backward(dq, dk, dv, backward, dout, out, lse, q, k, v, starts, core);
  release_from(kept);
  return 0;
}
