/* One step of AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101) of several parameters, in place:

     g = g grad_scale
     m = m + (1 - beta1) (g - m)           v = beta2 v + (1 - beta2) g^2
     p = p - lr weight_decay p - lr / bias_correction1 m / (sqrt(v) / sqrt(bias_correction2) + eps)

   The two changes of p are added before p is changed, as cpu/adamw.c says. scalars = [lr, beta1,
   beta2, eps, weight_decay, bias_correction1, bias_correction2, grad_scale]. p is float32, m and v
   have the type STATE_T.
   A grad_scale of 0 changes nothing: the step is left out, whatever the gradients hold.
   TENSORS(X) is X(i, its numbers, its first block, 1 if it decays, its copy or 0) for each
   parameter; a block has ROUNDS vectors per thread of one. COPIED(X) is X(i) for each that has a
   copy of p, ci, in the type COPY_T.
   With STATE_T 1, bfloat16, m and v are rounded as cpu/adamw.c says, by the key in scalars[8] and
   scalars[9]; the indices of parameter i begin at firsts[i].
   Macros: TENSORS, COPIED, COPY_T, STATE_T, ROUNDS. */
#define PER_BLOCK (THREADS * VEC * ROUNDS)
typedef ELEM(STATE_T) Moment;
typedef ELEM(COPY_T) Copy;
#define STATE(i, ...) GLOBAL float *p##i, GLOBAL Moment *m##i, GLOBAL Moment *v##i,
#define COPY(i) GLOBAL Copy *c##i,
#define GRADIENT(i, ...) GLOBAL const Element *g##i,
#define CHOOSE(i, its_count, its_first, its_decay, its_copy)                \
  if (bx >= its_first) {                                                    \
    p = p##i, m = m##i, v = v##i, g = g##i, copy = its_copy, number = i;    \
    count = its_count, first = its_first, decays = its_decay;               \
  }
#if STATE_T
#define FIRSTS , GLOBAL const u32 *firsts
/* x up to the next bfloat16 if its lower half and `random`, below 2^16, have a carry, else down. */
INLINE float rounded_randomly(float x, u32 random) {
  return x != x ? x : float_of((bits_of(x) + random) & 0xffff0000u);
}
#else
#define FIRSTS
#endif
KERNEL_BEGIN(TENSORS(STATE) COPIED(COPY) TENSORS(GRADIENT) GLOBAL const float *scalars FIRSTS)
  GLOBAL float *p = p0;
  GLOBAL Moment *m = m0, *v = v0;
  GLOBAL Copy *copy = 0;
  GLOBAL const Element *g = g0;
  long count = 0, first = 0;
  int decays = 0, number = 0;
  TENSORS(CHOOSE)
#if STATE_T
  const u32 key_0 = (u32)scalars[8], key_1 = (u32)scalars[9], begin = firsts[number];
#else
  (void)number;
#endif
  const float lr = scalars[0], rest1 = 1 - scalars[1], beta2 = scalars[2], rest2 = 1 - beta2;
  const float eps = scalars[3], decay = decays ? lr * scalars[4] : 0, scale = scalars[7];
  const float step = lr / scalars[5], root = 1 / SQRT(scalars[6]);
  UNROLL
  for (int i = 0; i < ROUNDS; i++) {
    const long at = (bx - first) * PER_BLOCK + (i * THREADS + tid) * VEC;
    if (at < count && scale != 0) {
      float parameter[VEC], mean[VEC], square[VEC], gradient[VEC];
      LOAD(0, parameter, p + at);
      LOAD(STATE_T, mean, m + at);
      LOAD(STATE_T, square, v + at);
      LOAD(TYPE, gradient, g + at);
      UNROLL
      for (int k = 0; k < VEC; k++) {
        const float x = gradient[k] * scale;
        mean[k] += rest1 * (x - mean[k]);
        square[k] = square[k] * beta2 + x * rest2 * x;
        parameter[k] -= step * mean[k] / (SQRT(square[k]) * root + eps) + decay * parameter[k];
#if STATE_T
        u32 bits = begin + (u32)at + k;
        RANDOM_BITS(bits, key_0, key_1);
        mean[k] = rounded_randomly(mean[k], bits & 0xffff);
        square[k] = rounded_randomly(square[k], bits >> 16);
#endif
      }
      STORE(0, p + at, parameter);
      if (copy) STORE(COPY_T, copy + at, parameter);
      STORE(STATE_T, m + at, mean);
      STORE(STATE_T, v + at, square);
    }
  }
KERNEL_END
