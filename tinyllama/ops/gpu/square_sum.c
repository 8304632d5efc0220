/* parts (BLOCKS) = sums of the squares of all numbers of several tensors; with ACCUMULATE they are
   added to what parts holds. Block bx sums every BLOCKS-th piece of each tensor, so that the result
   does not depend on which block comes first. TENSORS(X) is X(i, its numbers) for each tensor.
   Macros: TENSORS, BLOCKS, ACCUMULATE (defined or not). */
INLINE float squares(GLOBAL const Element *x, long count, int bx, int tid) {
  float sum = 0;
  UNROLL_BY(4)
  for (long at = ((long)bx * THREADS + tid) * VEC; at < count; at += (long)BLOCKS * THREADS * VEC) {
    float v[VEC];
    LOAD(TYPE, v, x + at);
    UNROLL
    for (int k = 0; k < VEC; k++) sum += v[k] * v[k];
  }
  return sum;
}
#define ARGUMENT(i, count) , GLOBAL const Element *x##i
#define SUM(i, count) sum += squares(x##i, count, bx, tid);
KERNEL_BEGIN(GLOBAL float *parts TENSORS(ARGUMENT))
  SHARED float scratch[THREADS];
  float sum = 0;
  TENSORS(SUM)
  sum = block_sum(sum, scratch, tid);
#ifdef ACCUMULATE
  sum += parts[bx];
#endif
  if (tid == 0) parts[bx] = sum;
KERNEL_END
