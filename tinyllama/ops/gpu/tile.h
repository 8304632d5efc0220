/* Tiles: in a block's shared memory, and as fragments in the registers of a group of 32 lanes.

   Acc is 16 x 8 sums, FragA 16 x KSTEP of the left factor, FragB KSTEP x 8 of the right one; FragB
   is loaded two at a time. Two ways to read a factor from a tile, by where k runs:
     load_a_rows     A[m][k] = tile[m][k]    load_a_columns  A[m][k] = tile[k][m]
     load_b_rows     B[k][n] = tile[n][k]    load_b_columns  B[k][n] = tile[k][n]
   results_as_a makes sums the left factor of the next product without leaving the registers, and
   load_b_results reads the right factor in the order of k that this gives.

   Macros: TYPE (the elements of tiles), FRAGMENT, THREADS. */
typedef ELEM(TYPE) Element;
#define CHUNK (16 / (int)sizeof(Element)) /* elements that are copied at once */
/* A lane's four sums: two neighbours of a row, and the same of the row 8 below. */
#define ROW(e) (LANE_ROW + 8 * ((e) / 2))
#define COL(e) (LANE_COL + (e) % 2)

/* Where the 16 bytes (row, chunk) of a tile with `cols` columns lie. The chunk's number is changed
   by an exclusive or with the row's, so that the same chunk of 8 rows below each other lies in 8
   different groups of banks of shared memory. The pattern repeats after 8 rows. */
#define SWIZZLE(chunks) ((chunks) % 8 == 0 ? 8 : (chunks) % 4 == 0 ? 4 : (chunks) % 2 == 0 ? 2 : 1)
#define SWIZZLED(chunks, row, chunk) \
  ((chunk) ^ ((row) / (8 / SWIZZLE(chunks)) % SWIZZLE(chunks)))
#define PLACE(cols, row, chunk) ((row) * (cols) + CHUNK * SWIZZLED((cols) / CHUNK, row, chunk))
/* The same for row `row8 + row` with row8 a multiple of 8, which then only adds to the address:
   compilers take it out of loops, into the offsets of the instructions. */
#define PLACE8(cols, row8, row, chunk) ((row8) * (cols) + PLACE(cols, row, chunk))
#define AT8(cols, row8, row, col) \
  tile[PLACE8(cols, row8, row, (col) / CHUNK) + (col) % CHUNK]
#define AT(cols, row, col) AT8(cols, 0, row, col)

/* Copies rows x cols elements of a matrix with `ld` elements per row, from (row0, col0) on; rows
   from row_end on and columns from col_end on become zeros. whole_rows, whole_cols: 1 if there are
   none. All that a thread copies lies at fixed distances from its first 16 bytes, in both memories,
   where one round of all threads covers a multiple of 8 rows (or of 4: two places in turn). */
INLINE void load_tile(LOCAL Element *tile, GLOBAL const Element *from, const int rows,
                      const int cols, const int ld, int row0, int col0, int row_end, int col_end,
                      int whole_rows, int whole_cols, int tid) {
  const int across = cols / CHUNK, step = THREADS / across;
  if (THREADS % across == 0 && step % 4 == 0 && rows % step == 0) {
    const int row = tid / across, chunk = tid % across;
    const int in_row = whole_cols || col0 + chunk * CHUNK < col_end;
    LOCAL Element *even = tile + PLACE(cols, row, chunk);
    LOCAL Element *odd = tile + PLACE(cols, row + step, chunk) - step * cols;
    GLOBAL const Element *p = from + (long)(row0 + row) * ld + col0 + chunk * CHUNK;
    UNROLL
    for (int i = 0; i < rows / step; i++)
      copy16((step % 8 && i % 2 ? odd : even) + i * step * cols, p + (long)(i * step) * ld,
             in_row && (whole_rows || row0 + row + i * step < row_end));
  } else {
    UNROLL_BY(4) /* all would cost registers in float32 with a head of 128 */
    for (int i = 0; i < (rows * across + THREADS - 1) / THREADS; i++) {
      const int n = tid + i * THREADS, row = n / across, chunk = n % across;
      const int valid = row0 + row < row_end && col0 + chunk * CHUNK < col_end;
      if (rows * across % THREADS == 0 || n < rows * across)
        copy16(tile + PLACE(cols, row, chunk),
               from + (long)(row0 + row) * ld + col0 + chunk * CHUNK, valid);
    }
  }
}

#if FRAGMENT == FRAGMENT_MMA16
#define KSTEP 16
typedef struct { u32 r[4]; } FragA;
typedef struct { u32 r[2]; } FragB;
INLINE void load_a_rows(FragA *f, const Element *tile, int cols, int m, int k, int lane) {
  ldmatrix(f->r, tile + PLACE8(cols, m, lane % 16, k / 8 + lane / 16));
}
INLINE void load_a_columns(FragA *f, const Element *tile, int cols, int m, int k, int lane) {
  const int row = lane % 8 + lane / 16 * 8;
  ldmatrix_transposed(f->r, tile + PLACE8(cols, k, row, m / 8 + lane / 8 % 2));
}
INLINE void load_b_rows(FragB *f, const Element *tile, int cols, int n, int k, int lane) {
  const int row = lane % 8 + lane / 16 * 8;
  u32 x[4];
  ldmatrix(x, tile + PLACE8(cols, n, row, k / 8 + lane / 8 % 2));
  f[0].r[0] = x[0]; f[0].r[1] = x[1]; f[1].r[0] = x[2]; f[1].r[1] = x[3];
}
INLINE void load_b_columns(FragB *f, const Element *tile, int cols, int n, int k, int lane) {
  u32 x[4];
  ldmatrix_transposed(x, tile + PLACE8(cols, k, lane % 16, n / 8 + lane / 16));
  f[0].r[0] = x[0]; f[0].r[1] = x[1]; f[1].r[0] = x[2]; f[1].r[1] = x[3];
}
#define load_b_results load_b_columns
INLINE void results_as_a(FragA *f, const Acc *s) {
  for (int h = 0; h < 2; h++) {
    f->r[2 * h] = PACK(s[h].v[0], s[h].v[1]);
    f->r[2 * h + 1] = PACK(s[h].v[2], s[h].v[3]);
  }
}
INLINE void multiply(Acc *d, const FragA *a, const FragB *b) {
  JOIN(mma_, TYPE)(d->v, a->r, b->r);
}

#elif FRAGMENT == FRAGMENT_TF32X3
/* x = hi + lo, each rounded to TF32's 11 bits: a b = lo hi + hi lo + hi hi, and what is left out is
   as small as float32's own rounding. lo keeps its 13 lowest bits: the tensor cores ignore them. */
#define KSTEP 8
typedef struct { u32 hi[4], lo[4]; } FragA;
typedef struct { u32 hi[2], lo[2]; } FragB;
INLINE void halves(u32 *hi, u32 *lo, float x) {
  *hi = (bits_of(x) + 0x1000u) & 0xffffe000u;
  *lo = bits_of(x - float_of(*hi)) + 0x1000u;
}
/* Element e of a lane's FragA: row lane / 4 or 8 below, k = lane % 4 or 4 more. Of its two FragB:
   column lane / 4 or 8 further, k the same. */
#define A_DOWN (8 * (e % 2))
#define A_K (lane % 4 + 4 * (e / 2))
#define B_DOWN (8 * (e / 2))
#define B_K (lane % 4 + 4 * (e % 2))
#define EACH_A(x) \
  UNROLL for (int e = 0; e < 4; e++) halves(&f->hi[e], &f->lo[e], x);
#define EACH_B(x) \
  UNROLL for (int e = 0; e < 4; e++) halves(&f[e / 2].hi[e % 2], &f[e / 2].lo[e % 2], x);
INLINE void load_a_rows(FragA *f, const Element *tile, int cols, int m, int k, int lane) {
  EACH_A(AT8(cols, m + A_DOWN, lane / 4, k + A_K))
}
INLINE void load_a_columns(FragA *f, const Element *tile, int cols, int m, int k, int lane) {
  EACH_A(AT8(cols, k, A_K, m + A_DOWN + lane / 4))
}
INLINE void load_b_rows(FragB *f, const Element *tile, int cols, int n, int k, int lane) {
  EACH_B(AT8(cols, n + B_DOWN, lane / 4, k + B_K))
}
INLINE void load_b_columns(FragB *f, const Element *tile, int cols, int n, int k, int lane) {
  EACH_B(AT8(cols, k, B_K, n + B_DOWN + lane / 4))
}
/* A lane's sums 0 and 1 are neighbours along k, but are used as k = lane % 4 and 4 more: the right
   factor is read in the same order. */
INLINE void load_b_results(FragB *f, const Element *tile, int cols, int n, int k, int lane) {
  EACH_B(AT8(cols, k, lane % 4 * 2 + e % 2, n + B_DOWN + lane / 4))
}
INLINE void results_as_a(FragA *f, const Acc *s) {
  for (int e = 0; e < 4; e++) halves(&f->hi[e], &f->lo[e], s->v[e % 2 * 2 + e / 2]);
}
INLINE void multiply(Acc *d, const FragA *a, const FragB *b) {
  mma_tf32(d->v, a->lo, b->hi);
  mma_tf32(d->v, a->hi, b->lo);
  mma_tf32(d->v, a->hi, b->hi);
}

#elif FRAGMENT == FRAGMENT_SIMDGROUP
#define KSTEP 8
typedef struct { simdgroup_matrix<Element, 8, 8> m[2]; } FragA;
typedef struct { simdgroup_matrix<Element, 8, 8> m; } FragB;
/* Both 8 x 8 matrices of a fragment (of FragB: of two), of which a lane holds two neighbours of a
   row: here i is the row, j the column. */
#define EACH(matrix, x)                                            \
  UNROLL for (int h = 0; h < 2; h++) for (int e = 0; e < 2; e++) { \
    const int i = LANE_ROW, j = LANE_COL + e;                      \
    matrix.thread_elements()[e] = x;                               \
  }
INLINE void load_a_rows(PRIVATE FragA *f, LOCAL const Element *tile, int cols, int m, int k,
                        int lane) {
  EACH(f->m[h], AT8(cols, m + 8 * h, i, k + j))
}
INLINE void load_a_columns(PRIVATE FragA *f, LOCAL const Element *tile, int cols, int m, int k,
                           int lane) {
  EACH(f->m[h], AT8(cols, k, j, m + 8 * h + i))
}
INLINE void load_b_rows(PRIVATE FragB *f, LOCAL const Element *tile, int cols, int n, int k,
                        int lane) {
  EACH(f[h].m, AT8(cols, n + 8 * h, j, k + i))
}
INLINE void load_b_columns(PRIVATE FragB *f, LOCAL const Element *tile, int cols, int n, int k,
                           int lane) {
  EACH(f[h].m, AT8(cols, k, i, n + 8 * h + j))
}
#define load_b_results load_b_columns
INLINE void results_as_a(PRIVATE FragA *f, PRIVATE Acc *s) {
  for (int h = 0; h < 2; h++)
    for (int e = 0; e < 2; e++)
      f->m[h].thread_elements()[e] = Element(s->m[h].thread_elements()[e]);
}
INLINE void multiply(PRIVATE Acc *d, PRIVATE FragA *a, PRIVATE FragB *b) {
  for (int h = 0; h < 2; h++) simdgroup_multiply_accumulate(d->m[h], a->m[h], b->m, d->m[h]);
}

#else /* FRAGMENT_FMA; sums become a left factor by way of shared memory, see attention.c */
#define KSTEP 1
typedef struct { float v[2]; } FragA, FragB;
#define READ(row, col) WIDEN(TYPE, AT(cols, row, col))
INLINE void load_a_rows(FragA *f, LOCAL const Element *tile, int cols, int m, int k, int lane) {
  UNROLL for (int h = 0; h < 2; h++) f->v[h] = READ(m + ROW(2 * h), k);
}
INLINE void load_a_columns(FragA *f, LOCAL const Element *tile, int cols, int m, int k, int lane) {
  UNROLL for (int h = 0; h < 2; h++) f->v[h] = READ(k, m + ROW(2 * h));
}
INLINE void load_b_rows(FragB *f, LOCAL const Element *tile, int cols, int n, int k, int lane) {
  UNROLL for (int h = 0; h < 4; h++) f[h / 2].v[h % 2] = READ(n + h / 2 * 8 + COL(h), k);
}
INLINE void load_b_columns(FragB *f, LOCAL const Element *tile, int cols, int n, int k, int lane) {
  UNROLL for (int h = 0; h < 4; h++) f[h / 2].v[h % 2] = READ(k, n + h / 2 * 8 + COL(h));
}
#define load_b_results load_b_columns
INLINE void multiply(Acc *d, const FragA *a, const FragB *b) {
  UNROLL for (int e = 0; e < 4; e++) d->v[e] += a->v[e / 2] * b->v[e % 2];
}
#endif

#if FRAGMENT == FRAGMENT_SIMDGROUP
#define GET(acc, e) ((acc).m[(e) / 2].thread_elements()[(e) % 2])
#else
#define GET(acc, e) ((acc).v[e])
#endif
INLINE void zero(PRIVATE Acc *d, int count) {
  UNROLL
  for (int j = 0; j < count; j++)
    UNROLL
    for (int e = 0; e < 4; e++) GET(d[j], e) = 0;
}
