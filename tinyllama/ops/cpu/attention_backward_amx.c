/* attention_backward.c with its products in AMX (attention_amx.h), with P = exp(S - lse) recomputed:
     delta = rowsum(dout * out)   dP = dout v^T         dS = P * (dP - delta)
     dv = P^T dout                dq = SCALE * dS k     dk = SCALE * dS^T q

   Shapes, scratch and division of the work are those of attention_backward.c, ACT is bfloat16. */

#define BACKWARD_SCRATCH_FLOATS ((7 * TILES + 8) * PACKED_FLOATS + 7 * HALF_SCORE_FLOATS)

typedef struct {
  float *keys, *values, *key_lines;     /* (TILES) of rows, rows, lines */
  float *dkeys, *dvalues;               /* (T, WIDTH) */
  float *query_columns, *dout_columns;
  float *query_pairs, *dout_pairs;
  float *rows, *pairs;                  /* of the tile that is packed */
  float *dqueries;                      /* [WIDTH][TILE] */
  float *scores, *dp;                   /* (TILE keys, TILE queries) */
  float *p_rows, *ds_rows;              /* P and dS [TILE keys][TILE / 2] */
  float *ds_pairs;                      /* dS, pairs of keys [TILE / 2][TILE] */
} backward_space;

typedef struct {
  float lse[TILE], delta[TILE];
} row_values;

/* P and dS of the strip of queries at `at`, from S and dP. */
INLINE void differentiate_strip(backward_space w, const row_values *values, strip s, long at) {
  vf lse[2], delta[2];
  for (int half = 0; half < 2; half++) {
    lse[half] = vload(values->lse + at + half * VW);
    delta[half] = vload(values->delta + at + half * VW);
  }
  for (long k = s.low; k < s.high; k += 2) {
    vf ds[2][2];
    for (int odd = 0; odd < 2; odd++) {
      long row = (k + odd) * TILE + at;
      vf p[2];
      for (int half = 0; half < 2; half++) {
        vf score = vload(w.scores + row + half * VW);
        p[half] = vexp_nonpositive(vfma(score, vset(SCALE), -lse[half]));
        ds[odd][half] = p[half] * (vload(w.dp + row + half * VW) - delta[half]);
      }
      *(halves_mem *)(w.p_rows + row / 2) = factor_encode_two(p[0], p[1]);
      *(halves_mem *)(w.ds_rows + row / 2) = factor_encode_two(ds[odd][0], ds[odd][1]);
    }
    for (int half = 0; half < 2; half++)
      vstore(w.ds_pairs + k / 2 * TILE + at + half * VW, factor_pairs(ds[0][half], ds[1][half]));
  }
}

INLINE void score_tile(backward_space w, const row_values *values, tile t) {
  long packed = t.key / TILE * PACKED_FLOATS;
  AS_WRITTEN for (long panel = 0; panel * NR < t.queries; panel++) {
    strip s = make_blocks(t, panel);
    long at = panel * NR;
    score_blocks(w.scores + at, s, w.keys + packed, w.query_columns + at);
    score_blocks(w.dp + at, s, w.values + packed, w.dout_columns + at);
    mask_strip(w.scores + at, t, s);
    differentiate_strip(w, values, s, at);
  }
}

/* A tile's query rows: packed, and delta. Addresses are of the tile's first row. */
INLINE void load_queries(backward_space w, row_values *values, const ELEM(ACT) *q,
                         const ELEM(ACT) *out, const ELEM(ACT) *dout, const float *lse,
                         long count) {
  pack_tile(w.rows, q, H, count);
  rows_to_columns(w.query_columns, w.rows);
  rows_to_pairs(w.query_pairs, w.rows);
  pack_tile(w.rows, dout, H, count);
  rows_to_columns(w.dout_columns, w.rows);
  rows_to_pairs(w.dout_pairs, w.rows);
  AS_WRITTEN for (long r = 0; r < TILE; r++) {
    vf sum = vset(0.0f);
    AS_WRITTEN for (long d = 0; d < D && r < count; d += VW) {
      long at = r * H * D + d;
      int n = (int)least(VW, D - d);
      sum = vfma(LOADN(ACT, out + at, n), LOADN(ACT, dout + at, n), sum);
    }
    values->delta[r] = hsum(sum);
    values->lse[r] = r < count ? lse[r] : 0.0f;
  }
}

/* Everything one tile of queries of one head contributes to what this thread owns. */
INLINE void differentiate(ELEM(ACT) *dq, backward_space w, const row_values *values,
                          const int *starts, long query, int own_queries, int shared, int core) {
  long count = least(TILE, T - query);
  clear(w.dqueries, (long)WIDTH * TILE);
  AS_WRITTEN for (long key = starts[query] / TILE * TILE; key < query + count; key += TILE) {
    int own_keys = owns(shared, key / TILE, core);
    if (!own_keys && !own_queries) continue;
    tile t = make_tile(starts, query, key);
    const float *lines = w.key_lines + key / TILE * PACKED_FLOATS;
    score_tile(w, values, t);
    if (own_keys) add_blocks_over_queries(w.dvalues + key * WIDTH, w.p_rows, w.dout_pairs, t);
    if (own_keys) add_blocks_over_queries(w.dkeys + key * WIDTH, w.ds_rows, w.query_pairs, t);
    AS_WRITTEN for (long at = 0; at < count && own_queries; at += NR) {
      strip s = make_blocks(t, at / NR);
      if (s.low < s.high) add_blocks_over_keys(w.dqueries + at, s, lines, w.ds_pairs + at);
    }
  }
  float scale[TILE];
  AS_WRITTEN for (long r = 0; r < TILE; r += VW) vstore(scale + r, vset(SCALE));
  if (own_queries) unpack_lines(dq, w.dqueries, scale, count);
}

NO_LIBC void KERNEL(ELEM(ACT) *restrict dq, ELEM(ACT) *restrict dk, ELEM(ACT) *restrict dv,
                    float *restrict scratch, const ELEM(ACT) *restrict dout,
                    const ELEM(ACT) *restrict out, const float *restrict lse,
                    const ELEM(ACT) *restrict q, const ELEM(ACT) *restrict k,
                    const ELEM(ACT) *restrict v, const int *restrict starts, int core_id) {
  backward_space w;
  w.keys = thread_scratch(scratch, BACKWARD_SCRATCH_FLOATS, core_id);
  w.values = w.keys + TILES * PACKED_FLOATS;
  w.key_lines = w.values + TILES * PACKED_FLOATS;
  w.dkeys = w.key_lines + TILES * PACKED_FLOATS;
  w.dvalues = w.dkeys + 2 * TILES * PACKED_FLOATS;
  w.query_columns = w.dvalues + 2 * TILES * PACKED_FLOATS;
  w.dout_columns = w.query_columns + PACKED_FLOATS;
  w.query_pairs = w.dout_columns + PACKED_FLOATS;
  w.dout_pairs = w.query_pairs + PACKED_FLOATS;
  w.rows = w.dout_pairs + PACKED_FLOATS;
  w.pairs = w.rows + PACKED_FLOATS;
  w.dqueries = w.pairs + PACKED_FLOATS;
  w.scores = w.dqueries + 2 * PACKED_FLOATS;
  w.dp = w.scores + SCORE_FLOATS;
  w.p_rows = w.dp + SCORE_FLOATS;
  w.ds_rows = w.p_rows + HALF_SCORE_FLOATS;
  w.ds_pairs = w.ds_rows + HALF_SCORE_FLOATS;
  tile_begin();
  AS_WRITTEN for (long n = 0; n < PAIRS_PER_THREAD; n++) {
    int shared = is_shared(n);
    long pair = pair_of(n, core_id), b = pair / KV, kv = pair % KV;
    long first = (b * T * KV + kv) * D;
    AS_WRITTEN for (long i = 0; i < TILES; i++) {
      long at = first + i * TILE * KV * D, count = least(TILE, T - i * TILE);
      float *rows = w.keys + i * PACKED_FLOATS;
      pack_tile(rows, k + at, KV, count);
      pack_tile(w.values + i * PACKED_FLOATS, v + at, KV, count);
      rows_to_pairs(w.pairs, rows);
      pairs_to_lines(w.key_lines + i * PACKED_FLOATS, w.pairs);
    }
    clear(w.dkeys, 4 * TILES * PACKED_FLOATS); /* dvalues too */
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
      unpack_row(dk + first + s * KV * D, w.dkeys + s * WIDTH, SCALE);
      unpack_row(dv + first + s * KV * D, w.dvalues + s * WIDTH, 1.0f);
    }
  }
  tile_end();
}
