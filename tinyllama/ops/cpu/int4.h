/* The matrix B of gemm.c stored in 4 or 8 bits and widened when a panel of it is packed, so that at
   most a thread's block of panels is in full precision. Placed before gemm.c.

     W[row, i] = q[row, i] * scale[row, i / BLOCK] (+ minimum[row, i / BLOCK] with MINIMA)

   The product is exact in float32 (8 bits times 11), so a sum is rounded once.

   packed  [rows][WIDTH * BITS / 8] bytes: q, or two q of 4 bits each: that of an even i in the low
           half, that of i + 1 in the high half; signed, or unsigned with MINIMA
   scales  [rows][WIDTH / BLOCK] float16
   minima  like scales
   LAYOUT 0: W is B[N,K], WIDTH is K.  LAYOUT 1: W is B[K,N], WIDTH is N.
   Macros: BLOCK (even, divides WIDTH), BITS (4 unless set), MINIMA (0 unless set) and those of
   gemm.c, of which COMPUTE_BF16 must be set and B_T is unused. With ROWS_ONLY only what reads a row
   is there, and of gemm.c's macros LAYOUT, N and K are needed. */

#ifndef BITS
#define BITS 4
#endif
#ifndef MINIMA
#define MINIMA 0
#endif

#define B_IS_PACKED_OTHERWISE
#if MINIMA
#define B_PARAMS                                                                     \
  const unsigned char *restrict packed, const unsigned short *restrict scales, \
      const unsigned short *restrict minima
#define B_ARGS packed, scales, minima
#else
#define B_PARAMS const unsigned char *restrict packed, const unsigned short *restrict scales
#define B_ARGS packed, scales
#endif
#ifndef B_T
#define B_T 0
#endif
#define INT4_WIDTH (LAYOUT == 0 ? K : N)
#define INT4_STEP 64 /* slots of a row that are widened at a time */
/* The byte of slot i of a row, and the group of slot i. */
#define INT4_BYTE(row, i) (packed + ((row) * INT4_WIDTH + (i)) * BITS / 8)
#define INT4_GROUP(row, i) ((row) * (INT4_WIDTH / BLOCK) + (i) / BLOCK)

typedef unsigned short int4_half __attribute__((aligned(1), may_alias));
typedef unsigned int4_word __attribute__((aligned(1), may_alias));
typedef unsigned short int4_pair __attribute__((may_alias));
typedef signed char int4_bytes __attribute__((vector_size(VW)));
typedef unsigned char int4_unsigned __attribute__((vector_size(VW)));
typedef int4_bytes int4_bytes_mem __attribute__((aligned(1), may_alias));
typedef int4_unsigned int4_unsigned_mem __attribute__((aligned(1), may_alias));

/* q of VW values from p on. Of 4 bits, each is shifted to the top of its lane and back down with its
   sign, or without. This needs a single constant, so the tile keeps its registers. */
INLINE vf int4_values(const unsigned char *p) {
#if BITS == 8
  int4_bytes q = *(const int4_bytes_mem *)p;
  return MINIMA ? __builtin_convertvector((int4_unsigned)q, vf) : __builtin_convertvector(q, vf);
#else
#if VW == 4
  vu word = (vu){0} + *(const int4_half *)p;
  vu top = word << (vu){28, 24, 20, 16};
#elif VW == 8
  vu word = (vu){0} + *(const int4_word *)p;
  vu top = word << (vu){28, 24, 20, 16, 12, 8, 4, 0};
#else
  vu low = (vu){0} + *(const int4_word *)p, high = (vu){0} + *(const int4_word *)(p + 4);
  vu word = __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
  vu top = word << (vu){28, 24, 20, 16, 12, 8, 4, 0, 28, 24, 20, 16, 12, 8, 4, 0};
#endif
  return __builtin_convertvector(MINIMA ? (vi)(top >> 28) : (vi)top >> 28, vf);
#endif
}

/* q of slot i of a row. */
INLINE float int4_value(const unsigned char *p, int i) {
#if BITS == 8
  return MINIMA ? (float)*p : (float)(signed char)*p;
#else
  unsigned top = (unsigned)*p << (28 - i % 2 * 4);
  return MINIMA ? (float)(top >> 28) : (float)((int)top >> 28);
#endif
}

/* Scale and minimum of a group, in every lane; and W from q. */
typedef struct {
  vf scale, minimum;
} int4_group;
INLINE int4_group int4_group_at(B_PARAMS, long group) {
  int4_group g = {vset(LOAD1(2, scales + group)), {0}};
#if MINIMA
  g.minimum = vset(LOAD1(2, minima + group));
#endif
  return g;
}
INLINE vf int4_weight(vf q, int4_group g) { return MINIMA ? vfma(q, g.scale, g.minimum) : q * g.scale; }

/* W[row, i .. i + count] for an even i. */
INLINE void int4_run(float *restrict out, B_PARAMS, long row, int i, int count) {
  for (int end = i + count; i < end;) {
    int left = (i / BLOCK + 1) * BLOCK;
    int stop = left < end ? left : end;
    int4_group g = int4_group_at(B_ARGS, INT4_GROUP(row, i));
    for (; i + VW <= stop; i += VW, out += VW)
      vstore(out, int4_weight(int4_values(INT4_BYTE(row, i)), g));
#pragma clang loop vectorize(disable) unroll(disable)
    for (; i < stop; i++)
      *out++ = int4_weight(vset(int4_value(INT4_BYTE(row, i), i)), g)[0];
  }
}

#ifndef ROWS_ONLY
#if LAYOUT == 0
INLINE void transpose_rows(float *restrict out, const float *const *row, int depth);

/* Row `row` from slot `first` on, `count` slots: floats, or pairs of bfloat16. */
INLINE void int4_slots(float *restrict out, B_PARAMS, long row, int first, int count) {
#if !COMPUTE_BF16
  int4_run(out, B_ARGS, row, first, count);
#else
  float value[2 * INT4_STEP + VW];
  int4_run(value, B_ARGS, row, 2 * first, 2 * count);
  int4_pair *half = (int4_pair *)out;
  for (int i = 0; i < 2 * count; i += VW) *(vh_mem *)(half + i) = bf16_encode(vload(value + i));
#endif
}

/* One panel, transposed from NR rows of W. K is even, so pairs are whole. */
INLINE void int4_panel(float *restrict out, B_PARAMS, int k0, int depth, int n0) {
  float block[NR][INT4_STEP + VW];
  const float *row[NR];
  for (int i = 0; i < NR; i++) row[i] = block[i];
  for (int k = 0; k < depth; k += INT4_STEP) {
    int step = depth - k < INT4_STEP ? depth - k : INT4_STEP;
    for (int i = 0; i < NR; i++)
      int4_slots(block[i], B_ARGS, n0 + i < N ? n0 + i : N - 1, k0 + k, step);
    transpose_rows(out + k * NR, row, step);
  }
}

INLINE void int4_pack(float *restrict out, B_PARAMS, int k0, int depth, int n0, int n1, int panel) {
  for (int n = n0; n < n1; n += NR) int4_panel(out + (n - n0) * panel, B_ARGS, k0, depth, n);
}
#else
/* NR columns of row k of W from n0 on; those past N stay as they are. */
INLINE void int4_columns(float *restrict out, B_PARAMS, long k, int n0) {
  if (BLOCK % NR == 0 && N % NR == 0) { /* all in one group */
    int4_group g = int4_group_at(B_ARGS, INT4_GROUP(k, n0));
    for (int j = 0; j < NR; j += VW)
      vstore(out + j, int4_weight(int4_values(INT4_BYTE(k, n0 + j)), g));
    return;
  }
  int4_run(out, B_ARGS, k, n0, N - n0 < NR ? N - n0 : NR);
}

/* Slot k of NR columns from n0 on: row k of W, or rows 2k and 2k + 1 as pairs of bfloat16. */
INLINE void int4_columns_slot(float *restrict out, B_PARAMS, int k, int n0) {
#if !COMPUTE_BF16
  int4_columns(out, B_ARGS, k, n0);
#else
  float low[NR] = {0}, high[NR] = {0};
  int4_columns(low, B_ARGS, 2L * k, n0);
  if (2 * k + 1 < K) int4_columns(high, B_ARGS, 2L * k + 1, n0);
  for (int j = 0; j < NR; j += VW) {
    vu a = __builtin_convertvector(bf16_encode(vload(low + j)), vu);
    vu b = __builtin_convertvector(bf16_encode(vload(high + j)), vu);
    vstore(out + j, (vf)(a | b << 16));
  }
#endif
}

/* Some k at a time for all panels: the rows of W lie pages apart. */
INLINE void int4_pack(float *restrict out, B_PARAMS, int k0, int depth, int n0, int n1, int panel) {
  enum { STEP = 8 };
  for (int first = 0; first < depth; first += STEP)
    for (int n = n0; n < n1; n += NR)
      for (int k = first; k < first + STEP && k < depth; k++)
        int4_columns_slot(out + (n - n0) * panel + k * NR, B_ARGS, k0 + k, n);
}
#endif

/* As gemm.c calls it; DEPTH, the length of a panel, is defined there. */
#define pack_b(out, weight, k0, depth, n0, n1) int4_pack(out, weight, k0, depth, n0, n1, DEPTH)

#if LAYOUT == 0
/* ---- few rows of A: W is not widened, q is multiplied at once ----

   sum[m] = sum over groups of scale * (q A[m]), plus minimum * (sum of A[m]) with MINIMA

   A is first rearranged once per thread: in float32, and of 4 bits so that a vector of bytes meets
   the values of all its low halves, then those of its high ones. */

#define INT4_TURN (BITS == 8 ? VW : 2 * VW) /* values of W that a vector of bytes holds */
#define INT4_DIRECT (BLOCK % INT4_TURN == 0)
#define INT4_GROUPS ((K / BLOCK + VW - 1) / VW * VW)

/* In scratch: rows of A (K each), their sums by group, scales of a row of W. */
#define DOT_FLOATS (8L * K + 9L * INT4_GROUPS)
#define INT4_SUMS(scratch, rows) ((scratch) + (long)(rows) * K)
#define INT4_FACTORS(scratch, rows) (INT4_SUMS(scratch, rows) + (long)(rows) * INT4_GROUPS)

INLINE void int4_begin(float *restrict scratch, int rows, const ELEM(A_T) *restrict A) {
  if (!INT4_DIRECT) return;
  float *sums = INT4_SUMS(scratch, rows);
  for (int m = 0; m < rows; m++) {
    const ELEM(A_T) *a = A + (long)m * K;
    float *x = scratch + (long)m * K;
    AS_WRITTEN for (int i = 0; i < K; i += INT4_TURN) {
      float turn[INT4_TURN];
      for (int j = 0; j < INT4_TURN; j += VW) vstore(turn + j, LOAD(A_T, a + i + j));
      for (int j = 0; j < VW; j++) {
        x[i + j] = turn[BITS == 8 ? j : 2 * j];
        if (BITS == 4) x[i + VW + j] = turn[2 * j + 1];
      }
    }
    if (!MINIMA) continue;
    AS_WRITTEN for (long g = 0; g < INT4_GROUPS; g++) {
      vf sum = {0};
      AS_WRITTEN for (long i = g * BLOCK; i < (g + 1) * BLOCK && i < K; i += VW) sum += vload(x + i);
      sums[(long)m * INT4_GROUPS + g] = hsum(sum);
    }
  }
}

/* q of the VW bytes from p on: of 8 bits, or of the low or the high halves. */
INLINE vf int4_bytes_at(const unsigned char *p, int high) {
#if BITS == 8
  return int4_values(p);
#else
  vu byte = __builtin_convertvector(*(const int4_unsigned_mem *)p, vu);
  if (MINIMA) return __builtin_convertvector((vi)(high ? byte >> 4 : byte & 15), vf);
  return __builtin_convertvector((vi)(high ? byte << 24 : byte << 28) >> 28, vf);
#endif
}

/* Scales of a row as floats; starts the sums with the minima's part. */
INLINE void int4_factors(vf *sum, int rows, float *restrict scratch, B_PARAMS, long row) {
  const float *sums = INT4_SUMS(scratch, rows);
  float *factors = INT4_FACTORS(scratch, rows);
  long first = row * (K / BLOCK);
  AS_WRITTEN for (int g = 0; g < K / BLOCK; g += VW) {
    int left = K / BLOCK - g, count = left < VW ? left : VW;
    vstore(factors + g, LOADN(2, scales + first + g, count));
#if MINIMA
    vf minimum = LOADN(2, minima + first + g, count);
#pragma clang loop unroll(full)
    for (int m = 0; m < rows; m++)
      sum[m] = vfma(minimum, vload(sums + (long)m * INT4_GROUPS + g), sum[m]);
#endif
  }
}

/* sum[m] = A[m] W[row] in parts, one per lane, for the first rows of A: few enough for registers. */
INLINE void int4_dots(vf *sum, int rows, float *restrict scratch, const ELEM(A_T) *restrict A,
                      B_PARAMS, long row) {
#pragma clang loop unroll(full)
  for (int m = 0; m < rows; m++) sum[m] = (vf){0};
  if (!INT4_DIRECT) { /* groups end within a vector: widen first */
    float run[INT4_STEP + VW];
    for (int k = 0; k < K; k += INT4_STEP) {
      int count = K - k < INT4_STEP ? K - k : INT4_STEP;
      int4_run(run, B_ARGS, row, k, count);
      vstore(run + count, (vf){0}); /* the rest of a last vector that is not whole */
      for (int i = 0; i < count; i += VW)
#pragma clang loop unroll(full)
        for (int m = 0; m < rows; m++) {
          const ELEM(A_T) *a = A + (long)m * K + k + i;
          vf x = count - i < VW ? LOADN(A_T, a, count - i) : LOAD(A_T, a);
          sum[m] = vfma(x, vload(run + i), sum[m]);
        }
    }
    return;
  }
  int4_factors(sum, rows, scratch, B_ARGS, row);
  const float *factors = INT4_FACTORS(scratch, rows);
  for (int g = 0; g < K / BLOCK; g++) {
    vf part[8];
#pragma clang loop unroll(full)
    for (int m = 0; m < rows; m++) part[m] = (vf){0};
    for (int i = g * BLOCK; i < (g + 1) * BLOCK; i += INT4_TURN)
      for (int high = 0; high < INT4_TURN / VW; high++) {
        vf q = int4_bytes_at(INT4_BYTE(row, i), high);
#pragma clang loop unroll(full)
        for (int m = 0; m < rows; m++)
          part[m] = vfma(vload(scratch + (long)m * K + i + high * VW), q, part[m]);
      }
#pragma clang loop unroll(full)
    for (int m = 0; m < rows; m++) sum[m] = vfma(part[m], vset(factors[g]), sum[m]);
  }
}
#define DOT_BEGIN(scratch, rows, A) int4_begin(scratch, rows, A)
#define DOT_B(sum, rows, scratch, A, row) int4_dots(sum, rows, scratch, A, B_ARGS, row)
#endif
#endif /* ROWS_ONLY */
