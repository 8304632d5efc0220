/* Maximum and sum of exponentials of a part of a row of logits, for the losses over a vocabulary. */

#define CROSS_ENTROPY_BLOCK 1024
/* Below every finite logit but finite, so that x - max is never inf - inf. */
#define CROSS_ENTROPY_LOWEST -0x1.fffffep127f

INLINE vf cross_entropy_tail(const ELEM(ACT) *x, int n) {
  vf v = LOADN(ACT, x, n), lowest = vset(-__builtin_inff());
  for (int k = 0; k < n; k++) lowest[k] = v[k];
  return lowest;
}

INLINE float cross_entropy_max(const ELEM(ACT) *x, long n, float start) {
  vf best[4] = {vset(start), vset(start), vset(start), vset(start)};
  long i = 0;
  for (; i + 4 * VW <= n; i += 4 * VW) {
    for (int k = 0; k < 4; k++) best[k] = vmax(LOAD(ACT, x + i + k * VW), best[k]);
  }
  AS_WRITTEN for (; i + VW <= n; i += VW) best[0] = vmax(LOAD(ACT, x + i), best[0]);
  if (i < n) best[0] = vmax(cross_entropy_tail(x + i, n - i), best[0]);
  return hmax(vmax(vmax(best[0], best[1]), vmax(best[2], best[3])));
}

INLINE float cross_entropy_sum(const ELEM(ACT) *x, long n, float max) {
  vf sum[2] = {{0}, {0}};
  long i = 0;
  for (; i + 2 * VW <= n; i += 2 * VW) {
    __builtin_prefetch(x + i + CROSS_ENTROPY_BLOCK); /* the next block, while this one computes */
    sum[0] += vexp_nonpositive(LOAD(ACT, x + i) - max);
    sum[1] += vexp_nonpositive(LOAD(ACT, x + i + VW) - max);
  }
  AS_WRITTEN for (; i + VW <= n; i += VW) sum[0] += vexp_nonpositive(LOAD(ACT, x + i) - max);
  if (i < n) sum[1] += vexp_nonpositive(cross_entropy_tail(x + i, n - i) - max);
  return hsum(sum[0] + sum[1]);
}
