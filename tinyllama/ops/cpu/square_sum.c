/* partial[c] = the sum of x^2 over thread c's share; the sum of the partials is |x|^2.

   Blocks of 4096 elements are summed in float32 over 8 vectors, so that no float32 sum has more than
   4096 / (8 * VW) terms; the blocks are summed in float64.
   Macros: COUNT elements, NT, ACCUMULATE (1 adds to partial). Threads split the elements. */

#define SQUARE_SUM_BLOCK 4096

INLINE float square_sum_block(const float *x, long n) {
  vf sum[8] = {{0}, {0}, {0}, {0}, {0}, {0}, {0}, {0}};
  long i = 0;
  for (; i + 8 * VW <= n; i += 8 * VW) {
    for (int k = 0; k < 8; k++) {
      __builtin_prefetch(x + i + k * VW + 1024); /* 4 KB ahead: the next page's first lines too */
      vf a = vload(x + i + k * VW);
      sum[k] = vfma(a, a, sum[k]);
    }
  }
  for (; i < n; i += VW) {
    vf a = LOADN(0, x + i, n - i < VW ? n - i : VW);
    sum[0] = vfma(a, a, sum[0]);
  }
  vf low = (sum[0] + sum[1]) + (sum[2] + sum[3]), high = (sum[4] + sum[5]) + (sum[6] + sum[7]);
  return hsum(low + high);
}

void KERNEL(float *restrict partial, const float *restrict x, int core_id) {
  long i = split(COUNT, 64, core_id, NT), end = split(COUNT, 64, core_id + 1, NT);
  double sum = 0.0;
  for (; i + SQUARE_SUM_BLOCK <= end; i += SQUARE_SUM_BLOCK) {
    sum += square_sum_block(x + i, SQUARE_SUM_BLOCK);
  }
  sum += square_sum_block(x + i, end - i);
#if ACCUMULATE
  sum += partial[core_id];
#endif
  partial[core_id] = sum;
}
