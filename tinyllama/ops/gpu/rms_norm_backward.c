/* The gradients of y = x rstd w (rms_norm_forward.c), with n = x rstd:

     dx = rstd (dy w - n mean(dy w n)) [+ addend]        dw = sum over rows of dy n

   A block computes every BLOCKS-th row of N; row bx of `partial` (BLOCKS, H) is its sum of dy n, and
   column_sum.c adds them up.
   Macros: N, H, BLOCKS, ADDEND (defined or not). */
#ifdef ADDEND
#define ADDEND_ARGUMENT , GLOBAL const Element *addend
#else
#define ADDEND_ARGUMENT
#endif
KERNEL_BEGIN(GLOBAL Element *dx, GLOBAL float *partial, GLOBAL const Element *dy,
             GLOBAL const Element *x, GLOBAL const float *rstd,
             GLOBAL const float *w ADDEND_ARGUMENT)
  SHARED float scratch[THREADS];
  float weight[PER * VEC], dw[PER * VEC];
  UNROLL
  for (int i = 0; i < PER; i++) LOAD(0, weight + i * VEC, w + CLAMPED(COLUMN(i)));
  UNROLL
  for (int j = 0; j < PER * VEC; j++) dw[j] = 0;
  for (int row = bx; row < N; row += BLOCKS) {
    const long at = (long)row * H;
    const float scale = rstd[row];
    float value[PER * VEC], gradient[PER * VEC], dot = 0;
    UNROLL
    for (int i = 0; i < PER; i++) {
      LOAD(TYPE, value + i * VEC, x + at + CLAMPED(COLUMN(i)));
      LOAD(TYPE, gradient + i * VEC, dy + at + CLAMPED(COLUMN(i)));
      UNROLL
      for (int j = i * VEC; j < (i + 1) * VEC; j++)
        dot += INSIDE(COLUMN(i)) ? gradient[j] * weight[j] * value[j] : 0;
    }
    const float pull = block_sum(dot, scratch, tid) / H * scale * scale * scale;
    UNROLL
    for (int i = 0; i < PER; i++) {
      float result[VEC];
#ifdef ADDEND
      LOAD(TYPE, result, addend + at + CLAMPED(COLUMN(i)));
#else
      UNROLL
      for (int k = 0; k < VEC; k++) result[k] = 0;
#endif
      UNROLL
      for (int k = 0; k < VEC; k++) {
        const int j = i * VEC + k;
        result[k] += gradient[j] * weight[j] * scale - value[j] * pull;
        dw[j] += gradient[j] * (value[j] * scale);
      }
      if (INSIDE(COLUMN(i))) STORE(TYPE, dx + at + COLUMN(i), result);
    }
  }
  UNROLL
  for (int i = 0; i < PER; i++)
    if (INSIDE(COLUMN(i))) STORE(0, partial + (long)bx * H + COLUMN(i), dw + i * VEC);
KERNEL_END
