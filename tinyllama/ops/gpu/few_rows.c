/* y (R, N) = x (R, K) W (N, K)^T [+ addend] for few rows of x: generation, where the time is that of
   reading W once. A group of 32 lanes computes EACH neighbours of y, from as many rows of W.

   BITS makes W packed integers: q scale, or q scale + minimum with MINIMUM, one scale and minimum
   (float16) per GROUP neighbours of a row. Two 4-bit numbers share a byte, the first in its lower
   half; numbers are signed without a minimum and unsigned with one. A lane reads 16 bytes of a row.

   A packed number becomes a float without a conversion: among the lower 23 bits of 2^23 it adds
   itself, times 2^s if it stays at bit s of its 16 bits. x is divided by 2^s instead, which is exact.

   Macros: R, N, K, EACH, W_TYPE or BITS, GROUP and MINIMUM (defined or not), ADDEND (defined or
   not); VEC is 32 / BITS for packed integers. */
#define GROUPS (THREADS / 32)
#define ROW_OF_W(e) ((long)(n0 + (e) < N ? n0 + (e) : N - 1) * K)
#ifdef ADDEND
#define ADDEND_ARGUMENT , GLOBAL const Element *addend
#define ADDED(at) +WIDEN(TYPE, addend[at])
#else
#define ADDEND_ARGUMENT
#define ADDED(at)
#endif

#ifdef BITS
#define SHARE (128 / BITS) /* numbers of a row that a lane reads at once */
#define POWER(i) (float)(1 << (i) % (16 / BITS) * BITS)
#define UPPER_BITS 0x4b000000u /* of 2^23 */
#ifdef MINIMUM
#define W_ARGUMENT GLOBAL const uchar *w, GLOBAL const F16 *scales, GLOBAL const F16 *minima
#define LEAST_NUMBER 0
#define SIGNS 0
#else
#define W_ARGUMENT GLOBAL const uchar *w, GLOBAL const F16 *scales
#define LEAST_NUMBER (1 << (BITS - 1))
#define SIGNS (BITS == 4 ? 0x88888888u : 0x80808080u)
#endif
#else
#define SHARE VEC
#define W_ARGUMENT GLOBAL const ELEM(W_TYPE) *w
#endif

KERNEL_BEGIN(GLOBAL Element *y, GLOBAL const Element *x, W_ARGUMENT ADDEND_ARGUMENT)
  SHARED float scratch[THREADS];
  const int n0 = (bx * GROUPS + group) * EACH;
  float sum[R][EACH];
  UNROLL
  for (int r = 0; r < R; r++)
    UNROLL
    for (int e = 0; e < EACH; e++) sum[r][e] = 0;
  /* All lanes take part in every round, those past a row's end with zeros instead of x: pocl 3.1
     forgets what is summed in a round that only some take part in. */
  UNROLL_BY(2)
  for (int begin = 0; begin < K; begin += 32 * SHARE) {
    const int inside = K % (32 * SHARE) == 0 || begin + lane * SHARE < K;
    const int k = inside ? begin + lane * SHARE : 0;
    float in[R][VEC];
#ifndef BITS
    UNROLL
    for (int r = 0; r < R; r++) {
      LOAD(TYPE, in[r], x + (long)r * K + k);
      UNROLL
      for (int i = 0; i < VEC; i++) in[r][i] = inside ? in[r][i] : 0;
    }
    UNROLL
    for (int e = 0; e < EACH; e++) {
      float weight[VEC];
      LOAD(W_TYPE, weight, w + ROW_OF_W(e) + k);
      UNROLL
      for (int r = 0; r < R; r++)
        UNROLL
        for (int i = 0; i < VEC; i++) sum[r][e] += in[r][i] * weight[i];
    }
#else
    u32 q[EACH][4];
    float part[R][EACH], total[R];
    UNROLL
    for (int e = 0; e < EACH; e++) load_words(q[e], w + (ROW_OF_W(e) + k) * BITS / 8, 4);
    UNROLL
    for (int r = 0; r < R; r++) {
      total[r] = 0;
      UNROLL
      for (int e = 0; e < EACH; e++) part[r][e] = 0;
    }
    UNROLL
    for (int j = 0; j < 4; j++) {
      UNROLL
      for (int r = 0; r < R; r++) {
        LOAD(TYPE, in[r], x + (long)r * K + k + j * VEC);
        UNROLL
        for (int i = 0; i < VEC; i++) {
          in[r][i] = inside ? in[r][i] : 0;
          total[r] += in[r][i];
          in[r][i] *= 1 / POWER(i);
        }
      }
      UNROLL
      for (int e = 0; e < EACH; e++)
        UNROLL
        for (int i = 0; i < VEC; i++) {
          const u32 lower = (q[e][j] ^ SIGNS) >> i / (16 / BITS) * 16;
          const u32 bits = lower & ((1u << BITS) - 1) << i % (16 / BITS) * BITS;
          const float number = float_of(bits | UPPER_BITS) - (8388608 + LEAST_NUMBER * POWER(i));
          UNROLL
          for (int r = 0; r < R; r++) part[r][e] += in[r][i] * number;
        }
    }
    UNROLL
    for (int e = 0; e < EACH; e++) {
      const long at = (ROW_OF_W(e) + k) / GROUP;
      UNROLL
      for (int r = 0; r < R; r++) {
        sum[r][e] += WIDEN_2(scales[at]) * part[r][e];
#ifdef MINIMUM
        sum[r][e] += WIDEN_2(minima[at]) * total[r];
#endif
      }
    }
#endif
  }
  UNROLL
  for (int r = 0; r < R; r++)
    UNROLL
    for (int e = 0; e < EACH; e++) sum[r][e] = lanes_sum(sum[r][e], scratch, tid);
  if (lane == 0)
    UNROLL
    for (int r = 0; r < R; r++)
      UNROLL
      for (int e = 0; e < EACH; e++)
        if (N % (GROUPS * EACH) == 0 || n0 + e < N) {
          const long at = (long)r * N + n0 + e;
          STORE_ONE(TYPE, y + at, sum[r][e] ADDED(at));
        }
KERNEL_END
