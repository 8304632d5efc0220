/* The matrix B of gemm.c stored in 4 bits and widened when a panel of it is packed, so that at most
   a thread's block of panels is in full precision. Placed before gemm.c.

     W[row, i] = q[row, i] * scale[row, i / BLOCK]      exact in float32: 4 bits times 11

   packed  [rows][WIDTH / 2] bytes, two signed q each: that of an even i in the low half, that of
           i + 1 in the high half
   scales  [rows][WIDTH / BLOCK] float16
   LAYOUT 0: W is B[N,K], WIDTH is K.  LAYOUT 1: W is B[K,N], WIDTH is N.
   Macros: BLOCK (even, divides WIDTH) and those of gemm.c, of which COMPUTE_BF16 must be set and
   B_T is unused. */

#define B_IS_PACKED_OTHERWISE
#define B_PARAMS const unsigned char *restrict packed, const unsigned short *restrict scales
#define B_ARGS packed, scales
#ifndef B_T
#define B_T 0
#endif
#define INT4_WIDTH (LAYOUT == 0 ? K : N)
#define INT4_STEP 64 /* slots of a row that are widened at a time */

typedef unsigned short int4_half __attribute__((aligned(1), may_alias));
typedef unsigned int4_word __attribute__((aligned(1), may_alias));
typedef unsigned short int4_pair __attribute__((may_alias));

/* q of the VW values that begin with the low half of *p: each is shifted to the top of its lane and
   back down with its sign. This needs a single constant, so the tile keeps its registers. */
INLINE vf int4_values(const unsigned char *p) {
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
  return __builtin_convertvector((vi)top >> 28, vf);
}

/* W[row, i .. i + count] for an even i. */
INLINE void int4_run(float *restrict out, B_PARAMS, long row, int i, int count) {
  const unsigned char *byte = packed + row * (INT4_WIDTH / 2);
  const unsigned short *scale = scales + row * (INT4_WIDTH / BLOCK);
  for (int end = i + count; i < end;) {
    int group = i / BLOCK, left = (group + 1) * BLOCK;
    int stop = left < end ? left : end;
    vf s = vset(LOAD1(2, scale + group));
    for (; i + VW <= stop; i += VW, out += VW) vstore(out, int4_values(byte + i / 2) * s);
#pragma clang loop vectorize(disable) unroll(disable)
    for (; i < stop; i++) *out++ = (float)((int)((unsigned)byte[i / 2] << (28 - i % 2 * 4)) >> 28) * s[0];
  }
}

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
    const unsigned char *byte = packed + (k * N + n0) / 2;
    vf s = vset(LOAD1(2, scales + (k * N + n0) / BLOCK));
    for (int j = 0; j < NR; j += VW) vstore(out + j, int4_values(byte + j / 2) * s);
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
/* sum[m] = A[m] W[row] in parts, one per lane, for the first rows of A: few enough for registers. */
INLINE void int4_dots(vf *sum, int rows, const ELEM(A_T) *restrict A, B_PARAMS, long row) {
#pragma clang loop unroll(full)
  for (int m = 0; m < rows; m++) sum[m] = (vf){0};
  if (BLOCK % VW) { /* groups end within a vector: widen first */
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
  const unsigned char *byte = packed + row * (K / 2);
  const unsigned short *scale = scales + row * (K / BLOCK);
  for (int group = 0; group < K / BLOCK; group++) { /* sum q A, then multiply by the scale */
    vf part[8];
#pragma clang loop unroll(full)
    for (int m = 0; m < rows; m++) part[m] = (vf){0};
    for (int i = group * BLOCK; i < (group + 1) * BLOCK; i += VW) {
      vf q = int4_values(byte + i / 2);
#pragma clang loop unroll(full)
      for (int m = 0; m < rows; m++) part[m] = vfma(LOAD(A_T, A + (long)m * K + i), q, part[m]);
    }
    vf s = vset(LOAD1(2, scale + group));
#pragma clang loop unroll(full)
    for (int m = 0; m < rows; m++) sum[m] = vfma(part[m], s, sum[m]);
  }
}
#define DOT_B(sum, rows, A, row) int4_dots(sum, rows, A, B_ARGS, row)
#endif
