/* The gradients of y = x * rstd * w (rms_norm_forward.c), with n = x * rstd:

     dx = rstd * (dy * w - n * mean(dy * w * n))        dw = sum over rows of dy * n

   By differentiation; the same as torch.nn.functional.rms_norm's backward.
   dw_partial [NT, H] has one row per thread; the sum of the rows is dw.
   Macros: N rows, H width, ACT, NT. Threads split the rows. */

/* The sum of dy * w * x over one row. */
INLINE float rms_norm_dot(const ELEM(ACT) *dy, const ELEM(ACT) *x, const float *w) {
  vf sum[4] = {{0}, {0}, {0}, {0}};
  long i = 0;
  for (; i + 4 * VW <= H; i += 4 * VW) {
    for (int k = 0; k < 4; k++) {
      long at = i + k * VW;
      sum[k] = vfma(LOAD(ACT, dy + at) * vload(w + at), LOAD(ACT, x + at), sum[k]);
    }
  }
  for (; i < H; i += VW) {
    int n = i + VW <= H ? VW : H % VW;
    sum[0] = vfma(LOADN(ACT, dy + i, n) * LOADN(0, w + i, n), LOADN(ACT, x + i, n), sum[0]);
  }
  return hsum((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

/* Columns i to i + n of a row. */
INLINE void rms_norm_columns(ELEM(ACT) *dx, float *dw, const ELEM(ACT) *dy, const ELEM(ACT) *x,
                             const float *w, float rstd, float pull, long i, int n) {
  vf gradient = LOADN(ACT, dy + i, n), value = LOADN(ACT, x + i, n);
  vf result = gradient * LOADN(0, w + i, n) * rstd - value * pull;
  STOREN(ACT, dx + i, result, n);
  STOREN(0, dw + i, vfma(gradient, value * rstd, LOADN(0, dw + i, n)), n);
}

void KERNEL(ELEM(ACT) *restrict dx, float *restrict dw_partial, const ELEM(ACT) *restrict dy,
            const ELEM(ACT) *restrict x, const float *restrict rstd, const float *restrict w,
            int core_id) {
  float *dw = dw_partial + (long)core_id * H;
  for (long i = 0; i < H; i++) dw[i] = 0.0f;
  long end = split(N, 1, core_id + 1, NT);
  for (long row = split(N, 1, core_id, NT); row < end; row++) {
    const long at = row * H;
    const float scale = rstd[row];
    /* what x is multiplied with: mean(dy * w * n) * rstd^2 */
    float pull = rms_norm_dot(dy + at, x + at, w) / H * scale * scale * scale;
    long i = 0;
    for (; i + VW <= H; i += VW) {
      rms_norm_columns(dx + at, dw, dy + at, x + at, w, scale, pull, i, VW);
    }
    if (H % VW) {
      rms_norm_columns(dx + at, dw, dy + at, x + at, w, scale, pull, i, H % VW);
    }
  }
}
