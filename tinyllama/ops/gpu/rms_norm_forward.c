/* y = x rstd w with rstd = 1 / sqrt(mean(x^2) + EPS) over rows of H; a block computes a row, which
   it reads once.
   Macros: H, EPS. */
KERNEL_BEGIN(GLOBAL Element *y, GLOBAL float *rstd, GLOBAL const Element *x, GLOBAL const float *w)
  SHARED float scratch[THREADS];
  float value[PER * VEC], squares = 0;
  x += (long)bx * H;
  y += (long)bx * H;
  UNROLL
  for (int i = 0; i < PER; i++) {
    PRIVATE float *v = value + i * VEC;
    LOAD(TYPE, v, x + CLAMPED(COLUMN(i)));
    UNROLL
    for (int k = 0; k < VEC; k++) squares += INSIDE(COLUMN(i)) ? v[k] * v[k] : 0;
  }
  const float scale = 1 / SQRT(block_sum(squares, scratch, tid) / H + EPS);
  UNROLL
  for (int i = 0; i < PER; i++)
    if (INSIDE(COLUMN(i))) {
      PRIVATE float *v = value + i * VEC;
      float weight[VEC];
      LOAD(0, weight, w + COLUMN(i));
      UNROLL
      for (int k = 0; k < VEC; k++) v[k] *= scale * weight[k];
      STORE(TYPE, y + COLUMN(i), v);
    }
  if (tid == 0) rstd[bx] = scale;
KERNEL_END
