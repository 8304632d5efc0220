/* The element-wise and reduction kernels: any size, any bits, any ids, 1 to 5 threads. What no sum
   runs over must not depend on the number of threads. */

// variants: -DACT=0 -DFORM=1; -DACT=1 -DFORM=0; -DACT=2 -DFORM=1; -DACT=1 -DFORM=1 -DVW=16
// variants: -DACT=2 -DFORM=0 -DVW=4

#include "fuzz.h"

#include "../../ops/kernels/elementwise.h"

#define RUN(threads, call) \
  for (NT = (threads), core = NT - 1; core >= 0; core--) call;

static int core;

static void fuzz_rms_norm(int threads) {
  act *x = filled(N * H, sizeof(act)), *dy = filled(N * H, sizeof(act));
  float *w = filled(H, 4), *rstd = allocate(N, 4), *again = allocate(N, 4);
  act *y = allocate(N * H, sizeof(act)), *dx = allocate(N * H, sizeof(act));
  act *y2 = allocate(N * H, sizeof(act)), *dx2 = allocate(N * H, sizeof(act));
  float *dw = allocate(threads * H, 4), *dw2 = allocate(H, 4);
  RUN(threads, rms_norm_forward(y, rstd, x, w, core));
  RUN(threads, rms_norm_backward(dx, dw, dy, x, rstd, w, core));
  RUN(1, rms_norm_forward(y2, again, x, w, core));
  RUN(1, rms_norm_backward(dx2, dw2, dy, x, again, w, core));
  same("rms_norm", y, y2, N * H * sizeof(act)), same("rstd", rstd, again, N * 4);
  same("rms_norm dx", dx, dx2, N * H * sizeof(act));
}

static void fuzz_swiglu(int threads) {
  size_t count = N * H, size = sizeof(act);
  act *gate = filled(count, size), *up = filled(count, size), *dy = filled(count, size);
  act *y[2], *dgate[2], *dup[2];
  for (int i = 0; i < 2; i++) {
    y[i] = allocate(count, size), dgate[i] = allocate(count, size), dup[i] = allocate(count, size);
    RUN(i ? 1 : threads, swiglu_forward(y[i], gate, up, core));
    RUN(i ? 1 : threads, swiglu_backward(dgate[i], dup[i], dy, gate, up, core));
  }
  same("swiglu", y[0], y[1], count * size), same("dgate", dgate[0], dgate[1], count * size);
  same("dup", dup[0], dup[1], count * size);
}

static void fuzz_rope(int threads) {
  size_t count = B * T * HEADS * D, half = T * (D / 2);
  act *x = filled(count, sizeof(act)), *a = allocate(count, sizeof(act));
  act *b = allocate(count, sizeof(act));
  float *cosine = filled(half, 4), *sine = filled(half, 4);
  RUN(threads, rope(a, x, cosine, sine, core));
  RUN(1, rope(b, x, cosine, sine, core));
  same("rope", a, b, count * sizeof(act));
}

static void fuzz_embedding(int threads) {
  int *ids = filled(N, 4);
  float *weight = filled(V * H, 4), *dw = filled(V * H, 4), *dw2 = allocate(V * H, 4);
  act *a = allocate(N * H, sizeof(act)), *b = allocate(N * H, sizeof(act));
  act *dout = filled(N * H, sizeof(act));
  for (long n = 0; n < N; n++) /* some in the table, some anywhere, -2^31 too */
    if (ids[n] & 64) ids[n] = (int)((unsigned)ids[n] % (unsigned)(V + 2)) - 1;
  memcpy(dw2, dw, V * H * 4);
  RUN(threads, embedding_forward(a, weight, ids, core));
  RUN(1, embedding_forward(b, weight, ids, core));
  RUN(threads, embedding_backward(dw, dout, ids, core));
  RUN(1, embedding_backward(dw2, dout, ids, core));
  same("embedding", a, b, N * H * sizeof(act)), same("embedding dw", dw, dw2, V * H * 4);
}

static void fuzz_cross_entropy(int threads) {
  act *logits = filled(N * V, sizeof(act)), *again = allocate(N * V, sizeof(act));
  int *targets = filled(N, 4);
  float *loss = allocate(N, 4), *loss2 = allocate(N, 4);
  for (long n = 0; n < N; n++)
    if (targets[n] & 64) targets[n] = (int)((unsigned)targets[n] % (unsigned)(V + 2)) - 1;
  memcpy(again, logits, N * V * sizeof(act));
  RUN(threads, cross_entropy(logits, loss, targets, core));
  RUN(1, cross_entropy(again, loss2, targets, core));
  same("cross_entropy", loss, loss2, N * 4);
  same("cross_entropy dx", logits, again, N * V * sizeof(act));
}

static void fuzz_sums(int threads) {
  float *x = filled(COUNT, 4), *partial = filled(threads, 4);
  RUN(threads, square_sum(partial, x, core));
  long state = COUNT * sizeof(moment);
  float *scalars = filled(10, 4), *p = filled(COUNT, 4), *p2 = allocate(COUNT, 4);
  moment *m = filled(COUNT, sizeof(moment)), *m2 = allocate(COUNT, sizeof(moment));
  moment *v = filled(COUNT, sizeof(moment)), *v2 = allocate(COUNT, sizeof(moment));
  elem_1 *copy = allocate(COUNT, 2), *copy2 = allocate(COUNT, 2);
  unsigned *first = filled(1, 4);
  scalars[8] = size_between(0, (1 << 24) - 1), scalars[9] = size_between(0, (1 << 24) - 1);
  memcpy(p2, p, COUNT * 4), memcpy(m2, m, state), memcpy(v2, v, state);
  RUN(threads, adamw(p, m, v COPY_ARG(copy), x, scalars FIRST_ARG, core));
  RUN(1, adamw(p2, m2, v2 COPY_ARG(copy2), x, scalars FIRST_ARG, core));
  (void)first;
  same("adamw p", p, p2, COUNT * 4), same("adamw m", m, m2, state), same("adamw v", v, v2, state);
  same("adamw copy", copy, copy2, COUNT * 2);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  begin(data, size);
  int which = (int)size_between(0, 5), threads = (int)size_between(1, 5);
  int is_huge = next_byte() == 255;
  N = size_between(1, 9), H = size_between(1, is_huge ? 5000 : 140);
  V = size_between(1, is_huge ? 20000 : 200);
  if (H > 300) V = V % 100 + 1; /* a table of both takes 400 MB */
  B = size_between(1, 3), T = size_between(1, 12), HEADS = size_between(1, 5);
  D = 2 * size_between(0, 40), COUNT = size_between(1, is_huge ? 60000 : 300);
  void (*kernels[])(int) = {fuzz_rms_norm, fuzz_swiglu, fuzz_rope, fuzz_embedding,
                            fuzz_cross_entropy, fuzz_sums};
  kernels[which](threads);
  release_from(0);
  return 0;
}
