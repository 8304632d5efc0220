/* y = x * rstd * w,  rstd = 1 / sqrt(mean(x^2) + EPS), row by row.

   RMSNorm: Zhang and Sennrich 2019, arXiv:1910.07467; as Hugging Face's LlamaRMSNorm.
   Macros: N rows, H width, EPS, ACT, NT. Threads split the rows. */

INLINE float rms_norm_mean_square(const ELEM(ACT) *x) {
  vf sum[4] = {{0}, {0}, {0}, {0}};
  long i = 0;
  for (; i + 4 * VW <= H; i += 4 * VW) {
    for (int k = 0; k < 4; k++) {
      vf a = LOAD(ACT, x + i + k * VW);
      sum[k] = vfma(a, a, sum[k]);
    }
  }
  for (; i < H; i += VW) {
    vf a = LOADN(ACT, x + i, i + VW <= H ? VW : H % VW);
    sum[0] = vfma(a, a, sum[0]);
  }
  return hsum((sum[0] + sum[1]) + (sum[2] + sum[3])) / H;
}

void KERNEL(ELEM(ACT) *restrict y, float *restrict rstd, const ELEM(ACT) *restrict x,
            const float *restrict w, int core_id) {
  for (long row = split(N, 1, core_id, NT); row < split(N, 1, core_id + 1, NT); row++) {
    const ELEM(ACT) *from = x + row * H;
    ELEM(ACT) *to = y + row * H;
    float scale = 1.0f / __builtin_sqrtf(rms_norm_mean_square(from) + (float)EPS);
    rstd[row] = scale;
    long i = 0;
    for (; i + VW <= H; i += VW) STORE(ACT, to + i, LOAD(ACT, from + i) * scale * vload(w + i));
    if (H % VW) {
      vf tail = LOADN(ACT, from + i, H % VW) * scale * LOADN(0, w + i, H % VW);
      STOREN(ACT, to + i, tail, H % VW);
    }
  }
}
