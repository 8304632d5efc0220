/* out = softmax(SCALE q k^T) v of T new tokens over the cache (cache.h), which holds their own keys
   and values already. Token t stands at position p = position + t and attends to positions p and
   before, with WINDOW > 0 to the last WINDOW of them. Only these are read.

   q, out (T, H, D) ACT; position (SEQUENCES) int32; scratch: NT * SCRATCH_FLOATS floats, the scores of ROWS
   rows. Other macros: H heads, ROWS, SCALE, WINDOW and those of cache.h.

   A row is a query head of a token. Those that share keys and values are ordered by token, and ROWS
   of them are computed together, so that what is read is used ROWS times. */

#define GROUP (H / KV)
#define ROWS_OF_HEAD ((long)T * GROUP) /* of keys and values */
#define VECTORS (KEY_LANES / VW)
/* Chains of additions per sum, enough to keep the multipliers busy. */
#define CHAINS (ROWS == 1 ? 4 : 1)
#define WIDE 4 /* vectors of out that are summed at a time */

typedef struct {
  long row, rows;         /* of ROWS_OF_HEAD */
  long low[ROWS], high[ROWS]; /* positions that each attends to, [low, high) */
  long first, end;        /* of all of them */
} strip;

INLINE strip make_strip(long row, long position) {
  strip s = {row, ROWS_OF_HEAD - row < ROWS ? ROWS_OF_HEAD - row : ROWS, {0}, {0}, 0, 0};
  AS_WRITTEN for (long i = 0; i < ROWS; i++) {
    long r = row + (i < s.rows ? i : s.rows - 1);
    s.high[i] = position + r / GROUP + 1;
    s.high[i] = s.high[i] < S ? s.high[i] : S;
    s.low[i] = WINDOW && s.high[i] > WINDOW ? s.high[i] - WINDOW : 0;
  }
  s.first = s.low[0] / KEY_LANES * KEY_LANES;
  s.end = s.high[ROWS - 1];
  return s;
}

/* scores[i][.] of KEY_LANES positions from `slot` on. */
INLINE void score_block(float *scores, const float (*query)[D], const ELEM(ACT) *keys) {
  vf sum[CHAINS][ROWS][VECTORS] = {{{{0}}}};
  long d = 0;
  for (; d + CHAINS <= D; d += CHAINS)
    for (int c = 0; c < CHAINS; c++)
      for (int j = 0; j < VECTORS; j++) {
        vf key = LOAD(ACT, keys + (d + c) * KEY_LANES + j * VW);
        for (int i = 0; i < ROWS; i++)
          sum[c][i][j] = vfma(vset(query[i][d + c]), key, sum[c][i][j]);
      }
  for (; d < D; d++)
    for (int j = 0; j < VECTORS; j++)
      for (int i = 0; i < ROWS; i++)
        sum[0][i][j] =
            vfma(vset(query[i][d]), LOAD(ACT, keys + d * KEY_LANES + j * VW), sum[0][i][j]);
  for (int i = 0; i < ROWS; i++)
    for (int j = 0; j < VECTORS; j++) {
      vf total = sum[0][i][j];
      for (int c = 1; c < CHAINS; c++) total += sum[c][i][j];
      vstore(scores + (long)i * S + j * VW, total);
    }
}

/* Scores of positions [first, end) of a row into probabilities times the sum that is returned;
   0 outside [low, high). */
INLINE float softmax_row(float *scores, long first, long end, long low, long high) {
  vi lane;
  for (int i = 0; i < VW; i++) lane[i] = i;
  vf top = vset(-1e30f), total = {0};
  for (long s = first; s < end; s += VW) {
    vi slot = lane + (int)s;
    vf x = vselect((slot >= (int)low) & (slot < (int)high), vload(scores + s), vset(-1e30f));
    vstore(scores + s, x);
    top = vmax(x, top);
  }
  vf most = vset(hmax(top));
  for (long s = first; s < end; s += VW) {
    vf x = vload(scores + s), p = vexp_nonpositive(x - most);
    p = vselect(x > -1e30f, p, vset(0.0f));
    vstore(scores + s, p);
    total += p;
  }
  return hsum(total);
}

/* out[i] = sum of p[i][s] v[s] for `count` columns from d on, at most WIDE vectors. */
INLINE void add_values(float (*out)[D + WIDE * VW], const float *p, const ELEM(ACT) *values,
                       strip s, long d, int vectors) {
  vf sum[ROWS][WIDE] = {{{0}}};
  for (long slot = s.first; slot < s.end; slot++) {
    vf value[WIDE];
    for (int j = 0; j < vectors; j++) {
      long left = D - d - j * VW;
      const ELEM(ACT) *from = values + slot * D + d + j * VW;
      value[j] = left >= VW ? LOAD(ACT, from) : LOADN(ACT, from, (int)left);
    }
    for (int i = 0; i < ROWS; i++)
      for (int j = 0; j < vectors; j++)
        sum[i][j] = vfma(vset(p[(long)i * S + slot]), value[j], sum[i][j]);
  }
  for (int i = 0; i < ROWS; i++)
    for (int j = 0; j < vectors; j++) vstore(out[i] + d + j * VW, sum[i][j]);
}

NO_LIBC void KERNEL(ELEM(ACT) *restrict out, float *restrict scratch, const ELEM(ACT) *restrict q,
            const ELEM(ACT) *restrict keys, const ELEM(ACT) *restrict values,
            const int *restrict position, int core_id) {
  float *scores = scratch + (long)core_id * SCRATCH_FLOATS;
  long strips = (ROWS_OF_HEAD + ROWS - 1) / ROWS;
  long begin = split(KV * strips, 1, core_id, NT), end = split(KV * strips, 1, core_id + 1, NT);
  for (long item = begin; item < end; item++) {
    long head = item / strips;
    strip s = make_strip(item % strips * ROWS, FIRST_OF(head));
    float query[ROWS][D], sums[ROWS][D + WIDE * VW];
    AS_WRITTEN for (long i = 0; i < ROWS; i++) {
      long r = s.row + (i < s.rows ? i : s.rows - 1);
      const ELEM(ACT) *from = q + (r / GROUP * H + head * GROUP + r % GROUP) * D;
      AS_WRITTEN for (long d = 0; d < D; d++) query[i][d] = LOAD1(ACT, from + d) * SCALE;
    }
    for (long slot = s.first; slot < s.end; slot += KEY_LANES)
      score_block(scores + slot, query, keys + key_place(head, slot, 0));
    float total[ROWS];
    long whole = (s.end + KEY_LANES - 1) / KEY_LANES * KEY_LANES;
    for (long i = 0; i < ROWS; i++)
      total[i] = softmax_row(scores + i * S, s.first, whole, s.low[i], s.high[i]);
    const ELEM(ACT) *rows = values + value_place(head, 0);
    long d = 0;
    for (; d + WIDE * VW <= D; d += WIDE * VW) add_values(sums, scores, rows, s, d, WIDE);
    for (; d < D; d += VW) add_values(sums, scores, rows, s, d, 1);
    AS_WRITTEN for (long i = 0; i < s.rows; i++) {
      long r = s.row + i;
      ELEM(ACT) *to = out + (r / GROUP * H + head * GROUP + r % GROUP) * D;
      vf share = vset(1.0f / total[i]);
      for (long d = 0; d < D; d += VW) {
        vf x = vload(sums[i] + d) * share;
        if (D - d >= VW) STORE(ACT, to + d, x);
        else STOREN(ACT, to + d, x, (int)(D - d));
      }
    }
  }
}
