/* dw (V, H) float32: row v is the sum of dout (N, H) over the tokens with id v, in their order.
   order and sorted come from embedding_order.c. A block has ENTRIES rows and finds out where the
   tokens of each begin; a group of 32 lanes sums a row's 32 VEC columns from (32 bz VEC) on.
   Macros: N, V, H, ENTRIES (less than THREADS). */
#define GROUPS (THREADS / 32)
KERNEL_BEGIN(GLOBAL float *dw, GLOBAL const Element *dout, GLOBAL const int *order,
             GLOBAL const int *sorted)
  SHARED int begin[THREADS];
  const int v0 = bx * ENTRIES, col = (bz * 32 + lane) * VEC, from = col < H ? col : 0;
  int low = 0, high = N; /* the first token with id v0 + tid or more lies between */
  while (low < high) {
    const int middle = (low + high) / 2, below = sorted[middle] < v0 + tid;
    low = below ? middle + 1 : low;
    high = below ? high : middle;
  }
  begin[tid] = low;
  BARRIER;
  for (int e = group; e < ENTRIES; e += GROUPS) {
    float sum[VEC];
    UNROLL
    for (int k = 0; k < VEC; k++) sum[k] = 0;
    UNROLL_BY(4)
    for (int i = begin[e]; i < begin[e + 1]; i++) {
      float x[VEC];
      LOAD(TYPE, x, dout + (long)order[i] * H + from);
      UNROLL
      for (int k = 0; k < VEC; k++) sum[k] += x[k];
    }
    if (v0 + e < V && col < H) STORE(0, dw + (long)(v0 + e) * H + col, sum);
  }
KERNEL_END
