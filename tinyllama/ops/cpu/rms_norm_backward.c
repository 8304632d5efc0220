/* The gradients of y = x * rstd * w (rms_norm_forward.c), with n = x * rstd:

     dx = rstd * (dy * w - n * mean(dy * w * n))  [+ dres]        dw = sum over rows of dy * n

   By differentiation; the same as torch.nn.functional.rms_norm's backward.
   RESIDUAL=1 takes dres, the gradient that went around the norm, and adds it: one pass less.
   dw_partial [NT, H] has one row a thread; their sum is dw.
   Macros: N rows, H width, ACT, NT, RESIDUAL. Threads split the rows. */

#if RESIDUAL
#define RMS_RESIDUAL_PARAMETER const ELEM(ACT) *restrict dres,
#else
#define RMS_RESIDUAL_PARAMETER
#endif

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

/* Columns i to i + n of `rows` rows from `row` on: dw is read and written once for all of them. */
INLINE void rms_norm_columns(ELEM(ACT) *dx, float *dw, const ELEM(ACT) *dy, const ELEM(ACT) *x,
                             const ELEM(ACT) *dres, const float *w, const float *rstd,
                             const float *pull, int rows, long i, int n) {
  vf weight = LOADN(0, w + i, n), sum = {0};
#pragma unroll
  for (int r = 0; r < rows; r++) {
    vf gradient = LOADN(ACT, dy + r * H + i, n), value = LOADN(ACT, x + r * H + i, n);
    vf result = gradient * weight * rstd[r] - value * pull[r];
    sum = vfma(gradient, value * rstd[r], sum);
    if (RESIDUAL) result += LOADN(ACT, dres + r * H + i, n);
    STOREN(ACT, dx + r * H + i, result, n);
  }
  STOREN(0, dw + i, LOADN(0, dw + i, n) + sum, n);
}

INLINE void rms_norm_rows(ELEM(ACT) *dx, float *dw, const ELEM(ACT) *dy, const ELEM(ACT) *x,
                          const ELEM(ACT) *dres, const float *w, const float *rstd, int rows) {
  float pull[4]; /* mean(dy * w * n) * rstd^2, what x is multiplied with */
  for (int r = 0; r < rows; r++) {
    pull[r] = rms_norm_dot(dy + r * H, x + r * H, w) / H * rstd[r] * rstd[r] * rstd[r];
  }
  long i = 0;
  for (; i + VW <= H; i += VW) {
    rms_norm_columns(dx, dw, dy, x, dres, w, rstd, pull, rows, i, VW);
  }
  if (H % VW) rms_norm_columns(dx, dw, dy, x, dres, w, rstd, pull, rows, i, H % VW);
}

void KERNEL(ELEM(ACT) *restrict dx, float *restrict dw_partial, const ELEM(ACT) *restrict dy,
            const ELEM(ACT) *restrict x, const float *restrict rstd, const float *restrict w,
            RMS_RESIDUAL_PARAMETER int core_id) {
#if !RESIDUAL
  const ELEM(ACT) *dres = x; /* never read */
#endif
  float *dw = dw_partial + (long)core_id * H;
  for (long i = 0; i < H; i++) dw[i] = 0.0f;
  long row = split(N, 1, core_id, NT), end = split(N, 1, core_id + 1, NT);
  for (; row + 4 <= end; row += 4) {
    long at = row * H;
    rms_norm_rows(dx + at, dw, dy + at, x + at, dres + at, w, rstd + row, 4);
  }
  for (; row < end; row++) {
    long at = row * H;
    rms_norm_rows(dx + at, dw, dy + at, x + at, dres + at, w, rstd + row, 1);
  }
}
