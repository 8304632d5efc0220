/* Gradients of attention_forward.c, from its out and lse, with P = exp(S - lse) recomputed:
     delta = rowsum(dout * out)   dP = dout v^T         dS = P * (dP - delta)
     dv = P^T dout                dq = SCALE * dS k     dk = SCALE * dS^T q

   q, out, dout, dq (B, T, H, D); k, v, dk, dv (B, T, KV, D), all ACT; lse (B, H, T) float32;
   starts (B, T) int32. scratch: NT * BACKWARD_SCRATCH_FLOATS + 16 floats.

   dk and dv of a whole (sequence, key/value head) pair are summed in scratch, over its query heads
   too. For a pair that threads share, each thread completes dq for its own tiles of queries and dk,
   dv for its own tiles of keys. Score tiles that two threads need are computed by both, so that no
   thread waits for another or writes to its memory. */

#define BACKWARD_SCRATCH_FLOATS (4 * SEQUENCE_FLOATS + 5 * ROWS_FLOATS + 2 * SCORE_FLOATS)

typedef struct {
  float *keys, *values, *dkeys, *dvalues; /* (T, STRIDE) */
  float *queries, *douts, *dqueries;      /* (TILE, STRIDE) */
  float *query_panels, *dout_panels;      /* (TILE / NR, WIDTH, NR) */
  float *p, *ds;                          /* (TILE keys, TILE queries) */
} backward_space;

typedef struct {
  float lse[TILE], delta[TILE];
} row_values;

/* P and dS of a strip, in place of S and dP. */
INLINE void differentiate_half(float *p, float *ds, strip s, const float *lse,
                               const float *delta) {
  vf top = vload(lse), mean = vload(delta);
  for (long k = s.low * TILE; k < s.high * TILE; k += TILE) {
    vf x = vexp_nonpositive(vload(p + k) - top);
    vstore(p + k, x);
    vstore(ds + k, x * (vload(ds + k) - mean));
  }
}

INLINE void score_tile(backward_space w, const row_values *values, tile t) {
  AS_WRITTEN for (long panel = 0; panel * NR < t.queries; panel++) {
    strip s = make_strip(t, panel);
    long at = panel * NR;
    float *p = w.p + at, *ds = w.ds + at;
    score_strip(p, s, w.keys + t.key * STRIDE, w.query_panels + at * WIDTH);
    score_strip(ds, s, w.values + t.key * STRIDE, w.dout_panels + at * WIDTH);
    mask_strip(p, t, s);
    AS_WRITTEN for (int half = 0; half < NR; half += VW)
      differentiate_half(p + half, ds + half, s, values->lse + at + half,
                         values->delta + at + half);
    zero_strip(p, t, s);
    zero_strip(ds, t, s);
  }
}

/* out (keys, WIDTH) += scores rows. A group of MR keys takes the queries from its first key to the
   last one whose document begins at or before its last key. */
INLINE void add_over_queries(float *out, const float *scores, const float *rows, tile t) {
  AS_WRITTEN for (long d = 0; d < WIDTH; d += NR)
    AS_WRITTEN for (long k = 0; k < t.keys; k += MR) {
      long low = most(t.key + k - t.query, 0), high = t.queries;
      while (high > low && t.starts[t.query + high - 1] >= t.key + k + MR) high--;
      if (low < high)
        product(out + k * STRIDE + d, STRIDE, 1, 0, scores + k * TILE + low, TILE, 1,
                rows + low * STRIDE + d, STRIDE, high - low);
    }
}

/* A tile's query rows: packed, transposed, and delta. Addresses are of the tile's first row. */
INLINE void load_queries(backward_space w, row_values *values, const ELEM(ACT) *q,
                         const ELEM(ACT) *out, const ELEM(ACT) *dout, const float *lse,
                         long rows) {
  long padded = round_up(rows, NR);
  pack_rows(w.queries, q, H, SCALE, rows, padded);
  pack_rows(w.douts, dout, H, 1.0f, rows, padded);
  transpose_rows(w.query_panels, w.queries, padded);
  transpose_rows(w.dout_panels, w.douts, padded);
  AS_WRITTEN for (long r = 0; r < padded; r++) {
    vf sum = vset(0.0f);
    AS_WRITTEN for (long d = 0; d < D && r < rows; d += VW) {
      const ELEM(ACT) *at = out + r * H * D + d;
      vf value = d + VW <= D ? LOAD(ACT, at) : LOADN(ACT, at, (int)(D - d));
      sum = vfma(value, vload(w.douts + r * STRIDE + d), sum);
    }
    values->delta[r] = hsum(sum);
    values->lse[r] = r < rows ? lse[r] : 0.0f;
  }
}

/* Everything one tile of queries of one head contributes to what this thread owns. */
INLINE void differentiate(ELEM(ACT) *dq, backward_space w, const row_values *values,
                          const int *starts, long query, int own_queries, int shared, int core) {
  long rows = least(TILE, T - query);
  zero_rows(w.dqueries, round_up(rows, MR));
  AS_WRITTEN for (long key = starts[query] / TILE * TILE; key < query + rows; key += TILE) {
    int own_keys = owns(shared, key / TILE, core);
    if (!own_keys && !own_queries) continue;
    tile t = make_tile(starts, query, key);
    score_tile(w, values, t);
    if (own_keys) add_over_queries(w.dvalues + key * STRIDE, w.p, w.douts, t);
    if (own_keys) add_over_queries(w.dkeys + key * STRIDE, w.ds, w.queries, t);
    if (own_queries) add_over_keys(w.dqueries, 0, w.ds, w.keys + key * STRIDE, t);
  }
  AS_WRITTEN for (long r = 0; r < rows && own_queries; r++)
    unpack_row(dq + r * H * D, w.dqueries + r * STRIDE, SCALE);
}

NO_LIBC void KERNEL(ELEM(ACT) *restrict dq, ELEM(ACT) *restrict dk, ELEM(ACT) *restrict dv,
                    float *restrict scratch, const ELEM(ACT) *restrict dout,
                    const ELEM(ACT) *restrict out, const float *restrict lse,
                    const ELEM(ACT) *restrict q, const ELEM(ACT) *restrict k,
                    const ELEM(ACT) *restrict v, const int *restrict starts, int core_id) {
  backward_space w;
  w.keys = thread_scratch(scratch, BACKWARD_SCRATCH_FLOATS, core_id);
  w.values = w.keys + SEQUENCE_FLOATS;
  w.dkeys = w.values + SEQUENCE_FLOATS;
  w.dvalues = w.dkeys + SEQUENCE_FLOATS;
  w.queries = w.dvalues + SEQUENCE_FLOATS;
  w.douts = w.queries + ROWS_FLOATS;
  w.dqueries = w.douts + ROWS_FLOATS;
  w.query_panels = w.dqueries + ROWS_FLOATS;
  w.dout_panels = w.query_panels + ROWS_FLOATS;
  w.p = w.dout_panels + ROWS_FLOATS;
  w.ds = w.p + SCORE_FLOATS;
  AS_WRITTEN for (long n = 0; n < PAIRS_PER_THREAD; n++) {
    int shared = is_shared(n);
    long pair = pair_of(n, core_id), b = pair / KV, kv = pair % KV;
    long padded = round_up(T, MR), rows_at = (b * T * KV + kv) * D;
    pack_rows(w.keys, k + rows_at, KV, 1.0f, T, padded);
    pack_rows(w.values, v + rows_at, KV, 1.0f, T, padded);
    zero_rows(w.dkeys, padded);
    zero_rows(w.dvalues, padded);
    AS_WRITTEN for (long i = 0; i < GROUP * TILES; i++) {
      long head = kv * GROUP + i / TILES, query = i % TILES * TILE;
      long at = ((b * T + query) * H + head) * D;
      row_values values;
      load_queries(w, &values, q + at, out + at, dout + at, lse + (b * H + head) * T + query,
                   least(TILE, T - query));
      differentiate(dq + at, w, &values, starts + b * T, query, owns(shared, i, core_id), shared,
                    core_id);
    }
    AS_WRITTEN for (long s = 0; s < T; s++) {
      if (!owns(shared, s / TILE, core_id)) continue;
      unpack_row(dk + rows_at + s * KV * D, w.dkeys + s * STRIDE, 1.0f);
      unpack_row(dv + rows_at + s * KV * D, w.dvalues + s * STRIDE, 1.0f);
    }
  }
}
