/* loss = log(sum(exp(x))) - x[target] of each row of x (rows, V). With GRADIENT, x becomes its own
   gradient, softmax(x) - onehot(target). A block computes a row.

   The maximum and the sum come from one pass, in which each thread rescales its sum when its maximum
   grows (Milakov and Gimelshein 2018, arXiv:1805.02867). The second pass finds most of the row in
   the card's cache. A target below 0 is not trained: loss and gradient are 0. One from V on, for
   which there is no logit, has the loss NaN and gradient 0, so that the run stops with an error.
   Macros: V, GRADIENT (defined or not). */
#define LOWEST -1e30f /* below every logit, and finite: x - max is never inf - inf */
#define EXP_LESS(x, max) EXP2(((x) - (max)) * LOG2E)
#define EACH_VECTOR(end) for (int col = tid * VEC; col < (end); col += THREADS * VEC)
KERNEL_BEGIN(GLOBAL Element *x, GLOBAL float *loss, GLOBAL const int *targets)
  SHARED float scratch[THREADS];
  const int target = targets[bx], trained = target >= 0 && target < V;
  float max = LOWEST, sum = 0, v[VEC];
  x += (long)bx * V;
  UNROLL_BY(4)
  EACH_VECTOR(trained ? V : 0) {
    float higher = max;
    LOAD(TYPE, v, x + col);
    UNROLL
    for (int k = 0; k < VEC; k++) higher = MAXF(higher, v[k]);
    sum *= EXP_LESS(max, higher);
    UNROLL
    for (int k = 0; k < VEC; k++) sum += EXP_LESS(v[k], higher);
    max = higher;
  }
  const float highest = block_max(max, scratch, tid);
  const float total = block_sum(sum * EXP_LESS(max, highest), scratch, tid);
#ifdef GRADIENT
  const float scale = 1 / total;
  const int owner = trained ? target / VEC % THREADS : 0; /* the thread that reads x[target] */
  float picked = 0;
  UNROLL_BY(4)
  EACH_VECTOR(V) {
    LOAD(TYPE, v, x + col);
    UNROLL
    for (int k = 0; k < VEC; k++) {
      const int hit = col + k == target;
      picked = hit ? v[k] : picked;
      v[k] = trained ? EXP_LESS(v[k], highest) * scale - hit : 0;
    }
    STORE(TYPE, x + col, v);
  }
#else
  const int owner = 0;
  const float picked = WIDEN(TYPE, x[trained ? target : 0]);
#endif
  if (tid == owner)
    loss[bx] = trained ? LN2 * LOG2(total) + (highest - picked) : target < 0 ? 0 : NOT_A_NUMBER;
KERNEL_END
