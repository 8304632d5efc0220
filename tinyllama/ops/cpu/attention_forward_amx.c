/* attention_forward.c with its products in AMX (attention_amx.h): out = softmax(SCALE * q k^T) v over
   the keys that a query attends to, and lse = log(sum(exp(SCALE * q k^T))).

   Shapes, scratch and division of the work are those of attention_forward.c, ACT is bfloat16. The
   sum of a row of P is taken before P is rounded. */

#define FORWARD_SCRATCH_FLOATS ((2 * TILES + 5) * PACKED_FLOATS + 3 * HALF_SCORE_FLOATS)

typedef struct {
  float *keys, *values; /* (TILES) of rows, of lines */
  float *queries;       /* columns */
  float *rows, *pairs;  /* of the tile that is packed */
  float *out;           /* [WIDTH][TILE] */
  float *scores;        /* (TILE keys, TILE queries) */
  float *weights;       /* P, pairs of keys [TILE / 2][TILE] */
} forward_space;

/* Of each query of a tile, in units of q k^T: the largest score so far; the sum of its weights. */
typedef struct {
  float max[TILE], sum[TILE];
} softmax;

/* exp(SCALE * (scores - max)) of VW queries as `weights`, their max and sum; returns what their old
   sums and outputs must be multiplied by. */
INLINE vf softmax_half(float *weights, const float *scores, strip s, float *max, float *sum) {
  vf old = vload(max), top = old, scale = vset(SCALE), total = vset(0.0f);
  for (long k = s.low; k < s.high; k++) top = vmax(vload(scores + k * TILE), top);
  vf shift = top * -SCALE;
  for (long k = s.low; k < s.high; k += 2) {
    vf even = vexp_nonpositive(vfma(vload(scores + k * TILE), scale, shift));
    vf odd = vexp_nonpositive(vfma(vload(scores + (k + 1) * TILE), scale, shift));
    vstore(weights + k / 2 * TILE, factor_pairs(even, odd));
    total += even + odd;
  }
  vf keep = vexp_nonpositive(vfma(old, scale, shift));
  vstore(max, top);
  vstore(sum, vload(sum) * keep + total);
  return keep;
}

INLINE void attend_strip(forward_space w, softmax *state, tile t, long panel) {
  strip s = make_blocks(t, panel);
  if (s.low >= s.high) return;
  long at = panel * NR, packed = t.key / TILE * PACKED_FLOATS;
  float *scores = w.scores + at, *out = w.out + at;
  score_blocks(scores, s, w.keys + packed, w.queries + at);
  mask_strip(scores, t, s);
  AS_WRITTEN for (int half = 0; half < NR; half += VW) {
    vf keep = softmax_half(w.weights + at + half, scores + half, s, state->max + at + half,
                           state->sum + at + half);
    AS_WRITTEN for (long d = 0; d < WIDTH; d++)
      vstore(out + d * TILE + half, vload(out + d * TILE + half) * keep);
  }
  add_blocks_over_keys(out, s, w.values + packed, w.weights + at);
}

/* One tile of queries of one head; q and out at its first row, lse at its first entry. */
INLINE void attend(ELEM(ACT) *out, float *lse, const ELEM(ACT) *q, const int *starts, long query,
                   forward_space w) {
  long count = least(TILE, T - query);
  softmax state;
  AS_WRITTEN for (long i = 0; i < TILE; i += VW) {
    vstore(state.max + i, vset(-1e30f));
    vstore(state.sum + i, vset(0.0f));
  }
  pack_tile(w.rows, q, H, count);
  rows_to_columns(w.queries, w.rows);
  clear(w.out, (long)WIDTH * TILE);
  AS_WRITTEN for (long key = starts[query] / TILE * TILE; key < query + count; key += TILE) {
    tile t = make_tile(starts, query, key);
    AS_WRITTEN for (long panel = 0; panel * NR < count; panel++) attend_strip(w, &state, t, panel);
  }
  float share[TILE];
  AS_WRITTEN for (long r = 0; r < count; r += VW) {
    vf sum = vload(state.sum + r), value = vload(state.max + r) * SCALE + vlog(sum);
    storen_0(lse + r, value, (int)least(VW, count - r));
    vstore(share + r, 1.0f / sum);
  }
  unpack_lines(out, w.out, share, count);
}

NO_LIBC void KERNEL(ELEM(ACT) *restrict out, float *restrict lse, float *restrict scratch,
                    const ELEM(ACT) *restrict q, const ELEM(ACT) *restrict k,
                    const ELEM(ACT) *restrict v, const int *restrict starts, int core_id) {
  forward_space w;
  w.keys = thread_scratch(scratch, FORWARD_SCRATCH_FLOATS, core_id);
  w.values = w.keys + TILES * PACKED_FLOATS;
  w.queries = w.values + TILES * PACKED_FLOATS;
  w.rows = w.queries + PACKED_FLOATS;
  w.pairs = w.rows + PACKED_FLOATS;
  w.out = w.pairs + PACKED_FLOATS;
  w.scores = w.out + 2 * PACKED_FLOATS;
  w.weights = w.scores + SCORE_FLOATS;
  tile_begin();
  AS_WRITTEN for (long n = 0; n < PAIRS_PER_THREAD; n++) {
    long pair = pair_of(n, core_id), b = pair / KV, kv = pair % KV;
    AS_WRITTEN for (long i = 0; i < TILES; i++) {
      long at = ((b * T + i * TILE) * KV + kv) * D, count = least(TILE, T - i * TILE);
      pack_tile(w.keys + i * PACKED_FLOATS, k + at, KV, count);
      pack_tile(w.rows, v + at, KV, count);
      rows_to_pairs(w.pairs, w.rows);
      pairs_to_lines(w.values + i * PACKED_FLOATS, w.pairs);
    }
    AS_WRITTEN for (long i = 0; i < GROUP * TILES; i++) {
      if (!owns(is_shared(n), i, core_id)) continue;
      long head = kv * GROUP + i / TILES, query = i % TILES * TILE;
      long at = ((b * T + query) * H + head) * D;
      attend(out + at, lse + (b * H + head) * T + query, q + at, starts + b * T, query, w);
    }
  }
  tile_end();
}
