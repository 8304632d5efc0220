/* attention_forward.c and attention_backward.c against a double precision reference: out, lse and
   the three gradients, over several documents a row. Prints the largest error of each and exits 1
   where one is too large. The threads' parts run one after another, each on memory of its own:
   nothing may be written by two of them, or outside a thread's part of scratch. */

// variants: -DT=1 -DD=2; -DT=7 -DD=16 -DH=4 -DKV=2; -DT=31 -DD=48 -DB=2 -DNT=3
// variants: -DT=33 -DD=80 -DNT=1 -DDOCS=1; -DT=65 -DD=32 -DH=6 -DKV=3; -DT=130 -DD=64 -DDOCS=1
// variants: -DT=257 -DD=64 -DH=2 -DKV=1 -DNT=3; -DT=257 -DD=128 -DH=1 -DKV=1 -DDOCS=9
// variants: -DT=300 -DD=18 -DH=3 -DKV=1 -DNT=1 -DDOCS=60; -DT=96 -DD=64 -DB=3 -DH=2 -DKV=1
// variants: -DT=130 -DD=64 -DACT=1; -DT=97 -DD=80 -DACT=2 -DH=4 -DKV=4 -DNT=3; -DT=33 -DD=6 -DACT=1
// variants: -DVW=16 -DT=257 -DD=48; -DVW=16 -DMR=12 -DT=257 -DD=64 -DNT=3 -DDOCS=9 -DH=3 -DKV=1
// variants: -DVW=16 -DMR=12 -DT=65 -DD=80 -DACT=1 -DNT=3; -DVW=16 -DT=97 -DD=20 -DACT=2
// variants: -DVW=4 -DMR=12 -DT=257 -DD=30 -DNT=3 -DDOCS=2; -DVW=4 -DT=130 -DD=16 -DACT=2
// variants: -DTILE_AMX -DT=300 -DD=64 -DH=3 -DKV=1 -DNT=1; -DTILE_AMX -DT=97 -DD=80 -DDOCS=9
// variants: -DTILE_AMX -DTILE_IN_C -DT=1 -DD=32; -DTILE_AMX -DTILE_IN_C -DT=257 -DD=64 -DDOCS=1
// variants: -DTILE_AMX -DTILE_IN_C -DT=130 -DD=80 -DH=2 -DKV=1 -DNT=3 -DDOCS=9
// variants: -DTILE_AMX -DTILE_IN_C -DT=193 -DD=128 -DH=3 -DKV=1 -DNT=1 -DDOCS=40
// variants: -DTILE_AMX -DTILE_IN_C -DT=96 -DD=50 -DB=3 -DH=2; -DTILE_AMX -DTILE_IN_C -DT=33 -DD=33
// variants: -DVW=8 -DMR=6 -DT=97 -DD=48 -DNT=3 -DDOCS=2; -DVW=8 -DMR=6 -DT=65 -DD=20 -DACT=1

#include <math.h>
#include <stdio.h>
#include "memory.h"

#include "attention.h"

#ifndef DOCS
#define DOCS 3
#endif

static double *zeros(size_t count) {
  return memset(allocate(count, sizeof(double)), 0, count * sizeof(double));
}

/* Deterministic numbers, about normal. */
static unsigned random_state = 1;
static unsigned random_bits(void) {
  random_state = random_state * 1664525u + 1013904223u;
  return random_state >> 8;
}
static float random_normal(void) {
  float sum = -6;
  for (int i = 0; i < 12; i++) sum += (float)random_bits() / (1 << 24);
  return sum;
}
static elem *random_array(size_t count, float scale) {
  elem *x = allocate(count, sizeof(elem));
  for (size_t i = 0; i < count; i++) STORE1(ACT, x + i, random_normal() * scale);
  return x;
}
static double *decoded(const elem *x, size_t count) {
  double *y = zeros(count);
  for (size_t i = 0; i < count; i++) y[i] = LOAD1(ACT, x + i);
  return y;
}

static int *random_starts(void) {
  int *starts = allocate((size_t)B * T, sizeof(int));
  for (int b = 0; b < B; b++) {
    char begins[T] = {1};
    for (int i = 1; i < DOCS; i++) begins[random_bits() % T] = 1;
    for (int t = 0, start = 0; t < T; t++) starts[b * T + t] = start = begins[t] ? t : start;
  }
  return starts;
}

/* Offsets of a row of q and of k. */
#define AT(b, t, h) ((((size_t)(b)*T + (t)) * H + (h)) * D)
#define KV_AT(b, s, h) ((((size_t)(b)*T + (s)) * KV + (h) / (H / KV)) * D)

static double dot(const double *x, const double *y) {
  double sum = 0;
  for (int d = 0; d < D; d++) sum += x[d] * y[d];
  return sum;
}

/* P of one query, from its first key on; returns log(sum(exp)). */
static double probabilities(double *p, const double *q, const double *k, int b, int t, int h,
                            int start) {
  double top = -1e300, sum = 0;
  for (int s = start; s <= t; s++) {
    p[s] = dot(q + AT(b, t, h), k + KV_AT(b, s, h)) / sqrt((double)D);
    top = fmax(top, p[s]);
  }
  for (int s = start; s <= t; s++) sum += p[s] = exp(p[s] - top);
  for (int s = start; s <= t; s++) p[s] /= sum;
  return top + log(sum);
}

typedef struct {
  double *out, *lse, *dq, *dk, *dv;
} results;

/* One query's part of all results. `kernel_out` gives delta, as it does in the kernel. */
static void reference_query(results r, const double *q, const double *k, const double *v,
                            const double *dout, const double *kernel_out, int b, int t, int h,
                            int start) {
  double p[T], delta = dot(dout + AT(b, t, h), kernel_out + AT(b, t, h));
  r.lse[((size_t)b * H + h) * T + t] = probabilities(p, q, k, b, t, h, start);
  for (int s = start; s <= t; s++) {
    size_t row = AT(b, t, h), key = KV_AT(b, s, h);
    double ds = p[s] * (dot(dout + row, v + key) - delta) / sqrt((double)D);
    for (int d = 0; d < D; d++) {
      r.out[row + d] += p[s] * v[key + d];
      r.dq[row + d] += ds * k[key + d];
      r.dk[key + d] += ds * q[row + d];
      r.dv[key + d] += p[s] * dout[row + d];
    }
  }
}

/* 0 where the largest error, relative to the largest value (at least 1), is within `limit`. */
static int check(const char *name, const double *got, const double *want, size_t count,
                 double limit) {
  double worst = 0, largest = 1;
  for (size_t i = 0; i < count; i++) {
    double error = fabs(got[i] - want[i]);
    worst = error <= worst ? worst : error; /* keeps a NaN */
    largest = fmax(largest, fabs(want[i]));
  }
  int bad = !(worst / largest <= limit);
  printf("%s %.2e%s\n", name, worst / largest, bad ? "  TOO LARGE" : "");
  return bad;
}

/* Moves the elements that a thread has written to `total`; 1 where another one had written them. */
static int collect(const char *name, void *total, void *part, size_t count, size_t size) {
  unsigned char *to = total, *from = part, unwritten[8];
  memset(unwritten, 0xff, size);
  int twice = 0;
  for (size_t i = 0; i < count; i++, to += size, from += size) {
    if (memcmp(from, unwritten, size) == 0) continue;
    twice |= memcmp(to, unwritten, size) != 0;
    memcpy(to, from, size);
  }
  if (twice) printf("%s is written by two threads\n", name);
  return twice;
}

/* 1 where thread `core` wrote outside its own part. */
static int strays(float *scratch, size_t floats, int core) {
  size_t count = NT * floats + 16, begin = (64 - (size_t)scratch % 64) % 64 / 4 + core * floats;
  const unsigned *bits = (const unsigned *)scratch;
  int outside = 0;
  for (size_t i = 0; i < count; i++)
    outside |= (i < begin || i >= begin + floats) && bits[i] != ~0u;
  if (outside) printf("thread %d writes outside its scratch\n", core);
  return outside;
}

typedef struct {
  elem *out, *dq, *dk, *dv;
  float *lse;
} outputs;

static outputs unwritten_outputs(void) {
  return (outputs){allocate(Q_COUNT, sizeof(elem)), allocate(Q_COUNT, sizeof(elem)),
                   allocate(KV_COUNT, sizeof(elem)), allocate(KV_COUNT, sizeof(elem)),
                   allocate(LSE_COUNT, sizeof(float))};
}

/* Both kernels, thread by thread. */
static int run(outputs o, const elem *q, const elem *k, const elem *v, const elem *dout,
               const int *starts) {
  int bad = 0;
  for (int core = 0; core < NT; core++) {
    int kept = memory_count;
    float *scratch = allocate(NT * FORWARD_SCRATCH_FLOATS + 16, sizeof(float));
    outputs part = unwritten_outputs();
    attention_forward(part.out, part.lse, scratch, q, k, v, starts, core);
    bad |= strays(scratch, FORWARD_SCRATCH_FLOATS, core);
    bad |= collect("out", o.out, part.out, Q_COUNT, sizeof(elem));
    bad |= collect("lse", o.lse, part.lse, LSE_COUNT, sizeof(float));
    release_from(kept);
  }
  for (int core = 0; core < NT; core++) {
    int kept = memory_count;
    float *scratch = allocate(NT * BACKWARD_SCRATCH_FLOATS + 16, sizeof(float));
    outputs part = unwritten_outputs();
    attention_backward(part.dq, part.dk, part.dv, scratch, dout, o.out, o.lse, q, k, v, starts,
                       core);
    bad |= strays(scratch, BACKWARD_SCRATCH_FLOATS, core);
    bad |= collect("dq", o.dq, part.dq, Q_COUNT, sizeof(elem));
    bad |= collect("dk", o.dk, part.dk, KV_COUNT, sizeof(elem));
    bad |= collect("dv", o.dv, part.dv, KV_COUNT, sizeof(elem));
    release_from(kept);
  }
  return bad;
}

int main(void) {
  if (!tiles_permitted()) return 0;
  /* Queries of size 2 make softmax peaked enough for a running maximum that moves. */
  elem *q = random_array(Q_COUNT, 2), *k = random_array(KV_COUNT, 1);
  elem *v = random_array(KV_COUNT, 1), *dout = random_array(Q_COUNT, 1);
  int *starts = random_starts();
  outputs o = unwritten_outputs();
  int bad = run(o, q, k, v, dout, starts);

  double *q_ = decoded(q, Q_COUNT), *k_ = decoded(k, KV_COUNT), *v_ = decoded(v, KV_COUNT);
  double *dout_ = decoded(dout, Q_COUNT), *out_ = decoded(o.out, Q_COUNT);
  results r = {zeros(Q_COUNT), zeros(LSE_COUNT), zeros(Q_COUNT), zeros(KV_COUNT), zeros(KV_COUNT)};
  for (int b = 0; b < B; b++)
    for (int t = 0; t < T; t++)
      for (int h = 0; h < H; h++)
        reference_query(r, q_, k_, v_, dout_, out_, b, t, h, starts[b * T + t]);

  double *lse = zeros(LSE_COUNT);
  for (size_t i = 0; i < LSE_COUNT; i++) lse[i] = o.lse[i];
  /* float32 sums of up to T terms; half a unit in the last place of the storage type. In AMX the
     weights of these sums, P or dS, have been rounded to that type too. */
  double limit = ACT == 0 ? 3e-6 : ACT == 1 ? 0x1p-8 : 0x1p-11;
#ifdef TILE_AMX
  limit = 0x1.4p-8;
#endif
  bad |= check("out", out_, r.out, Q_COUNT, limit);
  bad |= check("lse", lse, r.lse, LSE_COUNT, 3e-6);
  bad |= check("dq", decoded(o.dq, Q_COUNT), r.dq, Q_COUNT, limit);
  bad |= check("dk", decoded(o.dk, KV_COUNT), r.dk, KV_COUNT, limit);
  bad |= check("dv", decoded(o.dv, KV_COUNT), r.dv, KV_COUNT, limit);
  return bad;
}
