/* Tiles shared by the two attention kernels. Flash attention (Dao et al., 2022), causal and within
   documents: query t attends to keys s with starts[b, t] <= s <= t, and query head h reads
   key/value head h / (H / KV).

   Scores are computed transposed, S^T = K Q^T with queries along the vector lanes: softmax then
   needs no horizontal sums, and only Q (and dO) are ever transposed. All products run in one
   register-tiled micro-kernel, which adds an outer product of MR by NR numbers per step.

   Loops are AS_WRITTEN except those that do the arithmetic: clang would unroll each around the
   micro-kernel inside it, which takes three times as long to compile and runs no faster.

   Macros: B, T, H, KV, D, SCALE (1 / sqrt(D)), NT, ACT. starts must not decrease along a row. */

#define NR (2 * VW)
#ifndef MR
#if defined(TILE_AMX)
#define MR 32 /* attention_amx.h */
#elif defined(__AVX512F__) || defined(__aarch64__)
#define MR 12 /* 32 vector registers */
#else
#define MR 6 /* 16 vector registers */
#endif
#endif
/* Queries and keys in a tile: a multiple of MR and NR on every machine. */
#define TILE 96
#define TILES ((T + TILE - 1L) / TILE)
#define GROUP (H / KV)
/* The columns of a packed row that take part in products, and its stride: an odd number of 64-byte
   lines, so that a column of rows spreads over all cache sets. */
#define WIDTH ((D + NR - 1) / NR * NR)
#define STRIDE ((D + 31) / 32 * 32 + 16)
/* Floats in a packed tile of rows, in a whole packed sequence, in a tile of scores. */
#define ROWS_FLOATS ((long)TILE * STRIDE)
#define SEQUENCE_FLOATS (TILES * ROWS_FLOATS)
#define SCORE_FLOATS ((long)TILE * TILE)
/* Below every score, and still finite after a subtraction. */
#define MASKED -3e38f

INLINE long least(long a, long b) { return a < b ? a : b; }
INLINE long most(long a, long b) { return a > b ? a : b; }
INLINE long round_up(long n, long grain) { return (n + grain - 1) / grain * grain; }

/* Each thread's part of scratch, on a cache line. */
INLINE float *thread_scratch(float *scratch, long floats, int core) {
  __UINTPTR_TYPE__ line = ((__UINTPTR_TYPE__)scratch + 63) / 64 * 64;
  return (float *)line + core * floats;
}

/* ---- dividing the work ---- */

/* Each thread gets the same number of whole (sequence, key/value head) pairs; the few of the B * KV
   pairs that are left over are shared by all threads, tile by tile. */
#define PAIRS ((long)B * KV)
#define WHOLE_PAIRS (PAIRS / NT)
#define PAIRS_PER_THREAD (WHOLE_PAIRS + PAIRS % NT)
INLINE int is_shared(long n) { return n >= WHOLE_PAIRS; }
INLINE long pair_of(long n, int core) {
  return is_shared(n) ? WHOLE_PAIRS * NT + n - WHOLE_PAIRS : core * WHOLE_PAIRS + n;
}
/* Tiles of a shared pair go to the threads in the order 0 1 1 0 0 1 .., because a tile's causal work
   grows with its number. */
INLINE int owns(int shared, long tile, int core) {
  long turn = tile % (2 * NT);
  return !shared || (turn < NT ? turn : 2 * NT - 1 - turn) == core;
}

/* ---- packing ---- */

/* One row of D elements times `scale` as floats, zeros up to WIDTH. */
INLINE void pack_row(float *to, const ELEM(ACT) *from, float scale) {
  long d = 0;
  AS_WRITTEN for (; d + VW <= D; d += VW) vstore(to + d, LOAD(ACT, from + d) * scale);
  AS_WRITTEN for (; d < WIDTH; d += VW)
    vstore(to + d, d < D ? LOADN(ACT, from + d, (int)(D - d)) * scale : vset(0.0f));
}

INLINE void zero_rows(float *to, long rows) {
  AS_WRITTEN for (long r = 0; r < rows; r++)
    AS_WRITTEN for (long d = 0; d < WIDTH; d += VW) vstore(to + r * STRIDE + d, vset(0.0f));
}

/* Rows of a (rows, heads, D) array; zero rows follow up to `padded`. */
INLINE void pack_rows(float *to, const ELEM(ACT) *from, long heads, float scale, long rows,
                      long padded) {
  AS_WRITTEN for (long r = 0; r < rows; r++)
    pack_row(to + r * STRIDE, from + r * heads * D, scale);
  zero_rows(to + rows * STRIDE, padded - rows);
}

/* The inverse of pack_row. */
INLINE void unpack_row(ELEM(ACT) *to, const float *from, float scale) {
  long d = 0;
  AS_WRITTEN for (; d + VW <= D; d += VW) STORE(ACT, to + d, vload(from + d) * scale);
  if (d < D) STOREN(ACT, to + d, vload(from + d) * scale, (int)(D - d));
}

#if VW == 16
#define ZIP_LOW(a, b) \
  __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define ZIP_HIGH(a, b) \
  __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#elif VW == 8
#define ZIP_LOW(a, b) __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define ZIP_HIGH(a, b) __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#else
#define ZIP_LOW(a, b) __builtin_shufflevector(a, b, 0, 4, 1, 5)
#define ZIP_HIGH(a, b) __builtin_shufflevector(a, b, 2, 6, 3, 7)
#endif

/* VW by VW transpose: interleaving the halves log2(VW) times. */
INLINE void transpose_block(float *to, long to_stride, const float *from, long from_stride) {
  vf x[VW], y[VW];
#pragma clang loop unroll(full)
  for (int i = 0; i < VW; i++) x[i] = vload(from + i * from_stride);
#pragma clang loop unroll(full)
  for (int stage = 1; stage < VW; stage *= 2) {
#pragma clang loop unroll(full)
    for (int i = 0; i < VW / 2; i++) {
      y[2 * i] = ZIP_LOW(x[i], x[i + VW / 2]);
      y[2 * i + 1] = ZIP_HIGH(x[i], x[i + VW / 2]);
    }
#pragma clang loop unroll(full)
    for (int i = 0; i < VW; i++) x[i] = y[i];
  }
#pragma clang loop unroll(full)
  for (int i = 0; i < VW; i++) vstore(to + i * to_stride, x[i]);
}

/* Packed rows to panels of NR rows, (rows / NR, WIDTH, NR): panel p begins at p * WIDTH * NR. */
INLINE void transpose_rows(float *to, const float *from, long rows) {
  AS_WRITTEN for (long r = 0; r < rows; r += VW)
    AS_WRITTEN for (long d = 0; d < WIDTH; d += VW)
      transpose_block(to + r / NR * NR * WIDTH + d * NR + r % NR, NR, from + r * STRIDE + d,
                      STRIDE);
}

/* ---- the micro-kernel ---- */

/* C[r, j] = C[r, j] * keep[r] + sum_k A[r, k] B[k, j] for MR rows and NR columns; without `keep`
   the sum is added, or stored where `add` is 0. A[r, k] is a[r * a_row + k * a_step]. */
INLINE void product(float *c, long c_row, int add, const float *keep, const float *a, long a_row,
                    long a_step, const float *b, long b_step, long depth) {
  vf sum[MR][2];
#pragma clang loop unroll(full)
  for (int r = 0; r < MR; r++)
    for (int half = 0; half < 2; half++) {
      vf old = add ? vload(c + r * c_row + half * VW) : vset(0.0f);
      sum[r][half] = keep ? old * keep[r] : old;
    }
#pragma clang loop unroll_count(2)
  for (long k = 0; k < depth; k++) {
    vf left = vload(b), right = vload(b + VW);
#pragma clang loop unroll(full)
    for (int r = 0; r < MR; r++) {
      vf x = vset(a[r * a_row]);
      sum[r][0] = vfma(x, left, sum[r][0]);
      sum[r][1] = vfma(x, right, sum[r][1]);
    }
    a += a_step;
    b += b_step;
  }
#pragma clang loop unroll(full)
  for (int r = 0; r < MR; r++)
    for (int half = 0; half < 2; half++) vstore(c + r * c_row + half * VW, sum[r][half]);
}

/* ---- score tiles ---- */

/* A tile of queries [query, query + queries) against keys [key, key + keys). A strip is NR
   queries of it (one panel): keys outside [low, high) of the strip are attended by none of them.
   low is a multiple of MR; both count from `key`. */
typedef struct {
  const int *starts; /* of this sequence, T */
  long query, queries, key, keys;
} tile;
typedef struct {
  long first, last, low, high;
} strip;

INLINE tile make_tile(const int *starts, long query, long key) {
  tile t = {starts, query, least(TILE, T - query), key, 0};
  t.keys = least(TILE, query + t.queries - key);
  return t;
}

INLINE strip make_strip(tile t, long panel) {
  strip s;
  s.first = t.query + panel * NR;
  s.last = least(s.first + NR, t.query + t.queries) - 1;
  s.low = most(t.starts[s.first] - t.key, 0) / MR * MR;
  s.high = least(t.keys, s.last + 1 - t.key);
  if (s.low >= s.high) s.low = s.high = 0;
  return s;
}

/* scores (keys, TILE) of a strip: rows (a key or value each) times one panel (WIDTH, NR). */
INLINE void score_strip(float *scores, strip s, const float *rows, const float *panel) {
  AS_WRITTEN for (long k = s.low; k < s.high; k += MR)
    product(scores + k * TILE, TILE, 0, 0, rows + k * STRIDE, STRIDE, 1, panel, NR, D);
}

INLINE void mask_row(float *scores, int key, const vi *from, const vi *to) {
  AS_WRITTEN for (int half = 0; half < 2; half++) {
    vi seen = (from[half] <= key) & (to[half] >= key);
    vstore(scores + half * VW, vselect(seen, vload(scores + half * VW), vset(MASKED)));
  }
}

/* MASKED where a query of the strip does not attend to a key in [low, high). */
INLINE void mask_strip(float *scores, tile t, strip s) {
  long inside = least(t.starts[s.last] - t.key, s.high), after = most(s.first + 1 - t.key, s.low);
  if (inside <= s.low && after >= s.high) return;
  vi from[2], to[2];
  AS_WRITTEN for (int i = 0; i < NR; i++) {
    from[i / VW][i % VW] = t.starts[least(s.first + i, s.last)];
    to[i / VW][i % VW] = (int)s.first + i;
  }
  AS_WRITTEN for (long k = s.low; k < inside; k++)
    mask_row(scores + k * TILE, (int)(t.key + k), from, to);
  AS_WRITTEN for (long k = most(after, inside); k < s.high; k++)
    mask_row(scores + k * TILE, (int)(t.key + k), from, to);
}

/* Zeros for the keys of the tile outside [low, high). */
INLINE void zero_strip(float *scores, tile t, strip s) {
  long end = round_up(t.keys, MR);
  AS_WRITTEN for (long k = s.low == 0 ? s.high : 0; k < end;
                  k = k + 1 == s.low ? s.high : k + 1) {
    vstore(scores + k * TILE, vset(0.0f));
    vstore(scores + k * TILE + VW, vset(0.0f));
  }
}

/* out (queries, WIDTH) = out * keep + scores^T rows; keep is 1 where it is not given. A group of
   MR queries takes the keys from its first one's start to its last one. */
INLINE void add_over_keys(float *out, const float *keep, const float *scores, const float *rows,
                          tile t) {
  AS_WRITTEN for (long d = 0; d < WIDTH; d += NR)
    AS_WRITTEN for (long q = 0; q < t.queries; q += MR) {
      long low = most(t.starts[t.query + q] - t.key, 0);
      long high = least(t.keys, t.query + q + MR - t.key);
      if (low < high)
        product(out + q * STRIDE + d, STRIDE, 1, keep ? keep + q : 0, scores + low * TILE + q, 1,
                TILE, rows + low * STRIDE + d, STRIDE, high - low);
    }
}
