/* cache_write.c and cached_attention.c against a double precision softmax: a prompt of T tokens at an
   awkward position of a cache that held something else, one thread or three. */

// variants: -DT=1; -DT=1 -DWINDOW=5 -DACT=1; -DT=7 -DROWS=4; -DT=7 -DROWS=4 -DD=20 -DACT=2
// variants: -DT=1 -DVW=16; -DT=9 -DROWS=4 -DVW=16 -DD=72 -DWINDOW=11; -DT=7 -DROWS=4 -DVW=8 -DD=6
// variants: -DT=1 -DVW=4 -DD=6; -DT=9 -DROWS=4 -DVW=4 -DACT=1 -DH=2 -DKV=2

#include <math.h>
#include <stdio.h>
#include "memory.h"

#include "cached_attention.h"

#define POSITION 21

static stored *random_numbers(long count) {
  stored *x = allocate((size_t)count, sizeof(stored));
  for (long i = 0; i < count; i++) STORE1(ACT, x + i, (rand() % 2001 - 1000) * 1.37e-3f);
  return x;
}

/* One query of one head in double precision. */
static double attend_one(const stored *q, const stored *keys, const stored *values, long head,
                         long high, long d) {
  double weight[S], top = -1e30, sum = 0, out = 0;
  long low = WINDOW && high > WINDOW ? high - WINDOW : 0;
  for (long s = low; s < high; s++) {
    weight[s] = 0;
    for (long i = 0; i < D; i++)
      weight[s] += (double)LOAD1(ACT, q + i) * LOAD1(ACT, keys + key_place(head, s, i));
    weight[s] *= SCALE;
    if (weight[s] > top) top = weight[s];
  }
  for (long s = low; s < high; s++) {
    double p = exp(weight[s] - top);
    sum += p, out += p * LOAD1(ACT, values + value_place(head, s) + d);
  }
  return out / sum;
}

int main(void) {
  int wrong = 0, position[1] = {POSITION};
  stored *q = random_numbers(T * H * D), *k = random_numbers(T * KV * D);
  stored *v = random_numbers(T * KV * D), *out = allocate(T * H * D, sizeof(stored));
  stored *keys = random_numbers((long)KV * S * D), *values = random_numbers((long)KV * S * D);
  for (NT = 1; NT <= 3; NT += 2) {
    float *scratch = allocate((size_t)NT * SCRATCH_FLOATS, 4);
    memset(out, 0xff, T * H * D * sizeof(stored));
    for (int core = 0; core < NT; core++) cache_write(keys, values, k, v, position, core);
    for (int core = 0; core < NT; core++)
      cached_attention(out, scratch, q, keys, values, position, core);
    for (long t = 0; t < T; t++)
      for (long h = 0; h < H; h++)
        for (long d = 0; d < D; d++) {
          long kv = h / (H / KV), at = (t * H + h) * D + d;
          if (h % (H / KV) == 0) {
            long from = (t * KV + kv) * D + d;
            wrong += keys[key_place(kv, POSITION + t, d)] != k[from];
            wrong += values[value_place(kv, POSITION + t) + d] != v[from];
          }
          double want = attend_one(q + (t * H + h) * D, keys, values, kv, POSITION + t + 1, d);
          double rounding = ACT == 0 ? 1e-5 : ACT == 1 ? 0x1.02p-8 : 0x1.02p-11;
          wrong += !(fabs(LOAD1(ACT, out + at) - want) <= fabs(want) * rounding + 2e-6);
        }
  }
  if (wrong) printf("%d numbers are wrong\n", wrong);
  return wrong != 0;
}
