/* A product with sums in float32, in one of three layouts:
     NT  C (M, N) = A (M, K) B (N, K)^T     a linear layer: y = x W^T
     NN  C (M, N) = A (M, K) B (K, N)       its gradient of the input: dx = dy W
     TN  C (M, N) = A (K, M)^T B (K, N)     its gradient of the weight: dW = dy^T x
   ADDEND adds a matrix of C's shape and type; ACCUMULATE adds to what C holds.

   A block computes BM x BN of C, a group of 32 lanes WM x WN of it. Tiles that are BK deep pass
   through STAGES places of shared memory, copied STAGES - 1 ahead of their use. With SPLIT > 1 each
   block sums one part of K and C is (SPLIT, M, N): whoever adds the parts does so in a fixed order.

   BITS makes B packed integers: q scale, or q scale + minimum with MINIMUM, one scale and minimum
   (float16) per GROUP neighbours of a row. Two 4-bit numbers share a byte, the first in its lower
   half; numbers are signed without a minimum and unsigned with one. They are read one tile ahead of
   their use and widened to Element on the way into shared memory.

   What else one launch computes:
     TERMS n    NN: C = the sum of n products A_i B_i of one K
     BATCH n    n products of one size, of which each has a C of its own, with a common factor: A in
                NT, B in TN; x1, x2 are the further others
     GATED      NT with two matrices, B and b1, of N rows: gate = A B^T, up = A b1^T, and
                C = silu(gate) up. Half of a group's columns are gate's, so that a lane has both.
     UNGATED    NN: not C is written, which is the gradient of silu(gate) up, but dgate and dup
     TURNED n   NT: the first n results are heads of HEAD columns, whose pairs are turned by rotary
                positions (rope.c). Row r is position r % T; cos, sin (T, HEAD / 2) float32. HEAD
                divides WN.

   Macros: M, N, K, LAYOUT, TYPE (A and B), OUT_TYPE, SPLIT, BM, BN, BK, WM, WN, STAGES, BAND,
   UNROLL_K (steps of k that are unrolled), TERMS, BATCH; ADDEND, ACCUMULATE, PIPELINED, DYNAMIC,
   BITS, GROUP, MINIMUM, GATED, UNGATED, TURNED with HEAD and T, each defined or not. Rows of A, of B and of C are multiples of 16 bytes. */
#define A_ROWS (LAYOUT == TN ? BK : BM)
#define A_COLS (LAYOUT == TN ? BM : BK)
#define B_ROWS (LAYOUT == NT ? BN : BK)
#define B_COLS (LAYOUT == NT ? BK : BN)
#define A_SIZE (A_ROWS * A_COLS)
#define STAGE (A_SIZE + B_ROWS * B_COLS) /* elements of one place */
#define STEPS_OF_TERM ((K + BK - 1) / BK)
#define STEPS (TERMS * STEPS_OF_TERM)
#define PART ((STEPS + SPLIT - 1) / SPLIT)
#define FM (WM / 16)
#define FN (WN / 8)
#ifdef GATED
#define COLUMNS (BN / 2) /* of C per block */
#define GROUP_COLUMN(wn) ((wn) / 2) /* of the block's, where a group's begin */
#define FRAGMENTS (FN / 2) /* of C per group, in a row */
/* The rows of b1 come after those of B. */
#define B_ROW(wn, j) (GROUP_COLUMN(wn) + 8 * ((j) % (FN / 2)) + (j) / (FN / 2) * COLUMNS)
#else
#define COLUMNS BN
#define GROUP_COLUMN(wn) (wn)
#define FRAGMENTS FN
#define B_ROW(wn, j) ((wn) + 8 * (j))
#endif
#if TERMS == 3
#define OF_TERM(x) (term == 0 ? x : term == 1 ? x##1 : x##2)
#elif TERMS == 2
#define OF_TERM(x) (term == 0 ? x : x##1)
#else
#define OF_TERM(x) x
#endif
typedef ELEM(OUT_TYPE) Out;

#ifdef BITS
#define HELD (BN * BK / THREADS) /* neighbours of a row that a thread widens per tile */
#define WORDS (HELD * BITS / 32)
#ifdef MINIMUM
#define B_ARGUMENT GLOBAL const uchar *b, GLOBAL const F16 *scales, GLOBAL const F16 *minima
#define NUMBER(bits) ((float)(bits))
#else
#define B_ARGUMENT GLOBAL const uchar *b, GLOBAL const F16 *scales
#define minima scales
#define NUMBER(bits) ((float)((int)((bits) << (32 - BITS)) >> (32 - BITS)))
#endif
typedef struct { u32 q[WORDS]; float scale, minimum; } Held;
/* Past the edges everything is 0: chosen without a branch, see opencl.h. */
INLINE void fetch(PRIVATE Held *h, GLOBAL const uchar *b, GLOBAL const F16 *scales,
                  GLOBAL const F16 *low, int n0, int k0, int tid) {
  const int rows = LAYOUT == NT ? N : K, cols = LAYOUT == NT ? K : N;
  const int row = tid * HELD / B_COLS + (LAYOUT == NT ? n0 : k0);
  const int col = tid * HELD % B_COLS + (LAYOUT == NT ? k0 : n0);
  const int valid = row < rows && col < cols;
  const long at = valid ? (long)row * cols + col : 0;
  load_words(h->q, b + at * BITS / 8, WORDS);
  h->scale = valid ? WIDEN_2(scales[at / GROUP]) : 0;
#ifdef MINIMUM
  h->minimum = valid ? WIDEN_2(low[at / GROUP]) : 0;
#else
  h->minimum = 0;
#endif
}
INLINE void widen(LOCAL Element *tile, PRIVATE const Held *h, int tid) {
  const int row = tid * HELD / B_COLS, chunk = tid * HELD % B_COLS / CHUNK;
  UNROLL
  for (int c = 0; c < HELD / CHUNK; c++) {
    float x[CHUNK];
    UNROLL
    for (int i = 0; i < CHUNK; i++) {
      const int bit = (c * CHUNK + i) * BITS;
      x[i] = NUMBER(h->q[bit / 32] >> bit % 32 & ((1 << BITS) - 1)) * h->scale + h->minimum;
    }
    store_chunk(tile + PLACE(B_COLS, row, chunk + c), x);
  }
}
#define HOLD Held held;
#define FETCH(k) if ((k) < end) fetch(&held, b, scales, minima, n0, (k) * BK, tid);
#define WIDEN_HELD(k, stage) if ((k) < end) widen(tiles + (stage) * STAGE + A_SIZE, &held, tid);
#define LOAD_B(k)
#else
#define B_ARGUMENT GLOBAL const Element *b
#define HOLD
#define FETCH(k)
#define WIDEN_HELD(k, stage)
#define B_TILE(place, b, k)                                                                     \
  load_tile(to + A_SIZE + (place) * COLUMNS * BK, b, COLUMNS, BK, K, n0, (k) * BK, N, K,      \
            N % COLUMNS == 0, K % BK == 0, tid)
#ifdef GATED
#define LOAD_B(k) B_TILE(0, b, k); B_TILE(1, b1, k);
#else
#define LOAD_B(k)                                                                             \
  if (LAYOUT == NT)                                                                           \
    B_TILE(0, b, k);                                                                           \
  else                                                                                        \
    load_tile(to + A_SIZE, OF_TERM(b), BK, BN, N, (k) * BK, n0, K, N, K % BK == 0,            \
              N % BN == 0, tid);
#endif
#endif
#define LOAD(step, stage)                                                                     \
  {                                                                                           \
    if ((step) < end) {                                                                       \
      LOCAL Element *to = tiles + (stage) * STAGE;                                            \
      const int term = TERMS == 1 ? 0 : (step) / STEPS_OF_TERM;                               \
      const int in_term = (step) - term * STEPS_OF_TERM;                                      \
      if (LAYOUT == TN)                                                                       \
        load_tile(to, a, BK, BM, M, in_term * BK, m0, K, M, K % BK == 0, M % BM == 0, tid);   \
      else                                                                                    \
        load_tile(to, OF_TERM(a), BM, BK, K, m0, in_term * BK, M, K, M % BM == 0,             \
                  K % BK == 0, tid);                                                          \
      LOAD_B(in_term)                                                                         \
    }                                                                                         \
    COMMIT(); /* also of nothing: WAIT counts */                                              \
  }

INLINE void load_factors(PRIVATE FragA *fa, PRIVATE FragB *fb, LOCAL const Element *ta, int wm,
                         int wn, int kk, int lane) {
  LOCAL const Element *tb = ta + A_SIZE;
  UNROLL
  for (int i = 0; i < FM; i++)
    if (LAYOUT == TN)
      load_a_columns(&fa[i], ta, A_COLS, wm + 16 * i, kk, lane);
    else
      load_a_rows(&fa[i], ta, A_COLS, wm + 16 * i, kk, lane);
  UNROLL
  for (int j = 0; j < FN; j += 2)
    if (LAYOUT == NT)
      load_b_rows(&fb[j], tb, B_COLS, B_ROW(wn, j), kk, lane);
    else
      load_b_columns(&fb[j], tb, B_COLS, wn + 8 * j, kk, lane);
}

#ifdef ADDEND
#define ADDEND_ARGUMENT , GLOBAL const Out *addend
#define ADDED(at) +WIDEN(OUT_TYPE, addend[at])
#else
#define ADDEND_ARGUMENT
#define ADDED(at)
#endif
#ifdef ACCUMULATE
#define HELD_BY_C(at) +WIDEN(OUT_TYPE, c[at])
#else
#define HELD_BY_C(at)
#endif


#define RESULT(name) , GLOBAL Out *name
#define FACTOR(name) , GLOBAL const Element *name
#if defined(GATED)
#define MORE_RESULTS RESULT(gate) RESULT(up)
#define MORE_FACTORS FACTOR(b1)
#elif defined(UNGATED)
#define MORE_RESULTS RESULT(dup)
#define MORE_FACTORS , GLOBAL const Out *gate, GLOBAL const Out *up
#elif BATCH == 3
#define MORE_RESULTS RESULT(c1) RESULT(c2)
#define MORE_FACTORS FACTOR(x1) FACTOR(x2)
#define OF_BATCH(x, x1, x2) (which == 0 ? x : which == 1 ? x1 : x2)
#elif BATCH == 2
#define MORE_RESULTS RESULT(c1)
#define MORE_FACTORS FACTOR(x1)
#define OF_BATCH(x, x1, x2) (which == 0 ? x : x1)
#else
#define MORE_RESULTS
#if TERMS == 3
#define MORE_FACTORS FACTOR(a1) FACTOR(b1) FACTOR(a2) FACTOR(b2)
#elif TERMS == 2
#define MORE_FACTORS FACTOR(a1) FACTOR(b1)
#else
#define MORE_FACTORS
#endif
#endif
#if defined(GATED) || defined(UNGATED)
#define SIGMOID(x) (1 / (1 + EXP2(-1.4426950408889634f * (x))))
#endif
#ifdef GATED
#define STORE_RESULT(at)                                                                      \
  const float g0 = GET(acc[i][j], e), g1 = GET(acc[i][j], e + 1);                             \
  const float u0 = GET(acc[i][j + FN / 2], e), u1 = GET(acc[i][j + FN / 2], e + 1);           \
  STORE2(OUT_TYPE, gate + at, g0, g1);                                                        \
  STORE2(OUT_TYPE, up + at, u0, u1);                                                          \
  STORE2(OUT_TYPE, c + at, g0 * SIGMOID(g0) * u0, g1 * SIGMOID(g1) * u1);
#elif defined(UNGATED)
#define STORE_RESULT(at)                                                                      \
  const float g0 = WIDEN(OUT_TYPE, gate[at]), g1 = WIDEN(OUT_TYPE, gate[at + 1]);             \
  const float u0 = WIDEN(OUT_TYPE, up[at]), u1 = WIDEN(OUT_TYPE, up[at + 1]);                 \
  const float s0 = SIGMOID(g0), d0 = s0 * GET(acc[i][j], e);                                  \
  const float s1 = SIGMOID(g1), d1 = s1 * GET(acc[i][j], e + 1);                              \
  STORE2(OUT_TYPE, c + at, d0 * u0 * (1 + g0 * (1 - s0)), d1 * u1 * (1 + g1 * (1 - s1)));     \
  STORE2(OUT_TYPE, dup + at, d0 * g0, d1 * g1);
#else
#define STORE_RESULT(at)                                                                      \
  STORE2(OUT_TYPE, c + at, GET(acc[i][j], e) ADDED(at) HELD_BY_C(at),                         \
         GET(acc[i][j], e + 1) ADDED(at + 1) HELD_BY_C(at + 1));
#endif
#ifdef TURNED
#define ANGLES , GLOBAL const float *cos, GLOBAL const float *sin
#else
#define ANGLES
#endif
KERNEL_BEGIN(GLOBAL Out *c MORE_RESULTS, GLOBAL const Element *a,
             B_ARGUMENT MORE_FACTORS ADDEND_ARGUMENT ANGLES)
#ifdef DYNAMIC
  SHARED_BY_LAUNCH(tiles)
#else
  SHARED Element tiles[STAGES * STAGE];
#endif
  /* Blocks that run at the same time share columns of B, and rows of A within a band. */
  const int tiles_n = (N + COLUMNS - 1) / COLUMNS, tiles_m = (M + BM - 1) / BM;
  const int first = bx / (BAND * tiles_n) * BAND, in_band = bx - first * tiles_n;
  const int height = tiles_m - first < BAND ? tiles_m - first : BAND;
  const int m0 = (first + in_band % height) * BM, n0 = in_band / height * COLUMNS;
  const int part = BATCH == 1 ? bz : bz % SPLIT, which = BATCH == 1 ? 0 : bz / SPLIT;
  const int begin = part * PART, end = begin + PART < STEPS ? begin + PART : STEPS;
  const int wm = group / (BN / WN) * WM, wn = group % (BN / WN) * WN;
  (void)which;
#if BATCH > 1
  if (LAYOUT == NT)
    b = OF_BATCH(b, x1, x2);
  else
    a = OF_BATCH(a, x1, x2);
#endif
  Acc acc[FM][FN];
  HOLD
  for (int i = 0; i < FM; i++) zero(acc[i], FN);
  UNROLL
  for (int s = 0; s < STAGES - 1; s++) {
    FETCH(begin + s)
    LOAD(begin + s, s)
    WIDEN_HELD(begin + s, s)
  }
  int stage = 0;
#ifdef PIPELINED /* the next step's factors are read while this one's are multiplied */
  FragA fa[2][FM];
  FragB fb[2][FN];
  WAIT(STAGES - 2);
  BARRIER;
  load_factors(fa[0], fb[0], tiles, wm, wn, 0, lane);
  for (int k = begin; k < end; k++) {
    const int ahead = stage ? stage - 1 : STAGES - 1, next = stage + 1 < STAGES ? stage + 1 : 0;
    UNROLL
    for (int kk = 0; kk < BK; kk += KSTEP) {
      const int now = kk / KSTEP % 2;
      if (kk == 0) LOAD(k + STAGES - 1, ahead)
      if (kk + KSTEP < BK)
        load_factors(fa[1 - now], fb[1 - now], tiles + stage * STAGE, wm, wn, kk + KSTEP, lane);
      else {
        WAIT(STAGES - 2);
        BARRIER;
        load_factors(fa[1 - now], fb[1 - now], tiles + next * STAGE, wm, wn, 0, lane);
      }
      UNROLL
      for (int i = 0; i < FM; i++)
        UNROLL
        for (int j = 0; j < FN; j++) multiply(&acc[i][j], &fa[now][i], &fb[now][j]);
    }
    stage = next;
  }
#else
  for (int k = begin; k < end; k++) {
    const int ahead = stage ? stage - 1 : STAGES - 1;
    WAIT(STAGES - 2);
    BARRIER; /* the tile is there for all, and the place of the one before is free */
    FETCH(k + STAGES - 1)
    LOAD(k + STAGES - 1, ahead)
    UNROLL_BY(UNROLL_K)
    for (int kk = 0; kk < BK; kk += KSTEP) {
      FragA fa[FM];
      FragB fb[FN];
      load_factors(fa, fb, tiles + stage * STAGE, wm, wn, kk, lane);
      UNROLL
      for (int i = 0; i < FM; i++)
        UNROLL
        for (int j = 0; j < FN; j++) multiply(&acc[i][j], &fa[i], &fb[j]);
    }
    WIDEN_HELD(k + STAGES - 1, ahead)
    stage = stage + 1 < STAGES ? stage + 1 : 0;
  }
#endif
#ifdef TURNED
  if (which < TURNED)
    UNROLL
    for (int i = 0; i < FM; i++)
      UNROLL
      for (int e = 0; e < 4; e++) {
        const int row = m0 + wm + 16 * i + ROW(e), at = row % T * (HEAD / 2) + COL(e);
        UNROLL
        for (int j = 0; j < FN / 2; j++) { /* the pairs of a row */
          const int first = j / (HEAD / 16) * (HEAD / 8) + j % (HEAD / 16);
          const float x = GET(acc[i][first], e), y = GET(acc[i][first + HEAD / 16], e);
          const float c = cos[at + j % (HEAD / 16) * 8], s = sin[at + j % (HEAD / 16) * 8];
          GET(acc[i][first], e) = x * c - y * s;
          GET(acc[i][first + HEAD / 16], e) = y * c + x * s;
        }
      }
#endif
#if BATCH > 1
  c = OF_BATCH(c, c1, c2); /* not before: fewer registers */
#endif
  c += (long)part * M * N;
  UNROLL
  for (int i = 0; i < FM; i++)
    UNROLL
    for (int j = 0; j < FRAGMENTS; j++)
      UNROLL
      for (int e = 0; e < 4; e += 2) {
        const int row = m0 + wm + 16 * i + ROW(e), col = n0 + GROUP_COLUMN(wn) + 8 * j + COL(e);
        const int row_inside = M % BM == 0 || row < M, col_inside = N % COLUMNS == 0 || col < N;
        if (row_inside & col_inside) {
          const long at = (long)row * N + col;
          STORE_RESULT(at)
        }
      }
KERNEL_END
