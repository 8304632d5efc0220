/* One step of AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101) of several parameters, in place:

     g = g grad_scale
     m = m + (1 - beta1) (g - m)           v = beta2 v + (1 - beta2) g^2
     p = p - lr weight_decay p - lr / bias_correction1 m / (sqrt(v) / sqrt(bias_correction2) + eps)

   The two changes of p are added before p is changed, as cpu/adamw.c says. scalars = [lr, beta1,
   beta2, eps, weight_decay, bias_correction1, bias_correction2, grad_scale]. p, m and v are float32.
   A grad_scale of 0 changes nothing: the step is left out, whatever the gradients hold.
   TENSORS(X) is X(i, its numbers, its first block, 1 if it decays) for each parameter; a block has
   ROUNDS vectors per thread of one.
   Macros: TENSORS, ROUNDS. */
#define PER_BLOCK (THREADS * VEC * ROUNDS)
#define STATE(i, ...) GLOBAL float *p##i, GLOBAL float *m##i, GLOBAL float *v##i,
#define GRADIENT(i, ...) GLOBAL const Element *g##i,
#define CHOOSE(i, its_count, its_first, its_decay)                     \
  if (bx >= its_first) {                                               \
    p = p##i, m = m##i, v = v##i, g = g##i;                            \
    count = its_count, first = its_first, decays = its_decay;          \
  }
KERNEL_BEGIN(TENSORS(STATE) TENSORS(GRADIENT) GLOBAL const float *scalars)
  GLOBAL float *p = p0, *m = m0, *v = v0;
  GLOBAL const Element *g = g0;
  long count = 0, first = 0;
  int decays = 0;
  TENSORS(CHOOSE)
  const float lr = scalars[0], rest1 = 1 - scalars[1], beta2 = scalars[2], rest2 = 1 - beta2;
  const float eps = scalars[3], decay = decays ? lr * scalars[4] : 0, scale = scalars[7];
  const float step = lr / scalars[5], root = 1 / SQRT(scalars[6]);
  UNROLL
  for (int i = 0; i < ROUNDS; i++) {
    const long at = (bx - first) * PER_BLOCK + (i * THREADS + tid) * VEC;
    if (at < count && scale != 0) {
      float parameter[VEC], mean[VEC], square[VEC], gradient[VEC];
      LOAD(0, parameter, p + at);
      LOAD(0, mean, m + at);
      LOAD(0, square, v + at);
      LOAD(TYPE, gradient, g + at);
      UNROLL
      for (int k = 0; k < VEC; k++) {
        const float x = gradient[k] * scale;
        mean[k] += rest1 * (x - mean[k]);
        square[k] = square[k] * beta2 + x * rest2 * x;
        parameter[k] -= step * mean[k] / (SQRT(square[k]) * root + eps) + decay * parameter[k];
      }
      STORE(0, p + at, parameter);
      STORE(0, m + at, mean);
      STORE(0, v + at, square);
    }
  }
KERNEL_END
