/* Matrix product on packed panels, after Goto and van de Geijn, "Anatomy of High-Performance Matrix
   Multiplication" (2008) and Van Zee and van de Geijn, "BLIS" (2015). Row-major, one of

     LAYOUT 0  C[M,N] = A[M,K] B[N,K]^T    forward,         y  = x W^T
     LAYOUT 1  C[M,N] = A[M,K] B[K,N]      input gradient,  gx = g W
     LAYOUT 2  C[M,N] = A[K,M]^T B[K,N]    weight gradient, gW = g^T x

   Macros: KERNEL (name), M, N, K, LAYOUT, NT (threads), A_T, B_T, C_T (storage codes of common.h).
   Optional, 0 unless set: ACCUMULATE (the product is added to C), ADDEND (C = product + R, R like
   C), COMPUTE_BF16 (products of bfloat16 values), MANY_ROWS (M is more than SKINNY). Sums are
   float32 always. M, N, K and SCRATCH_FLOATS need not be constants.

     void KERNEL(C, scratch, A, B [, R], core_id)

   scratch has NT * SCRATCH_FLOATS floats; whoever allocates may define a larger number. A thread
   owns a rectangle of C and works on its own.
   Panels are made of slots of 4 bytes, a float or (COMPUTE_BF16) a pair of bfloat16 of
   consecutive k, so that one code packs both.

   A file that keeps B in another form defines B_PARAMS (its parameters), B_ARGS (their names),
   B_IS_PACKED_OTHERWISE, pack_b and for LAYOUT 0 DOT_B (a row of it times rows of A) before this
   text. Up to SKINNY rows of LAYOUT 0 are not packed and not rounded by COMPUTE_BF16. */

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
#define DEPTH ROUND(CEIL(SLOTS, CEIL(SLOTS, KC)), 4)
#define BLOCK_PANELS MIN(CEIL(SLOTS, DEPTH), CEIL(KB, DEPTH))
#define BLOCK_COLS MIN(ROUND(N, NR), BC / (BLOCK_PANELS * DEPTH) / NR * NR)
#define BLOCK_ROWS MIN(ROUND(M, MR), ROUND(MC, MR))

/* A 16 bit C keeps its sums over more than one panel in float32: for one block of rows, or for all
   of the thread's when B is not packed in its whole depth. */
#define PARTIAL (C_T != 0 && SLOTS > DEPTH)
#define B_SLOTS (BLOCK_PANELS * DEPTH * BLOCK_COLS)
/* Rows lie KC apart, whatever of that is used: a constant is what the tile reads fastest. Columns
   are packed in whole vectors, which reach beyond the last of a panel's MR. */
#define A_PANEL (LAYOUT == 2 ? MR * DEPTH + VW : MR * KC)
#define A_SLOTS (BLOCK_ROWS / MR * A_PANEL)
#define PARTIAL_ROWS (SLOTS > BLOCK_PANELS * DEPTH ? ROUND(M, MR) : BLOCK_ROWS)
#define PARTIAL_FLOATS (PARTIAL ? PARTIAL_ROWS * BLOCK_COLS : 0)

#ifndef SCRATCH_FLOATS
#define SCRATCH_FLOATS ROUND(B_SLOTS + A_SLOTS + PARTIAL_FLOATS, 1024)
#endif

typedef float slot;
typedef unsigned short half_mem __attribute__((may_alias));
typedef const ELEM(A_T) * a_ptr;
typedef const ELEM(B_T) * b_ptr;

/* ---- packing ---- */

/* bf16_encode for a factor. The processor's own rounding makes 0 of subnormal numbers, as its
   products do with them in any case. */
INLINE vh factor_encode(vf x) {
#if COMPUTE_BF16 && VW == 16 && defined(__AVX512BF16__)
  vh y;
  __asm__("vcvtneps2bf16 %1, %0" : "=v"(y) : "v"(x));
  return y;
#else
  return bf16_encode(x);
#endif
}
#define ENCODED(code, p) ENCODED_(code, p)
#define ENCODED_(code, p) encoded_##code(p)
INLINE vh encoded_0(const elem_0 *p) { return factor_encode(load_0(p)); }
INLINE vh encoded_1(const elem_1 *p) { return *(const vh_mem *)p; }
INLINE vh encoded_2(const elem_2 *p) { return factor_encode(load_2(p)); }
#define ENCODEDN(code, p, n) factor_encode(LOADN(code, p, n))

/* `count` elements that lie one after another along k -> CEIL(count, PAIR) slots. */
#define DEFINE_PACK_ROW(name, code)                                                          \
  INLINE void name(slot *restrict out, const ELEM(code) *restrict in, int count) {           \
    int k = 0;                                                                               \
    if (!COMPUTE_BF16) {                                                                     \
      for (; k + VW <= count; k += VW) vstore(out + k, LOAD(code, in + k));                  \
      AS_WRITTEN for (; k < count; k++) out[k] = LOAD1(code, in + k);                        \
      return;                                                                                \
    }                                                                                        \
    half_mem *half = (half_mem *)out;                                                        \
    for (; k + VW <= count; k += VW) *(vh_mem *)(half + k) = ENCODED(code, in + k);          \
    AS_WRITTEN for (; k < count; k++) half[k] = ENCODEDN(code, in + k, 1)[0];                \
    if (count % 2) half[count] = 0;                                                          \
  }
DEFINE_PACK_ROW(pack_a_row, A_T)
DEFINE_PACK_ROW(pack_b_row, B_T)

/* The slots at depth k of VW columns from `column` on, of X[K, width], columns being contiguous.
   Lanes past the row's end may be anything, past the matrix's end they are 0. `inside` promises
   that the matrix does not end there: all rows but the last, if a row is as wide as any tile. */
#define INSIDE(k, width) ((width) >= 32 && ((k) + 1) * PAIR < K)
#define DEFINE_SLOTS_AT(name, code, width)                                                   \
  INLINE vf name(const ELEM(code) *X, long k, long column, int inside) {                     \
    long left = inside ? 2L * (width) : (K - k * PAIR) * (width)-column;                     \
    const ELEM(code) *p = X + k * PAIR * (width) + column;                                   \
    if (left <= 0) return (vf){0};                                                           \
    if (!COMPUTE_BF16) return left >= VW ? LOAD(code, p) : LOADN(code, p, left);             \
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

/* out[k * NR + i] = row[i][k] for i < NR, k < depth. */
INLINE void transpose_rows(slot *restrict out, const slot *const *row, int depth) {
  int k = 0;
  for (; k + 4 <= depth; k += 4)
    AS_WRITTEN for (int i = 0; i < NR; i += VW) {
      vf v[4] = {gather_lanes(row + i, 0, k), gather_lanes(row + i, 1, k),
                 gather_lanes(row + i, 2, k), gather_lanes(row + i, 3, k)};
      transpose_lanes(v);
      for (int j = 0; j < 4; j++) vstore(out + (k + j) * NR + i, v[j]);
    }
  AS_WRITTEN for (; k < depth; k++)
    AS_WRITTEN for (int i = 0; i < NR; i++) out[k * NR + i] = row[i][k];
}

#ifndef B_IS_PACKED_OTHERWISE
#define B_PARAMS b_ptr restrict B
#define B_ARGS B
/* Columns n0 .. n1 of C's B, slots k0 .. k0 + depth, in panels of NR columns: panel[DEPTH][NR] one
   after another, of which `depth` rows are filled. A pair's half past K is 0. Columns past N may
   become anything, finite or not: what they yield is never stored. */
INLINE void pack_b(slot *restrict out, B_PARAMS, int k0, int depth, int n0, int n1) {
#if LAYOUT != 0
  /* Some k at a time for all panels: the rows of B lie pages apart. */
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
   contiguous in A, as panel[k][MR] where rows are. Rows past M become anything. */
#define A_ROW_STEP (LAYOUT == 2 ? 1 : KC)
#define A_K_STEP (LAYOUT == 2 ? MR : 1)
INLINE void pack_a(slot *restrict out, a_ptr restrict A, int k0, int depth, int m0, int m1) {
#if LAYOUT == 2
  /* Some k at a time for all panels, so that a cache line of A is read once. What a
     vector writes beyond MR the next k overwrites. */
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
  for (int m = m0; m < m1; m++)
    pack_a_row(out + (m - m0) * KC, A + (long)m * K + k0 * PAIR, count);
#endif
}

/* ---- one tile of C ---- */

#define COLS (NR / VW)

/* a stays in memory: an AVX-512 product reads and broadcasts it in one instruction. */
INLINE vf multiply_add(const slot *a, vf b, vf sum) {
#if !COMPUTE_BF16
  return vfma(vset(*a), b, sum);
#elif defined(__AVX512BF16__) && VW == 16
  __asm__("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(b), "m"(*a));
  return sum;
#else
  vi x = (vi)vset(*a), y = (vi)b;
  sum = vfma((vf)(x << 16), (vf)(y << 16), sum);
  return vfma((vf)(x & -65536), (vf)(y & -65536), sum);
#endif
}

INLINE void tile_step(vf sum[MR][COLS], const slot *a, const slot *b) {
  vf row[COLS];
#pragma clang loop unroll(full)
  for (int j = 0; j < COLS; j++) row[j] = vload(b + j * VW);
#pragma clang loop unroll(full)
  for (int i = 0; i < MR; i++)
#pragma clang loop unroll(full)
    for (int j = 0; j < COLS; j++) sum[i][j] = multiply_add(a + i * A_ROW_STEP, row[j], sum[i][j]);
}

INLINE void tile_product(vf sum[MR][COLS], const slot *a, const slot *b, int depth) {
#pragma clang loop unroll(full)
  for (int i = 0; i < MR; i++)
#pragma clang loop unroll(full)
    for (int j = 0; j < COLS; j++) sum[i][j] = (vf){0};
  /* Each address in a register of its own: clang would add two in every instruction. */
  __asm__("" : "+r"(a), "+r"(b));
  int k = 0;
#pragma clang loop unroll(disable)
  for (; k + 4 <= depth; k += 4) {
#pragma clang loop unroll(full)
    for (int u = 0; u < 4; u++) tile_step(sum, a + u * A_K_STEP, b + u * NR);
    a += 4 * A_K_STEP;
    b += 4 * NR;
  }
#pragma clang loop unroll(disable)
  for (; k < depth; k++, a += A_K_STEP, b += NR) tile_step(sum, a, b);
}

typedef struct {
  ELEM(C_T) * C;
  const ELEM(C_T) * R;
  float *partial; /* float32 sums of the thread's rows, BLOCK_COLS wide */
  int first, last; /* which panel along k this is */
} target;

/* Writes the sums of `count` columns to C[at], or adds them up in the partial sums before. */
INLINE void put(target t, vf sum, long at, long at_partial, int count) {
#define GET(code, p) (count == VW ? LOAD(code, p) : LOADN(code, p, count))
  if (PARTIAL && !t.first) sum += vload(t.partial + at_partial);
  if (PARTIAL && !t.last) {
    vstore(t.partial + at_partial, sum);
    return;
  }
  if (ACCUMULATE || (C_T == 0 && !t.first)) sum += GET(C_T, t.C + at);
  if (ADDEND && (C_T != 0 || t.first)) sum += GET(C_T, t.R + at);
  if (count == VW) STORE(C_T, t.C + at, sum);
  else STOREN(C_T, t.C + at, sum, count);
}

INLINE void put_tile(target t, vf sum[MR][COLS], int m, int n, long at_partial) {
  if (m + MR <= M && n + NR <= N) {
#pragma clang loop unroll(full)
    for (int i = 0; i < MR; i++)
#pragma clang loop unroll(full)
      for (int j = 0; j < COLS; j++)
        put(t, sum[i][j], (long)(m + i) * N + n + j * VW, at_partial + i * BLOCK_COLS + j * VW, VW);
    return;
  }
  vf edge[MR][COLS];
#pragma clang loop unroll(full)
  for (int i = 0; i < MR; i++)
#pragma clang loop unroll(full)
    for (int j = 0; j < COLS; j++) edge[i][j] = sum[i][j];
#pragma clang loop unroll(disable)
  for (int i = 0; i < MR && m + i < M; i++)
#pragma clang loop unroll(disable)
    for (int j = 0; j < COLS && n + j * VW < N; j++)
      put(t, edge[i][j], (long)(m + i) * N + n + j * VW, at_partial + i * BLOCK_COLS + j * VW,
          MIN(VW, N - n - j * VW));
}

/* ---- the thread's rectangle ---- */

typedef struct {
  int m0, m1, n0, n1;
} rectangle;

/* NT as rows * columns of rectangles: the largest area counts, then what must be packed. */
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

/* One panel of B against the block of A. */
INLINE void multiply_panel(target t, const slot *a, const slot *b, int depth, int m0, int m1, int n,
                           long at_partial) {
#pragma clang loop unroll(disable)
  for (int m = m0; m < m1; m += MR) {
    vf sum[MR][COLS];
#pragma clang loop unroll(full)
    for (int i = 0; i < MR; i++) __builtin_prefetch((const char *)(t.C + (long)(m + i) * N + n), 1);
    tile_product(sum, a, b, depth);
    put_tile(t, sum, m, n, at_partial);
    a += A_PANEL;
    at_partial += MR * BLOCK_COLS;
  }
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
      t.first = k == 0, t.last = k + depth == SLOTS;
      for (int n = n0; n < n1; n += NR) {
        slot *b = b_block + (k - k0) * BLOCK_COLS + (n - n0) * DEPTH;
        if (m0 == r.m0 && (n - n0) % (GROUP * NR) == 0)
          pack_b(b, B_ARGS, k, depth, n, MIN(n + GROUP * NR, n1));
        multiply_panel(t, a_block, b, depth, m0, m1, n, partial_row * BLOCK_COLS + n - n0);
      }
    }
  }
}

/* ---- few rows: a value of B is used M times only, so reading it once is all that counts ---- */

INLINE void put_dot(target t, float value, long at) {
  if (ACCUMULATE) value += LOAD1(C_T, t.C + at);
  if (ADDEND) value += LOAD1(C_T, t.R + at);
  STORE1(C_T, t.C + at, value);
}

#if LAYOUT == 0 && defined(DOT_B) && !MANY_ROWS
#define SKINNY 8
#define FEW MIN(M, SKINNY)

INLINE void multiply_skinny(target t, a_ptr A, B_PARAMS, int core_id) {
  int n1 = split(N, 16, core_id + 1, NT);
  for (int n = split(N, 16, core_id, NT); n < n1; n++) {
    vf sum[FEW];
    DOT_B(sum, FEW, A, n);
#pragma clang loop unroll(full)
    for (int m = 0; m < FEW; m++) put_dot(t, hsum(sum[m]), (long)m * N + n);
  }
}
#elif LAYOUT == 0 && !defined(B_IS_PACKED_OTHERWISE) && !MANY_ROWS
#define SKINNY 8
enum { LINES = 4, PASS = 2 };

/* C[m .. m + PASS, n .. n + LINES], dot products along k; an edge repeats its last row or line. */
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
    for (int i = 0; i < rows; i++) sum[i][j] = vfma(GET_A, y, sum[i][j]); \
  }
  for (; k + VW <= K; k += VW) DOT_STEP(LOAD(A_T, a[i] + k), LOAD(B_T, b[j] + k))
  if (k < K) DOT_STEP(LOADN(A_T, a[i] + k, K - k), LOADN(B_T, b[j] + k, K - k))
  for (int i = 0; i < rows && m + i < M; i++)
    for (int j = 0; j < LINES && n + j < n1; j++)
      put_dot(t, hsum(sum[i][j]), (long)(m + i) * N + n + j);
}

INLINE void multiply_skinny(target t, a_ptr A, b_ptr B, int core_id) {
  int n1 = split(N, 16, core_id + 1, NT);
  for (int n = split(N, 16, core_id, NT); n < n1; n += LINES)
    for (int m = 0; m < M; m += PASS) dot_products(t, A, B, m, n, n1);
}
#else
#define SKINNY 0
#define multiply_skinny(t, A, B, core_id)
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
  if (B_SLOTS + A_SLOTS + PARTIAL_FLOATS > SCRATCH_FLOATS) __builtin_trap();
  if (M <= SKINNY) {
    multiply_skinny(t, A, B_ARGS, core_id);
    return;
  }
  for (int n = r.n0; n < r.n1; n += BLOCK_COLS)
    for (int k = 0; k < SLOTS; k += BLOCK_PANELS * DEPTH)
      multiply_block(t, b_block, a_block, A, B_ARGS, r, k, n, MIN(n + BLOCK_COLS, r.n1));
}
