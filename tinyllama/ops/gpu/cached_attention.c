/* Attention of one new token over a cache of keys and values, and its own key and value into it.

   position[0] is the token's place. The cache of S slots is keys (KV, S / LANES, D, LANES) and
   values (KV, S, D). PASS PARTS: it gets k and v (KV, D), and block (bx, key/value head bz) takes
   the PART slots from bx PART on, those up to the position, of which the last WINDOW, for the HEADS
   query heads of q (KV HEADS, D) that share them. parts (KV HEADS, BLOCKS, D + 2) float32 are sums
   of exp2(score - maximum) times value, then those of the exponentials, then the maximum.
   PASS JOINED: block bx is a query head; out (KV HEADS, D) from its parts.

   What the cache holds at the position is not used: the token's key and value come from k and v, so
   that no block depends on what another one writes. Only the block that writes there reads beside
   it, before a barrier.
   Macros: S, WINDOW, KV, HEADS, D, SCALE (1 / sqrt(D)), PASS, BLOCKS; THREADS is PART, not less
   than D. */
#define PARTS 0
#define JOINED 1
#define PART THREADS
#define LANES 16 /* of slots whose keys lie beside each other, see ops/cached_attention.py */
#define WIDTH (D + 2)
#define LOWEST -1e30f
#define ACROSS (D / VEC)
#define SUBSETS (THREADS / ACROSS) /* of slots, in the sum of values */
#define EACH_SUM UNROLL for (int h = 0; h < HEADS; h++) UNROLL for (int i = 0; i < VEC; i++)
#if PASS == PARTS
KERNEL_BEGIN(GLOBAL Element *keys, GLOBAL Element *values, GLOBAL float *parts,
             GLOBAL const Element *q, GLOBAL const Element *k, GLOBAL const Element *v,
             GLOBAL const int *position)
  SHARED float scratch[THREADS], query[HEADS * D], weight[HEADS * PART];
  SHARED float sums[(THREADS + ACROSS) * VEC]; /* the last row is for threads of no subset */
  const int at = position[0], first = bx * PART;
  const int seen = first + tid <= at && first + tid > at - WINDOW;
  /* Which of the slots are seen: from `begin` to `end`, none where the part has no such slot. */
  const int begin = at - WINDOW + 1 > first ? at - WINDOW + 1 - first : 0;
  const int end = at + 1 - first < PART ? at + 1 - first : PART;
  keys += (long)bz * S * D;
  values += (long)bz * S * D;
  k += bz * D;
  v += bz * D;
  for (int n = tid; n < HEADS * D; n += THREADS)
    query[n] = WIDEN(TYPE, q[(long)bz * HEADS * D + n]) * (SCALE * LOG2E);
  BARRIER;
  float sum[HEADS][VEC], x[VEC], score[HEADS];
  EACH_SUM sum[h][i] = 0;
  /* Scores: a thread has VEC neighbouring slots, and every VEC-th d. */
  const int slot = tid % (PART / VEC) * VEC, of_d = tid / (PART / VEC);
  const int from = first + slot <= at ? first + slot : 0;
  const int rows = end > begin ? D : 0; /* a part of which nothing is seen reads no keys */
  UNROLL_BY(4)
  for (int d = of_d; d < rows; d += VEC) {
    const float own = WIDEN(TYPE, k[d]);
    LOAD(TYPE, x, keys + ((long)(from / LANES) * D + d) * LANES + from % LANES);
    UNROLL
    for (int i = 0; i < VEC; i++) x[i] = first + slot + i == at ? own : x[i];
    EACH_SUM sum[h][i] += x[i] * query[h * D + d];
  }
  UNROLL
  for (int h = 0; h < HEADS; h++) {
    BARRIER;
    UNROLL
    for (int i = 0; i < VEC; i++) sums[of_d * PART + slot + i] = sum[h][i];
    BARRIER;
    score[h] = 0;
    for (int s = 0; s < VEC; s++) score[h] += sums[s * PART + tid];
  }
  float total[HEADS], highest[HEADS];
  UNROLL
  for (int h = 0; h < HEADS; h++) {
    highest[h] = block_max(seen ? score[h] : LOWEST, scratch, tid);
    const float e = seen ? EXP2(score[h] - highest[h]) : 0;
    total[h] = block_sum(e, scratch, tid);
    weight[h * PART + tid] = e;
  }
  BARRIER;
  /* The sum of values: a thread has VEC neighbouring d, and every SUBSETS-th slot. */
  const int subset = tid / ACROSS, d = tid % ACROSS * VEC;
  EACH_SUM sum[h][i] = 0;
  UNROLL_BY(4)
  for (int s = begin + subset; s < end; s += SUBSETS) {
    LOAD(TYPE, x, (first + s == at ? v : values + (long)(first + s) * D) + d);
    EACH_SUM sum[h][i] += weight[h * PART + s] * x[i];
  }
  float result[HEADS];
  const int column = tid < D ? tid : D - 1;
  UNROLL
  for (int h = 0; h < HEADS; h++) {
    BARRIER;
    UNROLL
    for (int i = 0; i < VEC; i++) sums[subset * D + d + i] = sum[h][i];
    BARRIER;
    result[h] = 0;
    for (int s = 0; s < SUBSETS; s++) result[h] += sums[s * D + column];
  }
  parts += ((long)bz * HEADS * BLOCKS + bx) * WIDTH;
  UNROLL
  for (int h = 0; h < HEADS; h++) {
    if (tid < D) parts[h * BLOCKS * WIDTH + tid] = result[h];
    if (tid == 0) {
      parts[h * BLOCKS * WIDTH + D] = total[h];
      parts[h * BLOCKS * WIDTH + D + 1] = highest[h];
    }
  }
  if (tid < D && first <= at && at < first + PART) {
    keys[((long)(at / LANES) * D + tid) * LANES + at % LANES] = k[tid];
    values[(long)at * D + tid] = v[tid];
  }
KERNEL_END

#else
KERNEL_BEGIN(GLOBAL Element *out, GLOBAL const float *parts, GLOBAL const int *position)
  const int count = position[0] / PART + 1, column = tid < D ? tid : D - 1;
  float highest = LOWEST, sum = 0, total = 0;
  parts += (long)bx * BLOCKS * WIDTH;
  for (int p = 0; p < count; p++) highest = MAXF(highest, parts[p * WIDTH + D + 1]);
  UNROLL_BY(4)
  for (int p = 0; p < count; p++) {
    const float share = EXP2(parts[p * WIDTH + D + 1] - highest);
    sum += share * parts[p * WIDTH + column];
    total += share * parts[p * WIDTH + D];
  }
  if (tid < D) STORE_ONE(TYPE, out + (long)bx * D + tid, sum / total);
KERNEL_END
#endif
