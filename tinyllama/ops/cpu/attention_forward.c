/* out = softmax(SCALE * q k^T) v over the keys that a query attends to (see attention.h), and
   lse = log(sum(exp(SCALE * q k^T))), the only tensor saved for the backward pass.

   q, out (B, T, H, D); k, v (B, T, KV, D), all ACT; lse (B, H, T) float32; starts (B, T) int32.
   scratch: NT * FORWARD_SCRATCH_FLOATS + 16 floats.

   Keys are processed tile by tile with a running maximum m and sum l for each query (Milakov and
   Gimelshein, 2018): m' = max(m, S), l' = l exp(m - m') + sum exp(S - m'), and likewise out. */

#define FORWARD_SCRATCH_FLOATS (2 * SEQUENCE_FLOATS + 3 * ROWS_FLOATS + SCORE_FLOATS)

typedef struct {
  float *keys, *values; /* (T, STRIDE) */
  float *queries, *out; /* (TILE, STRIDE) */
  float *panels;        /* (TILE / NR, WIDTH, NR) */
  float *scores;        /* (TILE keys, TILE queries) */
} forward_space;

typedef struct {
  float max[TILE], sum[TILE], keep[TILE];
} softmax;

/* exp(scores - max) of a strip in place, its queries' max and sum, and what their old sums and
   outputs must be multiplied by. */
INLINE void softmax_half(float *scores, strip s, float *max, float *sum, float *keep) {
  vf old = vload(max), top = old, total = vset(0.0f);
  for (long k = s.low; k < s.high; k++) top = vmax(vload(scores + k * TILE), top);
  for (long k = s.low; k < s.high; k++) {
    vf p = vexp_nonpositive(vload(scores + k * TILE) - top);
    vstore(scores + k * TILE, p);
    total += p;
  }
  vf factor = vexp_nonpositive(old - top);
  vstore(max, top);
  vstore(keep, factor);
  vstore(sum, vload(sum) * factor + total);
}

INLINE void attend_tile(forward_space w, softmax *state, tile t) {
  AS_WRITTEN for (long panel = 0; panel * NR < t.queries; panel++) {
    strip s = make_strip(t, panel);
    long at = panel * NR;
    float *scores = w.scores + at;
    score_strip(scores, s, w.keys + t.key * STRIDE, w.panels + at * WIDTH);
    mask_strip(scores, t, s);
    AS_WRITTEN for (int half = 0; half < NR; half += VW)
      softmax_half(scores + half, s, state->max + at + half, state->sum + at + half,
                   state->keep + at + half);
    zero_strip(scores, t, s);
  }
  add_over_keys(w.out, state->keep, w.scores, w.values + t.key * STRIDE, t);
}

/* One tile of queries of one head; q and out at its first row, lse at its first entry. */
INLINE void attend(ELEM(ACT) *out, float *lse, const ELEM(ACT) *q, const int *starts, long query,
                   forward_space w) {
  long rows = least(TILE, T - query);
  softmax state;
  AS_WRITTEN for (long i = 0; i < TILE; i += VW) {
    vstore(state.max + i, vset(-1e30f));
    vstore(state.sum + i, vset(0.0f));
    vstore(state.keep + i, vset(1.0f));
  }
  pack_rows(w.queries, q, H, SCALE, rows, round_up(rows, NR));
  transpose_rows(w.panels, w.queries, round_up(rows, NR));
  zero_rows(w.out, round_up(rows, MR));
  AS_WRITTEN for (long key = starts[query] / TILE * TILE; key < query + rows; key += TILE)
    attend_tile(w, &state, make_tile(starts, query, key));
  AS_WRITTEN for (long r = 0; r < rows; r++)
    unpack_row(out + r * H * D, w.out + r * STRIDE, 1.0f / state.sum[r]);
  AS_WRITTEN for (long r = 0; r < rows; r += VW) {
    vf value = vload(state.max + r) + vlog(vload(state.sum + r));
    if (r + VW <= rows)
      vstore(lse + r, value);
    else
      storen_0(lse + r, value, (int)(rows - r));
  }
}

NO_LIBC void KERNEL(ELEM(ACT) *restrict out, float *restrict lse, float *restrict scratch,
                    const ELEM(ACT) *restrict q, const ELEM(ACT) *restrict k,
                    const ELEM(ACT) *restrict v, const int *restrict starts, int core_id) {
  forward_space w;
  w.keys = thread_scratch(scratch, FORWARD_SCRATCH_FLOATS, core_id);
  w.values = w.keys + SEQUENCE_FLOATS;
  w.queries = w.values + SEQUENCE_FLOATS;
  w.panels = w.queries + ROWS_FLOATS;
  w.out = w.panels + ROWS_FLOATS;
  w.scores = w.out + ROWS_FLOATS;
  AS_WRITTEN for (long n = 0; n < PAIRS_PER_THREAD; n++) {
    long pair = pair_of(n, core_id), b = pair / KV, kv = pair % KV;
    pack_rows(w.keys, k + (b * T * KV + kv) * D, KV, 1.0f, T, round_up(T, MR));
    pack_rows(w.values, v + (b * T * KV + kv) * D, KV, 1.0f, T, round_up(T, MR));
    AS_WRITTEN for (long i = 0; i < GROUP * TILES; i++) {
      if (!owns(is_shared(n), i, core_id)) continue;
      long head = kv * GROUP + i / TILES, query = i % TILES * TILE;
      long at = ((b * T + query) * H + head) * D;
      attend(out + at, lse + (b * H + head) * T + query, q + at, starts + b * T, query, w);
    }
  }
}
