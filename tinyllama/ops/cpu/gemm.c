/* Matrix product on packed panels, after Goto and van de Geijn, "Anatomy of High-Performance Matrix
   Multiplication" (2008) and Van Zee and van de Geijn, "BLIS" (2015). Row-major, one of

     LAYOUT 0  C[M,N] = A[M,K] B[N,K]^T    forward,         y  = x W^T
     LAYOUT 1  C[M,N] = A[M,K] B[K,N]      input gradient,  gx = g W
     LAYOUT 2  C[M,N] = A[K,M]^T B[K,N]    weight gradient, gW = g^T x

   Macros: KERNEL (name), M, N, K, LAYOUT, NT (threads), A_T, B_T, C_T (storage codes of common.h).
   Optional, 0 unless set: ACCUMULATE (the product is added to C), ADDEND (C = product + R, R like
   C), COMPUTE_BF16 (products of bfloat16 values), MANY_ROWS (M is more than SKINNY). Sums are
   always float32. M, N, K and SCRATCH_FLOATS need not be constants.

     void KERNEL(C, scratch, A, B [, R], core_id)

   scratch has NT * SCRATCH_FLOATS floats; the caller may define a larger number. Each
   thread computes a rectangle of C by itself.

   Before this text come tile.h (sizes), panels.h (packing) and the form of the tile, tile_vector.h
   or tile_amx.h. Up to SKINNY rows of LAYOUT 0 are not packed and not rounded by COMPUTE_BF16. */

/* ---- the thread's rectangle ---- */

typedef struct {
  int m0, m1, n0, n1;
} rectangle;

/* Divides C among NT threads as rows * columns of rectangles, so that the largest area is smallest
   and then the least has to be packed. */
INLINE rectangle share(int core_id) {
  long best = -1;
  int rows = 1;
  AS_WRITTEN for (int r = 1; r <= NT; r++) {
    if (NT % r) continue;
    long height = CEIL(CEIL(M, MR), r) * MR, width = CEIL(CEIL(N, NR), NT / r) * NR;
    long cost = height * width + 8 * (height * CEIL(width, BLOCK_COLS) + width);
    if (best < 0 || cost < best) best = cost, rows = r;
  }
  int columns = NT / rows, row = core_id / columns, column = core_id % columns;
  return (rectangle){split(M, MR, row, rows), split(M, MR, row + 1, rows),
                     split(N, NR, column, columns), split(N, NR, column + 1, columns)};
}

INLINE void multiply_block(target t, slot *b_block, slot *a_block, a_ptr A, B_PARAMS, rectangle r,
                           int k0, int n0, int n1) {
  int blocks = CEIL(r.m1 - r.m0, BLOCK_ROWS);
  int height = blocks ? ROUND(CEIL(r.m1 - r.m0, blocks), MR) : 0;
  int k1 = MIN(k0 + BLOCK_PANELS * DEPTH, SLOTS);
  for (int m0 = r.m0; m0 < r.m1; m0 += height) {
    int m1 = MIN(m0 + height, r.m1);
    long partial_row = SLOTS > BLOCK_PANELS * DEPTH ? m0 - r.m0 : 0;
    for (int k = k0; k < k1; k += DEPTH) {
      int depth = MIN(DEPTH, k1 - k);
      pack_a(a_block, A, k, depth, m0, m1);
      finish_a(a_block, depth, m0, m1);
      t.first = k == 0, t.last = k + depth == SLOTS;
      ahead next = panels_ahead(B_ARGS, k, depth, n0, n0, 1);
      for (int n = n0; n < n1; n += NR) {
        /* Panels that no other block of rows will need make room for the next group. */
        slot *b = b_block + (blocks > 1 ? (k - k0) * BLOCK_COLS + (n - n0) * DEPTH
                                        : (n - n0) % (GROUP * NR) * DEPTH);
        if (m0 == r.m0 && (n - n0) % (GROUP * NR) == 0) {
          int end = MIN(n + GROUP * NR, n1), after = MIN(end + GROUP * NR, n1);
          pack_b(b, B_ARGS, k, depth, n, end);
          finish_b(b, depth, n, end);
          next = panels_ahead(B_ARGS, k, depth, end, after,
                              (long)CEIL(end - n, NR) * CEIL(m1 - m0, MR) * CEIL(depth, TILE_K));
        }
        multiply_panel(t, a_block, b, depth, m0, m1, n, partial_row * BLOCK_COLS + n - n0, &next);
      }
    }
  }
}

/* ---- few rows: a value of B is used only M times, so the time goes into reading B once ---- */

INLINE void put_dot(target t, float value, long at) {
  if (ACCUMULATE) value += LOAD1(C_T, t.C + at);
  if (ADDEND) value += LOAD1(C_T, t.R + at);
  STORE1(C_T, t.C + at, value);
}

#if LAYOUT == 0 && defined(DOT_B) && !MANY_ROWS
#define SKINNY 8
#define FEW MIN(M, SKINNY)

INLINE void multiply_skinny(target t, float *scratch, a_ptr A, B_PARAMS, int core_id) {
  int n1 = split(N, 16, core_id + 1, NT);
  DOT_BEGIN(scratch, FEW, A);
  for (int n = split(N, 16, core_id, NT); n < n1; n++) {
    vf sum[FEW];
    DOT_B(sum, FEW, scratch, A, n);
#pragma clang loop unroll(full)
    for (int m = 0; m < FEW; m++) put_dot(t, hsum(sum[m]), (long)m * N + n);
  }
}
#elif LAYOUT == 0 && !defined(B_IS_PACKED_OTHERWISE) && !MANY_ROWS
#define SKINNY 8
enum { LINES = 4, PASS = 2 };

/* C[m .. m + PASS, n .. n + LINES] as dot products along k; at an edge the last row is repeated. The
   next rows of B are prefetched: by itself the processor does so for too few streams at once. */
INLINE void dot_products(target t, a_ptr A, b_ptr B, int m, int n, int n1) {
  b_ptr b[LINES];
  a_ptr a[PASS];
  int rows = MIN(M, PASS), k = 0;
  vf sum[PASS][LINES] = {{{0}}};
  for (int j = 0; j < LINES; j++) b[j] = B + (long)MIN(n + j, n1 - 1) * K;
  for (int i = 0; i < rows; i++) a[i] = A + (long)MIN(m + i, M - 1) * K;
#define DOT_STEP(GET_A, GET_B)                                          \
  for (int j = 0; j < LINES; j++) {                                     \
    vf y = GET_B;                                                       \
    __builtin_prefetch(b[j] + k + (long)LINES * K);                     \
    for (int i = 0; i < rows; i++) sum[i][j] = vfma(GET_A, y, sum[i][j]); \
  }
  for (; k + VW <= K; k += VW) DOT_STEP(LOAD(A_T, a[i] + k), LOAD(B_T, b[j] + k))
  if (k < K) DOT_STEP(LOADN(A_T, a[i] + k, K - k), LOADN(B_T, b[j] + k, K - k))
  for (int i = 0; i < rows && m + i < M; i++)
    for (int j = 0; j < LINES && n + j < n1; j++)
      put_dot(t, hsum(sum[i][j]), (long)(m + i) * N + n + j);
}

INLINE void multiply_skinny(target t, float *scratch, a_ptr A, b_ptr B, int core_id) {
  int n1 = split(N, 16, core_id + 1, NT);
  for (int n = split(N, 16, core_id, NT); n < n1; n += LINES)
    for (int m = 0; m < M; m += PASS) dot_products(t, A, B, m, n, n1);
}
#else
#define SKINNY 0
#define multiply_skinny(t, scratch, A, B, core_id)
#endif

#if ADDEND
#define R_PARAM , const ELEM(C_T) *restrict R
#define R_ARG R
#else
#define R_PARAM
#define R_ARG 0
#endif

void KERNEL(ELEM(C_T) *restrict C, float *restrict scratch, a_ptr restrict A, B_PARAMS R_PARAM,
            int core_id) {
  rectangle r = share(core_id);
  slot *b_block = scratch + (long)core_id * SCRATCH_FLOATS, *a_block = b_block + B_SLOTS;
  target t = {C, R_ARG, a_block + A_SLOTS, 0, 0};
  if (NEEDED_FLOATS > SCRATCH_FLOATS || DOT_FLOATS > SCRATCH_FLOATS) __builtin_trap();
  if (M <= SKINNY) {
    multiply_skinny(t, b_block, A, B_ARGS, core_id);
    return;
  }
  tile_begin();
  for (int n = r.n0; n < r.n1; n += BLOCK_COLS)
    for (int k = 0; k < SLOTS; k += BLOCK_PANELS * DEPTH)
      multiply_block(t, b_block, a_block, A, B_ARGS, r, k, n, MIN(n + BLOCK_COLS, r.n1));
  tile_end();
}
