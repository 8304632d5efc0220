/* The element-wise and reduction kernels against plain double precision references,
   over odd sizes and 1 to 3 threads. The sizes are variables here, so that one build runs them all.
   Buffers end where their last element does and begin at the alignment of one element. FORM picks
   the plain (0) or the other (1) form of each kernel that has two. The threads' parts run one after
   another, the last first: none may count on another's. */

// variants: -DACT=0 -DFORM=0; -DACT=0 -DFORM=1; -DACT=1 -DFORM=0; -DACT=1 -DFORM=1
// variants: -DACT=2 -DFORM=0; -DACT=2 -DFORM=1
// variants: -DACT=0 -DFORM=1 -DVW=16; -DACT=1 -DFORM=0 -DVW=16; -DACT=2 -DFORM=1 -DVW=16
// variants: -DACT=0 -DFORM=0 -DVW=4; -DACT=1 -DFORM=1 -DVW=4; -DACT=2 -DFORM=0 -DVW=4
// variants: -DACT=0 -DFORM=1 -DVW=8; -DACT=1 -DFORM=0 -DVW=8; -DACT=2 -DFORM=1 -DVW=8

#include <math.h>
#include <stdio.h>
#include "memory.h"

#include "elementwise.h"

#define RUN(call)                                 \
  for (int core = NT - 1; core >= 0; core--) call;

/* The largest relative error of rounding a result, with room for the arithmetic before it. */
static const double ROUNDING[] = {2e-6, 0x1.02p-8, 0x1.02p-11};

static int failures;

/* Written so that a NaN fails. */
static void check(const char *what, long at, double got, double want, double tolerance) {
  if (got == want || fabs(got - want) <= tolerance) return;
  if (failures++ < 20) {
    printf("%s[%ld]: got %.9g, want %.9g (N %ld H %ld V %ld T %ld D %ld COUNT %ld NT %d)\n", what,
           at, got, want, N, H, V, T, D, COUNT, NT);
  }
}

/* For a result in the activation type; `scale` is the size of the terms it was summed from. */
static void check_act(const char *what, long at, act got, double want, double scale) {
  double tolerance = ROUNDING[ACT] * fabs(want) + 2e-6 * scale + (ACT == 2 ? 0x1p-25 : 1e-38);
  check(what, at, LOAD1(ACT, &got), want, tolerance);
}

static double uniform(double low, double high) {
  static unsigned long long state = 1;
  state = state * 6364136223846793005ull + 1442695040888963407ull;
  return low + (high - low) * (double)(state >> 40) * 0x1p-24;
}

static act *make_act(long count, double low, double high) {
  act *p = allocate(count, sizeof(act));
  for (long i = 0; i < count; i++) STORE1(ACT, p + i, (float)uniform(low, high));
  return p;
}

static float *make_float(long count, double low, double high) {
  float *p = allocate(count, sizeof(float));
  for (long i = 0; i < count; i++) p[i] = (float)uniform(low, high);
  return p;
}

static double at(const act *p, long i) { return LOAD1(ACT, p + i); }

static double sigmoid(double x) { return 1 / (1 + exp(-x)); }

static void test_rms_norm(void) {
  const long size = sizeof(act);
  act *x = make_act(N * H, -2, 2), *dy = make_act(N * H, -1, 1);
  act *y = allocate(N * H, size), *dx = allocate(N * H, size);
  float *w = make_float(H, 0.5, 1.5), *rstd = allocate(N, 4), *dw = allocate(NT * H, 4);
  double *dw_want = calloc((size_t)H, sizeof(double));
  RUN(rms_norm_forward(y, rstd, x, w, core));
  RUN(rms_norm_backward(dx, dw, dy, x, rstd, w, core));
  for (long r = 0; r < N * H; r += H) {
    double square = 0, dot = 0;
    for (long i = 0; i < H; i++) square += at(x, r + i) * at(x, r + i) / (double)H;
    double scale = 1 / sqrt(square + EPS);
    for (long i = 0; i < H; i++) dot += at(dy, r + i) * w[i] * at(x, r + i) * scale / (double)H;
    check("rstd", r / H, rstd[r / H], scale, 1e-6 * scale);
    for (long i = 0; i < H; i++) {
      double n = at(x, r + i) * scale;
      double pulled = scale * (at(dy, r + i) * w[i] - n * dot);
      check_act("rms_norm", r + i, y[r + i], n * w[i], 0);
      check_act("rms_norm dx", r + i, dx[r + i], pulled, 1 + scale * (1 + fabs(n)));
      dw_want[i] += at(dy, r + i) * n;
    }
  }
  for (long i = 0; i < H; i++) {
    double sum = 0;
    for (int c = 0; c < NT; c++) sum += dw[c * H + i];
    check("rms_norm dw", i, sum, dw_want[i], 2e-6 * (double)N);
  }
  free(dw_want);
  release_from(0);
}

static void test_swiglu(void) {
  const long count = N * H, size = sizeof(act);
  act *gate = make_act(count, -12, 12), *up = make_act(count, -2, 2), *dy = make_act(count, -1, 1);
  act *y = allocate(count, size), *dgate = allocate(count, size), *dup = allocate(count, size);
  STORE1(ACT, gate, -100.0f); /* exp(100) is inf in float32 */
  RUN(swiglu_forward(y, gate, up, core));
  RUN(swiglu_backward(dgate, dup, dy, gate, up, core));
  for (long i = 0; i < count; i++) {
    double a = at(gate, i), b = at(up, i), g = at(dy, i), s = sigmoid(a);
    check_act("swiglu", i, y[i], a * s * b, 0);
    check_act("swiglu dup", i, dup[i], g * a * s, 0);
    check_act("swiglu dgate", i, dgate[i], g * b * s * (1 + a * (1 - s)), fabs(b) * s);
  }
  release_from(0);
}

static void test_rope(void) {
  const long half = D / 2, count = B * T * HEADS * D, size = sizeof(act);
  act *x = make_act(count, -2, 2), *out = allocate(count, size);
  float *cosine = make_float(T * half, -1, 1), *sine = make_float(T * half, -1, 1);
  RUN(rope(out, x, cosine, sine, core));
  for (long p = 0; p < count; p += D) {
    const float *c = cosine + p / (HEADS * D) % T * half, *s = sine + p / (HEADS * D) % T * half;
    for (long i = 0; i < half; i++) {
      double first = at(x, p + i), second = at(x, p + i + half), turn = FORM ? -s[i] : s[i];
      check_act("rope", p + i, out[p + i], first * c[i] - second * turn, 1);
      check_act("rope", p + i + half, out[p + i + half], second * c[i] + first * turn, 1);
    }
  }
  release_from(0);
}

static void test_embedding(void) {
  const long size = sizeof(act);
  float *weight = make_float(V * H, -1, 1), *dw = make_float(V * H, -1, 1);
  act *out = allocate(N * H, size), *dout = make_act(N * H, -1, 1);
  int *ids = allocate(N, 4);
  double *want = calloc((size_t)(V * H), sizeof(double));
  for (long n = 0; n < N; n++) ids[n] = (int)uniform(-1, (double)V + 1); /* V itself is outside */
  ids[N - 1] = (int)V - 1;
  memset(dw, 0xff, (size_t)(V * H) * 4);
  RUN(embedding_forward(out, weight, ids, core));
  RUN(embedding_backward(dw, dout, ids, core));
  for (long i = 0; i < N * H; i++) {
    long id = ids[i / H], inside = id >= 0 && id < V, from = id * H + i % H;
    check_act("embedding", i, out[i], inside ? weight[from] : 0, 0);
    if (inside) want[from] += at(dout, i);
  }
  for (long i = 0; i < V * H; i++) check("embedding dw", i, dw[i], want[i], 2e-6 * (double)N);
  free(want);
  release_from(0);
}

/* One row: its loss and, where FORM asks for it, its gradient; `before` is the row as it was. */
static void check_cross_entropy(long row, const act *after, const act *before, float loss, int id) {
  double max = -INFINITY, sum = 0;
  for (long i = 0; i < V; i++) max = fmax(max, at(before, i));
  for (long i = 0; i < V; i++) sum += exp(at(before, i) - max);
  double want = id < 0 ? 0 : log(sum) + max - at(before, id);
  check("cross_entropy", row, loss, want, 1e-6 * (fabs(max) + want));
  for (long i = 0; i < V; i++) {
    double p = exp(at(before, i) - max) / sum, gradient = id < 0 ? 0 : p - (i == id);
    /* The exponent is rounded: an error of its size times 2^-24, here in units of 2e-6. */
    double scale = p * (1 + fmin(max - at(before, i), 1000) / 32) + (i == id);
    if (FORM) check_act("cross_entropy dx", row * V + i, after[i], gradient, scale);
    else check("logits stay", row * V + i, at(after, i), at(before, i), 0);
  }
}

static void test_cross_entropy(double spread) {
  const long size = sizeof(act);
  act *logits = make_act(N * V, -spread, spread), *before = allocate(N * V, size);
  float *loss = allocate(N, 4);
  int *targets = allocate(N, 4);
  /* A masked first half: whole blocks without a finite logit. */
  for (long i = 0; i < V / 2; i++) STORE1(ACT, logits + i, -INFINITY);
  memcpy(before, logits, (size_t)(N * V * size));
  for (long n = 0; n < N; n++) targets[n] = n % 3 == 1 ? -1 : (int)(V - 1 - n % 2 * (V / 3));
  RUN(cross_entropy(logits, loss, targets, core));
  for (long n = 0; n < N; n++) {
    check_cross_entropy(n, logits + n * V, before + n * V, loss[n], targets[n]);
  }
  for (long n = 0; n < N; n++) targets[n] = n % 2 ? (int)V : 0x7fffffff; /* no such logit */
  RUN(cross_entropy(logits, loss, targets, core));
  for (long n = 0; n < N; n++) check("cross_entropy no logit", n, isnan(loss[n]), 1, 0);
  release_from(0);
}

static void test_square_sum(void) {
  float *x = make_float(COUNT, -3, 3), *partial = allocate(NT, 4);
  double got = 0, want = ACCUMULATE ? 2.0 * NT : 0;
  for (int c = 0; c < NT; c++) partial[c] = 2;
  RUN(square_sum(partial, x, core));
  for (int c = 0; c < NT; c++) got += partial[c];
  for (long i = 0; i < COUNT; i++) want += (double)x[i] * x[i];
  check("square_sum", 0, got, want, 2e-7 * want);
  release_from(0);
}

/* Numbers of AdamW's state in their storage type. */
static moment *make_state(const float *from, double *values) {
  moment *state = allocate(COUNT, sizeof(moment));
  for (long i = 0; i < COUNT; i++) {
    STORE1(STATE_T, state + i, from[i]);
    values[i] = LOAD1(STATE_T, state + i);
  }
  return state;
}

static void test_adamw(void) {
  const double lr = 0.01, b1 = 0.9, b2 = 0.999, eps = 1e-8, decay = FORM ? 0.1 : 0, clip = 0.5;
  float *scalars = allocate(10, 4), *p = make_float(COUNT, -1, 1), *g = make_float(COUNT, -1, 1);
  float *from_m = make_float(COUNT, -1, 1), *from_v = make_float(COUNT, 0.01, 1);
  double *old_m = allocate(COUNT, sizeof(double)), *old_v = allocate(COUNT, sizeof(double));
  moment *m = make_state(from_m, old_m), *v = make_state(from_v, old_v);
  elem_1 *copy = allocate(COUNT, 2), *again = allocate(COUNT, 2);
  unsigned *first = allocate(1, 4);
  *first = 4000000000u;
  double *want = allocate((size_t)(3 * COUNT), sizeof(double));
  const double c1 = 1 - b1 * b1, c2 = 1 - b2 * b2;
  const double values[] = {lr, b1, b2, eps, 0.1, c1, c2, clip, 1234567, (1 << 24) - 1};
  for (int i = 0; i < 10; i++) scalars[i] = (float)values[i];
  for (long i = 0; i < COUNT; i++) {
    double gradient = g[i] * clip, mean = b1 * old_m[i] + (1 - b1) * gradient;
    double square = b2 * old_v[i] + (1 - b2) * gradient * gradient;
    double step = lr / c1 * mean / (sqrt(square) / sqrt(c2) + eps);
    want[3 * i] = p[i] * (1 - lr * decay) - step;
    want[3 * i + 1] = mean, want[3 * i + 2] = square;
  }
  RUN(adamw(p, m, v COPY_ARG(copy), g, scalars FIRST_ARG, core));
  RUN(narrow(again, p, core));
  for (long i = 0; i < COUNT; i++) {
    /* Up or down: within a unit in bfloat16's last place. */
    double unit = STATE_T ? 0x1p-7 : 0;
    check("adamw p", i, p[i], want[3 * i], 5e-7);
    check("adamw m", i, LOAD1(STATE_T, m + i), want[3 * i + 1], 3e-7 + unit * fabs(want[3 * i + 1]));
    check("adamw v", i, LOAD1(STATE_T, v + i), want[3 * i + 2], 3e-7 + unit * fabs(want[3 * i + 2]));
    check("narrow", i, LOAD1(1, again + i), p[i], 0x1.02p-8 * fabs(p[i]));
    if (COPY) check("adamw copy", i, copy[i], again[i], 0);
  }
  release_from(0);
}

int main(void) {
  static const long sizes[] = {1, 7, 31, 33, 257};
  for (NT = 1; NT <= 3; NT++) {
    for (int a = 0; a < 5; a++) {
      for (int b = 0; b < 4; b++) {
        N = sizes[b], H = V = sizes[a];
        test_rms_norm(), test_swiglu(), test_embedding(), test_cross_entropy(4);
        B = 1 + b % 2, T = sizes[b], HEADS = 1 + b % 3, D = 2 * (sizes[a] % 50);
        test_rope();
      }
      COUNT = sizes[a];
      test_square_sum(), test_adamw();
    }
    N = 4, V = 2 * CROSS_ENTROPY_BLOCK + 33;
    test_cross_entropy(60);
    COUNT = 3 * SQUARE_SUM_BLOCK + 257;
    test_square_sum();
  }
  if (failures) printf("%d wrong\n", failures);
  return failures != 0;
}
