/* Flash attention (Dao et al., 2022; the order of flash attention 2), causal and within documents:
   query t attends to keys s with starts[b, t] <= s <= t, and query head h reads key/value head
   h / (H / KV). starts must not decrease along a row.
     FORWARD      out (B, T, H, D), lse (B, H, T) float32: log2 of the sum of exp2 of the scores
     GRADIENT_Q   dq (B, T, H, D)
     GRADIENT_KV  dk, dv (B, T, KV, D), summed over the query heads that share them
   delta (B, H, T) float32 is the sum of dout out along D. Every sum has a fixed order: no atomics,
   hence two kernels for the gradients.

   A group of 32 lanes owns 16 rows (queries; in GRADIENT_KV keys), a block OWN_ROWS of them, and
   walks over tiles of TILE rows of the other side (keys; queries), which pass through BUFFERS
   places of shared memory. Scores stay in registers: as sums of one product, then as the left factor
   of the next. T is any length: rows from T on are zeros, masked and not stored.

   TURNED: q and k are turned by rotary positions (rope.c), and dq and dk are turned back by cos and
   sin (T, D/2) float32, so that they are gradients of what was turned. FORWARD does not read these.

   Macros: B, T, H, KV, D (a multiple of 16), PASS, SCALE (1 / sqrt(D)), TYPE, OWN_ROWS, TILE,
   BUFFERS; MASK_ONLY_EDGES, DYNAMIC, TURNED, each defined or not. */
#define FD (D / 8)
#define LOG2E 1.4426950408889634f
/* A masked score lies so far below the smallest maximum, LEAST, that its exponential is 0 even
   before a row has seen any key. */
#define LEAST -1e30f
#define MASKED -1e36f
#define INSIDE(row) (T % OWN_ROWS == 0 && T % TILE == 0 ? 1 : (row) < T)
#define CLAMPED(row) (INSIDE(row) ? (row) : T - 1) /* where to read what belongs to a row */
#ifdef DYNAMIC
#define TILES(n) SHARED_BY_LAUNCH(mem)
#else
#define TILES(n) SHARED Element mem[n];
#endif
#ifdef MASK_ONLY_EDGES /* a tile that all rows of a group see whole needs no comparisons */
#define UNLESS(whole) if (!(whole))
#else
#define UNLESS(whole)
#endif
#define TILE_OF(to, from, row0, ld) \
  load_tile(to, from, TILE, D, ld, row0, 0, T, D, T % TILE == 0, 1, tid)
#define OWN_TILE(to, from, row0, ld) \
  load_tile(to, from, OWN_ROWS, D, ld, row0, 0, T, D, T % OWN_ROWS == 0, 1, tid)

/* s (16 x TILE) = rows tile^T */
INLINE void products(PRIVATE Acc *s, LOCAL const Element *rows, int row, LOCAL const Element *tile,
                     int lane) {
  zero(s, TILE / 8);
  UNROLL_BY(UNROLL_K)
  for (int k = 0; k < D; k += KSTEP) {
    FragA a;
    load_a_rows(&a, rows, D, row, k, lane);
    UNROLL
    for (int j = 0; j < TILE / 8; j += 2) {
      FragB b[2];
      load_b_rows(b, tile, D, 8 * j, k, lane);
      multiply(&s[j], &a, &b[0]);
      multiply(&s[j + 1], &a, &b[1]);
    }
  }
}

/* out (16 x D) += s tile */
INLINE void add_products(PRIVATE Acc *out, PRIVATE Acc *s, LOCAL const Element *tile,
                         LOCAL float *scratch, int row, int lane) {
#if FRAGMENT == FRAGMENT_FMA
  BARRIER;
  for (int j = 0; j < TILE / 8; j++)
    for (int e = 0; e < 4; e++) scratch[(row + ROW(e)) * TILE + 8 * j + COL(e)] = GET(s[j], e);
  BARRIER;
#endif
  UNROLL
  for (int k = 0; k < TILE; k += KSTEP) {
    FragA a;
#if FRAGMENT == FRAGMENT_FMA
    for (int h = 0; h < 2; h++) a.v[h] = scratch[(row + ROW(2 * h)) * TILE + k];
#else
    results_as_a(&a, s + k / 8);
#endif
    UNROLL
    for (int j = 0; j < FD; j += 2) {
      FragB b[2];
      load_b_results(b, tile, D, 8 * j, k, lane);
      multiply(&out[j], &a, &b[0]);
      multiply(&out[j + 1], &a, &b[1]);
    }
  }
}

/* A group's 16 rows from `row0` on, times a factor for a lane's upper and one for its lower row. */
INLINE void store_rows(GLOBAL Element *to, int ld, PRIVATE Acc *o, int row0, float upper,
                       float lower, int lane) {
  UNROLL
  for (int e = 0; e < 4; e += 2)
    if (INSIDE(row0 + ROW(e)))
      UNROLL
      for (int j = 0; j < FD; j++)
        STORE2(TYPE, to + (long)(row0 + ROW(e)) * ld + 8 * j + COL(0),
               GET(o[j], e) * (e ? lower : upper), GET(o[j], e + 1) * (e ? lower : upper));
}

#ifdef TURNED
#define ANGLES , GLOBAL const float *cos, GLOBAL const float *sin
#define TURN_BACK(o, row0) turn_back(o, row0, cos, sin, lane);
/* Pairs of columns that lie D/2 apart, by the negative angles: a lane holds both. */
INLINE void turn_back(PRIVATE Acc *o, int row0, GLOBAL const float *cos, GLOBAL const float *sin,
                      int lane) {
  UNROLL
  for (int e = 0; e < 4; e++) {
    const int row = row0 + ROW(e), at = CLAMPED(row) * (D / 2) + COL(e);
    UNROLL
    for (int j = 0; j < FD / 2; j++) {
      const float first = GET(o[j], e), second = GET(o[j + FD / 2], e);
      const float c = cos[at + 8 * j], s = sin[at + 8 * j];
      GET(o[j], e) = first * c + second * s;
      GET(o[j + FD / 2], e) = second * c - first * s;
    }
  }
}
#else
#define ANGLES
#define TURN_BACK(o, row0)
#endif

/* x = op over all lanes that hold the same rows */
#define ACROSS(x, op)                                        \
  x = op(x, exchanged(x, ACROSS_ROW_1, scratch, tid));       \
  x = op(x, exchanged(x, ACROSS_ROW_2, scratch, tid));
#define ADD(a, b) ((a) + (b))
#define EACH_SCORE \
  UNROLL for (int j = 0; j < TILE / 8; j++) UNROLL for (int e = 0; e < 4; e++)
#if FRAGMENT == FRAGMENT_FMA
#define SCRATCH SHARED float scratch[OWN_ROWS * TILE];
#else
#define SCRATCH LOCAL float *scratch = 0;
#endif

#if PASS == GRADIENT_KV
KERNEL_BEGIN(GLOBAL Element *dk, GLOBAL Element *dv, GLOBAL const Element *q,
             GLOBAL const Element *k, GLOBAL const Element *v, GLOBAL const Element *dout,
             GLOBAL const float *lse, GLOBAL const float *delta, GLOBAL const int *starts ANGLES)
  TILES((2 * OWN_ROWS + 2 * BUFFERS * TILE) * D)
  SCRATCH
  const int b = bz / KV, kv = bz % KV, k0 = bx * OWN_ROWS, row = 16 * group;
  q += (long)b * T * H * D;
  dout += (long)b * T * H * D;
  k += (long)b * T * KV * D + kv * D;
  v += (long)b * T * KV * D + kv * D;
  dk += (long)b * T * KV * D + kv * D;
  dv += (long)b * T * KV * D + kv * D;
  starts += b * T;
  lse += (long)b * H * T;
  delta += (long)b * H * T;
  const int upper = k0 + row + ROW(0), lower = upper + 8;
  OWN_TILE(mem, k, k0, KV * D);
  OWN_TILE(mem + OWN_ROWS * D, v, k0, KV * D);
  Acc gk[FD], gv[FD];
  zero(gk, FD);
  zero(gv, FD);
  /* Tiles of queries from that of the first key to the end of the last key's document, of one query
     head after another: step n is tile n % count of the (n / count)-th head. */
  const int first = k0 / TILE;
  int count = 1;
  while ((first + count) * TILE < T && starts[(first + count) * TILE] < k0 + OWN_ROWS) count++;
  const int total = count * (H / KV);
#define FETCH(n)                                                                         \
  {                                                                                      \
    const int head = kv * (H / KV) + (n) / count, row0 = (first + (n) % count) * TILE;   \
    LOCAL Element *to = mem + (2 * OWN_ROWS + 2 * ((n) % BUFFERS) * TILE) * D;           \
    TILE_OF(to, q + head * D, row0, H * D);                                              \
    TILE_OF(to + TILE * D, dout + head * D, row0, H * D);                                \
  }
  if (BUFFERS > 1) FETCH(0)
  COMMIT();
  for (int n = 0; n < total; n++) {
    if (BUFFERS == 1) {
      BARRIER;
      FETCH(n)
      COMMIT();
    }
    LOCAL const Element *qt = mem + (2 * OWN_ROWS + 2 * (n % BUFFERS) * TILE) * D;
    const int h = kv * (H / KV) + n / count, q0 = (first + n % count) * TILE;
    GLOBAL const float *lse_of = lse + (long)h * T, *delta_of = delta + (long)h * T;
    WAIT(0);
    BARRIER;
    if (BUFFERS > 1 && n + 1 < total) FETCH(n + 1)
    COMMIT();
    Acc s[TILE / 8], dp[TILE / 8];
    products(s, mem, row, qt, lane);
    UNLESS(k0 + row + 15 <= q0 && INSIDE(q0 + TILE - 1) && k0 + row >= starts[q0 + TILE - 1]) {
      EACH_SCORE {
        const int query = q0 + 8 * j + COL(e), key = e < 2 ? upper : lower;
        const int seen = INSIDE(query) && key <= query && key >= starts[CLAMPED(query)];
        GET(s[j], e) = seen ? GET(s[j], e) : MASKED;
      }
    }
    EACH_SCORE GET(s[j], e) =
        EXP2(GET(s[j], e) * (SCALE * LOG2E) - lse_of[CLAMPED(q0 + 8 * j + COL(e))]);
    products(dp, mem + OWN_ROWS * D, row, qt + TILE * D, lane); /* here: fewer registers */
    add_products(gv, s, qt + TILE * D, scratch, row, lane);
    EACH_SCORE GET(s[j], e) *= GET(dp[j], e) - delta_of[CLAMPED(q0 + 8 * j + COL(e))];
    add_products(gk, s, qt, scratch, row, lane);
  }
  TURN_BACK(gk, k0 + row)
  store_rows(dk, KV * D, gk, k0 + row, SCALE, SCALE, lane);
  store_rows(dv, KV * D, gv, k0 + row, 1, 1, lane);
KERNEL_END

#else /* FORWARD and GRADIENT_Q: rows of queries, tiles of keys and values */
#if PASS == FORWARD
#define OWN_TILES 1
KERNEL_BEGIN(GLOBAL Element *out, GLOBAL float *lse, GLOBAL const Element *q,
             GLOBAL const Element *k, GLOBAL const Element *v, GLOBAL const int *starts ANGLES)
#else
#define OWN_TILES 2
KERNEL_BEGIN(GLOBAL Element *out, GLOBAL const Element *q, GLOBAL const Element *k,
             GLOBAL const Element *v, GLOBAL const Element *dout, GLOBAL const float *lse,
             GLOBAL const float *delta, GLOBAL const int *starts ANGLES)
#endif
  TILES((OWN_TILES * OWN_ROWS + 2 * BUFFERS * TILE) * D)
  SCRATCH
  /* The rows that see the most keys come first: the short ones then fill the gaps at the end. */
  const int q0 = ((T + OWN_ROWS - 1) / OWN_ROWS - 1 - bx) * OWN_ROWS, row = 16 * group;
  const int b = bz / H, h = bz % H, kv = h / (H / KV);
  q += (long)b * T * H * D + h * D;
  out += (long)b * T * H * D + h * D;
  k += (long)b * T * KV * D + kv * D;
  v += (long)b * T * KV * D + kv * D;
  starts += b * T;
  lse += ((long)b * H + h) * T;
  const int upper = q0 + row + ROW(0), lower = upper + 8;
  const int upper_start = starts[CLAMPED(upper)], lower_start = starts[CLAMPED(lower)];
  const int newest = starts[CLAMPED(q0 + row + 15)];
  (void)newest; /* read with MASK_ONLY_EDGES alone */
  const int first = starts[q0] / TILE, last = CLAMPED(q0 + OWN_ROWS - 1) / TILE;
  OWN_TILE(mem, q, q0, H * D);
#if PASS == GRADIENT_Q
  dout += (long)b * T * H * D + h * D;
  delta += ((long)b * H + h) * T;
  OWN_TILE(mem + OWN_ROWS * D, dout, q0, H * D);
  const float upper_lse = lse[CLAMPED(upper)], lower_lse = lse[CLAMPED(lower)];
  const float upper_delta = delta[CLAMPED(upper)], lower_delta = delta[CLAMPED(lower)];
#else
  float upper_max = LEAST, lower_max = LEAST, upper_sum = 0, lower_sum = 0;
#endif
  Acc o[FD];
  zero(o, FD);
#define FETCH(t)                                                                              \
  {                                                                                           \
    LOCAL Element *to = mem + (OWN_TILES * OWN_ROWS + 2 * (((t) - first) % BUFFERS) * TILE) * D; \
    TILE_OF(to, k, (t) * TILE, KV * D);                                                       \
    TILE_OF(to + TILE * D, v, (t) * TILE, KV * D);                                            \
  }
  if (BUFFERS > 1) FETCH(first)
  COMMIT();
  for (int t = first; t <= last; t++) {
    if (BUFFERS == 1) {
      BARRIER;
      FETCH(t)
      COMMIT();
    }
    LOCAL const Element *kt =
        mem + (OWN_TILES * OWN_ROWS + 2 * ((t - first) % BUFFERS) * TILE) * D;
    WAIT(0);
    BARRIER;
    if (BUFFERS > 1 && t < last) FETCH(t + 1)
    COMMIT();
    Acc s[TILE / 8];
    products(s, mem, row, kt, lane);
#if PASS == GRADIENT_Q
    Acc dp[TILE / 8];
    products(dp, mem + OWN_ROWS * D, row, kt + TILE * D, lane);
#endif
    UNLESS(t * TILE + TILE - 1 <= q0 + row && t * TILE >= newest) {
      EACH_SCORE {
        const int key = t * TILE + 8 * j + COL(e);
        const int seen =
            key <= (e < 2 ? upper : lower) && key >= (e < 2 ? upper_start : lower_start);
        GET(s[j], e) = seen ? GET(s[j], e) : MASKED;
      }
    }
#if PASS == GRADIENT_Q
    EACH_SCORE GET(s[j], e) =
        EXP2(GET(s[j], e) * (SCALE * LOG2E) - (e < 2 ? upper_lse : lower_lse)) *
        (GET(dp[j], e) - (e < 2 ? upper_delta : lower_delta));
    add_products(o, s, kt, scratch, row, lane);
#else
    float upper_new = upper_max, lower_new = lower_max;
    EACH_SCORE {
      if (e < 2)
        upper_new = MAXF(upper_new, GET(s[j], e));
      else
        lower_new = MAXF(lower_new, GET(s[j], e));
    }
    ACROSS(upper_new, MAXF)
    ACROSS(lower_new, MAXF)
    const float upper_shrink = EXP2((upper_max - upper_new) * (SCALE * LOG2E));
    const float lower_shrink = EXP2((lower_max - lower_new) * (SCALE * LOG2E));
    upper_max = upper_new;
    lower_max = lower_new;
    upper_sum *= upper_shrink;
    lower_sum *= lower_shrink;
    UNROLL
    for (int j = 0; j < FD; j++)
      UNROLL
      for (int e = 0; e < 4; e++) GET(o[j], e) *= e < 2 ? upper_shrink : lower_shrink;
    const float upper_base = upper_max * (SCALE * LOG2E), lower_base = lower_max * (SCALE * LOG2E);
    EACH_SCORE {
      const float x = EXP2(GET(s[j], e) * (SCALE * LOG2E) - (e < 2 ? upper_base : lower_base));
      GET(s[j], e) = x;
      if (e < 2)
        upper_sum += x;
      else
        lower_sum += x;
    }
    add_products(o, s, kt + TILE * D, scratch, row, lane);
#endif
  }
#if PASS == GRADIENT_Q
  TURN_BACK(o, q0 + row)
  store_rows(out, H * D, o, q0 + row, SCALE, SCALE, lane);
#else
  ACROSS(upper_sum, ADD)
  ACROSS(lower_sum, ADD)
  if (LANE_COL == 0) {
    if (INSIDE(upper)) lse[upper] = upper_max * (SCALE * LOG2E) + LOG2(upper_sum);
    if (INSIDE(lower)) lse[lower] = lower_max * (SCALE * LOG2E) + LOG2(lower_sum);
  }
  store_rows(out, H * D, o, q0 + row, 1 / upper_sum, 1 / lower_sum, lane);
#endif
KERNEL_END
#endif
