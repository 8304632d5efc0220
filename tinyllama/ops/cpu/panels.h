/* Packs the factors of a product (gemm.c) into panels, and adds its sums to what is there.

   Panels consist of slots of 4 bytes, a float or (COMPUTE_BF16) a pair of bfloat16 of consecutive
   k (pairs.h, placed before this file), so that the same code packs both. The tile that multiplies them is tile_vector.h or tile_amx.h.

   A file that stores B differently (int4.h) is placed before this one and defines B_PARAMS (its
   parameters), B_ARGS (their names), B_IS_PACKED_OTHERWISE, pack_b and for LAYOUT 0 DOT_B (a row of
   B times rows of A) and DOT_BEGIN (what a thread does before its first row, in a
   scratch of DOT_FLOATS). */

#ifndef ACCUMULATE
#define ACCUMULATE 0
#endif
#ifndef ADDEND
#define ADDEND 0
#endif
#ifndef COMPUTE_BF16
#define COMPUTE_BF16 0
#endif
#ifndef MANY_ROWS
#define MANY_ROWS 0
#endif

/* Panels of B that are packed at a time, before the first block of A needs them. */
#ifndef GROUP
#define GROUP 4
#endif

#define CEIL(a, b) (((a) + (b)-1) / (b))
#define ROUND(a, b) (CEIL(a, b) * (b))
#define MIN(a, b) ((a) < (b) ? (a) : (b))

/* K in slots; panels of equal depth, a multiple of the unrolling; blocks of B of whole panels. */
#define PAIR (1 + COMPUTE_BF16)
#define SLOTS CEIL(K, PAIR)
#define DEPTH ROUND(CEIL(SLOTS, CEIL(SLOTS, KC)), TILE_K)
#define BLOCK_PANELS MIN(CEIL(SLOTS, DEPTH), CEIL(KB, DEPTH))
#define BLOCK_COLS MIN(ROUND(N, NR), BC / (BLOCK_PANELS * DEPTH) / NR * NR)
#define BLOCK_ROWS MIN(ROUND(M, MR), ROUND(MC, MR))

/* For a 16-bit C, sums over more than one panel are kept in float32: for one block of rows, or for
   all rows of the thread where B is not packed in its whole depth. */
#define PARTIAL (C_T != 0 && SLOTS > DEPTH)
#define B_SLOTS (BLOCK_PANELS * DEPTH * BLOCK_COLS)
/* Rows are KC apart, even if less is used, because the tile reads fastest at a constant distance.
   Columns are packed in whole vectors, which reach beyond the last of a panel's MR. */
#ifdef TILE_AMX
#define A_IN_COLUMNS 0
#else
#define A_IN_COLUMNS (LAYOUT == 2)
#endif
#define A_PANEL (A_IN_COLUMNS ? MR * DEPTH + VW : MR * KC)
#define A_SLOTS (BLOCK_ROWS / MR * A_PANEL)
#define PARTIAL_ROWS (SLOTS > BLOCK_PANELS * DEPTH ? ROUND(M, MR) : BLOCK_ROWS)
#define PARTIAL_FLOATS (PARTIAL ? (long)PARTIAL_ROWS * BLOCK_COLS : 0)

#ifndef DOT_FLOATS
#define DOT_FLOATS 0
#endif
#define NEEDED_FLOATS (B_SLOTS + A_SLOTS + PARTIAL_FLOATS)
#ifndef SCRATCH_FLOATS
#define SCRATCH_FLOATS ROUND(NEEDED_FLOATS > DOT_FLOATS ? NEEDED_FLOATS : DOT_FLOATS, 1024)
#endif

typedef float slot;
typedef unsigned short half_mem __attribute__((may_alias));
typedef const ELEM(A_T) * a_ptr;
typedef const ELEM(B_T) * b_ptr;

/* ---- packing ---- */

#define ENCODED(code, p) ENCODED_(code, p)
#define ENCODED_(code, p) encoded_##code(p)
INLINE vh encoded_0(const elem_0 *p) { return factor_encode(load_0(p)); }
INLINE vh encoded_1(const elem_1 *p) { return *(const vh_mem *)p; }
INLINE vh encoded_2(const elem_2 *p) { return factor_encode(load_2(p)); }
#define ENCODEDN(code, p, n) factor_encode(LOADN(code, p, n))

#ifdef PAIRS_BY_PROCESSOR
#define ENCODED_TWO(code, p) factor_encode_two(LOAD(code, p), LOAD(code, (p) + VW))
#endif

/* `count` elements that are contiguous along k -> CEIL(count, PAIR) slots. */
#ifdef ENCODED_TWO
#define PACK_TWICE(code)                                \
  for (; (code) != 1 && k + 2 * VW <= count; k += 2 * VW) \
    *(halves_mem *)(half + k) = ENCODED_TWO(code, in + k);
#else
#define PACK_TWICE(code)
#endif
#define DEFINE_PACK_ROW(name, code)                                                          \
  INLINE void name(slot *restrict out, const ELEM(code) *restrict in, int count) {           \
    int k = 0;                                                                               \
    if (!COMPUTE_BF16) {                                                                     \
      for (; k + VW <= count; k += VW) vstore(out + k, LOAD(code, in + k));                  \
      AS_WRITTEN for (; k < count; k++) out[k] = LOAD1(code, in + k);                        \
      return;                                                                                \
    }                                                                                        \
    half_mem *half = (half_mem *)out;                                                        \
    PACK_TWICE(code)                                                                         \
    for (; k + VW <= count; k += VW) *(vh_mem *)(half + k) = ENCODED(code, in + k);          \
    AS_WRITTEN for (; k < count; k++) half[k] = ENCODEDN(code, in + k, 1)[0];                \
    if (count % 2) half[count] = 0;                                                          \
  }
DEFINE_PACK_ROW(pack_a_row, A_T)
DEFINE_PACK_ROW(pack_b_row, B_T)

/* The slots at depth k of VW columns from `column` on, of X[K, width], whose columns are contiguous.
   Lanes past the row's end may have any value; past the matrix's end they are 0. `inside` promises
   that the matrix does not end there, which holds for all rows but the last if a row is as wide as
   any tile. */
#define INSIDE(k, width) ((width) >= 32 && ((k) + 1) * PAIR < K)
#define DEFINE_SLOTS_AT(name, code, width)                                                   \
  INLINE vf name(const ELEM(code) *X, long k, long column, int inside) {                     \
    long left = inside ? 2L * (width) : (K - k * PAIR) * (width)-column;                     \
    const ELEM(code) *p = X + k * PAIR * (width) + column;                                   \
    if (left <= 0) return (vf){0};                                                           \
    if (!COMPUTE_BF16) return left >= VW ? LOAD(code, p) : LOADN(code, p, left);             \
    if (inside && (code) != 1) return factor_pairs(LOAD(code, p), LOAD(code, p + (width)));  \
    vu low, high = {0};                                                                      \
    low = __builtin_convertvector(left >= VW ? ENCODED(code, p) : ENCODEDN(code, p, left), vu); \
    left -= (width);                                                                         \
    p += (width);                                                                            \
    if (inside || (k * PAIR + 1 < K && left > 0))                                            \
      high = __builtin_convertvector(left >= VW ? ENCODED(code, p) : ENCODEDN(code, p, left), vu); \
    return (vf)(low | high << 16);                                                           \
  }
DEFINE_SLOTS_AT(a_slots, A_T, M)
DEFINE_SLOTS_AT(b_slots, B_T, N)

/* 4 x 4 transposition in every 128 bit lane of four vectors. */
#if VW == 16
#define IN_LANES(v, w, a, b, c, d)                                                              \
  __builtin_shufflevector(v, w, a, b, c, d, a + 4, b + 4, c + 4, d + 4, a + 8, b + 8, c + 8, \
                          d + 8, a + 12, b + 12, c + 12, d + 12)
#elif VW == 8
#define IN_LANES(v, w, a, b, c, d) \
  __builtin_shufflevector(v, w, a, b, c, d, a + 4, b + 4, c + 4, d + 4)
#else
#define IN_LANES(v, w, a, b, c, d) __builtin_shufflevector(v, w, a, b, c, d)
#endif
INLINE void transpose_lanes(vf v[4]) {
  vf a = IN_LANES(v[0], v[1], 0, 1, VW, VW + 1), b = IN_LANES(v[2], v[3], 0, 1, VW, VW + 1);
  vf c = IN_LANES(v[0], v[1], 2, 3, VW + 2, VW + 3), d = IN_LANES(v[2], v[3], 2, 3, VW + 2, VW + 3);
  v[0] = IN_LANES(a, b, 0, 2, VW, VW + 2);
  v[1] = IN_LANES(a, b, 1, 3, VW + 1, VW + 3);
  v[2] = IN_LANES(c, d, 0, 2, VW, VW + 2);
  v[3] = IN_LANES(c, d, 1, 3, VW + 1, VW + 3);
}

/* Four slots of each of VW rows, 4 in every lane: row i, i + 4, i + 8, ... */
typedef float quad_mem __attribute__((vector_size(16), aligned(4), may_alias));
typedef float oct __attribute__((vector_size(32)));
INLINE vf gather_lanes(const slot *const *row, int i, long k) {
#define ROW(i) (*(const quad_mem *)(row[i] + k))
#if VW == 4
  return ROW(i);
#else
  oct low = __builtin_shufflevector(ROW(i), ROW(i + 4), 0, 1, 2, 3, 4, 5, 6, 7);
#if VW == 8
  return low;
#else
  oct high = __builtin_shufflevector(ROW(i + 8), ROW(i + 12), 0, 1, 2, 3, 4, 5, 6, 7);
  return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#endif
#endif
}

/* out[j * width + i] = row[i][k + j] for i < VW, j < 4. */
INLINE void transpose_four(slot *restrict out, long width, const slot *const *row, int k) {
  vf v[4] = {gather_lanes(row, 0, k), gather_lanes(row, 1, k), gather_lanes(row, 2, k),
             gather_lanes(row, 3, k)};
  transpose_lanes(v);
  for (int j = 0; j < 4; j++) vstore(out + j * width, v[j]);
}

/* out[k * NR + i] = row[i][k] for i < NR, k < depth. */
INLINE void transpose_rows(slot *restrict out, const slot *const *row, int depth) {
  int k = 0;
  for (; k + 4 <= depth; k += 4)
    AS_WRITTEN for (int i = 0; i < NR; i += VW) transpose_four(out + k * NR + i, NR, row + i, k);
  AS_WRITTEN for (; k < depth; k++)
    AS_WRITTEN for (int i = 0; i < NR; i++) out[k * NR + i] = row[i][k];
}

#ifndef B_IS_PACKED_OTHERWISE
#define B_PARAMS b_ptr restrict B
#define B_ARGS B
/* Columns n0 .. n1 of C's B, slots k0 .. k0 + depth, in panels of NR columns: panel[DEPTH][NR] one
   after another, of which `depth` rows are filled. A pair's half past K is 0. Columns past N may
   have any value, finite or not: their products are never stored. */
INLINE void pack_b(slot *restrict out, B_PARAMS, int k0, int depth, int n0, int n1) {
#if LAYOUT != 0
  /* A few k at a time for all panels, because the rows of B are pages apart. */
  enum { STEP = 8 };
  AS_WRITTEN for (int first = 0; first < depth; first += STEP)
    for (int n = n0; n < n1; n += NR) {
      slot *panel = out + (n - n0) * DEPTH;
      int end = MIN(first + STEP, depth);
      AS_WRITTEN for (int k = first; k < end; k++)
        if (INSIDE(k0 + k, N))
          for (int j = 0; j < NR; j += VW)
            vstore(panel + k * NR + j, b_slots(B, k0 + k, n + j, 1));
        else
          AS_WRITTEN for (int j = 0; j < NR; j += VW)
            vstore(panel + k * NR + j, b_slots(B, k0 + k, n + j, 0));
    }
#else
  for (int n = n0; n < n1; n += NR) {
    slot *panel = out + (n - n0) * DEPTH;
    const slot *row[NR];
#if B_T == 0 && !COMPUTE_BF16
    AS_WRITTEN for (int i = 0; i < NR; i++) row[i] = B + (long)MIN(n + i, N - 1) * K + k0;
    transpose_rows(panel, row, depth);
#else
    enum { STEP = 64 };
    slot block[NR][STEP];
    AS_WRITTEN for (int i = 0; i < NR; i++) row[i] = block[i];
    for (int k = 0; k < depth; k += STEP) {
      int step = MIN(STEP, depth - k), first = (k0 + k) * PAIR;
      for (int i = 0; i < NR; i++)
        pack_b_row(block[i], B + (long)MIN(n + i, N - 1) * K + first, MIN(step * PAIR, K - first));
      transpose_rows(panel + k * NR, row, step);
    }
#endif
  }
#endif
}
#endif

/* Rows m0 .. m1 of A, slots k0 .. k0 + depth, in panels of MR rows: as panel[MR][KC] where k is
   contiguous in A or the tile needs it to be, as panel[k][MR] where rows are. Rows past M may have
   any value. */
#define A_ROW_STEP (A_IN_COLUMNS ? 1 : KC)
#define A_K_STEP (A_IN_COLUMNS ? MR : 1)
INLINE void pack_a(slot *restrict out, a_ptr restrict A, int k0, int depth, int m0, int m1) {
#if LAYOUT == 2 && !A_IN_COLUMNS
  /* VW slots of a panel's rows at a time, transposed; past K they are 0. */
  for (int first = 0; first < ROUND(depth, TILE_K); first += VW)
    for (int m = m0; m < m1; m += MR) {
      slot block[VW][MR];
      const slot *column[VW];
      for (int k = 0; k < VW; k++) {
        int inside = INSIDE(k0 + first + k, M);
        column[k] = block[k];
        for (int i = 0; i < MR; i += VW)
          vstore(block[k] + i, inside ? a_slots(A, k0 + first + k, m + i, 1)
                                      : a_slots(A, k0 + first + k, m + i, 0));
      }
      slot *panel = out + (m - m0) / MR * A_PANEL + first;
      for (int i = 0; i < MR; i += 4) transpose_four(panel + i * KC, KC, column, i);
    }
#elif LAYOUT == 2
  /* A few k at a time for all panels, so that a cache line of A is read once. What a vector writes
     beyond MR is overwritten by the next k. */
  enum { STEP = 8 };
  AS_WRITTEN for (int first = 0; first < depth; first += STEP)
    for (int m = m0; m < m1; m += MR) {
      slot *panel = out + (m - m0) / MR * A_PANEL;
      int end = MIN(first + STEP, depth);
      AS_WRITTEN for (int k = first; k < end; k++)
        if (INSIDE(k0 + k, M))
          for (int i = 0; i < MR; i += VW)
            vstore(panel + k * MR + i, a_slots(A, k0 + k, m + i, 1));
        else
          AS_WRITTEN for (int i = 0; i < MR; i += VW)
            vstore(panel + k * MR + i, a_slots(A, k0 + k, m + i, 0));
    }
#else
  int count = MIN(depth * PAIR, K - k0 * PAIR);
  for (int m = m0; m < m1; m++) {
    pack_a_row(out + (m - m0) * KC, A + (long)m * K + k0 * PAIR, count);
#ifdef TILE_AMX
    AS_WRITTEN for (int k = depth; k % TILE_K; k++) out[(m - m0) * KC + k] = 0;
#endif
  }
#endif
}

/* ---- writing sums ---- */

typedef struct {
  ELEM(C_T) * C;
  const ELEM(C_T) * R;
  float *partial; /* float32 sums of the thread's rows, BLOCK_COLS wide */
  int first, last; /* which panel along k this is */
} target;

/* The sums of `count` columns plus what C or R (ADDEND) has at `at`. */
#define GET(code, p) (count == VW ? LOAD(code, p) : LOADN(code, p, count))
INLINE vf with_others(target t, vf sum, long at, int count) {
  if (ACCUMULATE || (C_T == 0 && !t.first)) sum += GET(C_T, t.C + at);
  if (ADDEND && (C_T != 0 || t.first)) sum += GET(C_T, t.R + at);
  return sum;
}
