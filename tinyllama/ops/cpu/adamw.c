/* One step of AdamW, in place, as torch.optim.AdamW does it:

     g = g * grad_scale
     m = m + (1 - beta1) * (g - m)           v = beta2 * v + (1 - beta2) * g^2
     p = p - lr * weight_decay * p
           - lr / bias_correction1 * m / (sqrt(v) / sqrt(bias_correction2) + eps)

   The two changes of p are added before p is changed. PyTorch multiplies p by 1 - lr * weight_decay
   instead, which in float32 is off by up to 3e-8: 1 % of a decay of 3e-6, in the same direction at
   every step.

   Loshchilov and Hutter 2017, arXiv:1711.05101. DECAY=0 leaves the decay out.
   scalars = [lr, beta1, beta2, eps, weight_decay, bias_correction1 (1 - beta1^t),
   bias_correction2 (1 - beta2^t), grad_scale]: on the device, so that a step is never recompiled.
   The corrections must be computed from the betas rounded to float32: 1 - 0.999f has a relative
   error of 1.3e-5, which only corrections with the same error cancel.
   A grad_scale of 0 changes nothing: the step is left out, whatever the gradients hold.
   Macros: COUNT elements, NT, DECAY. Threads split the elements. Optional, 0 unless set:

     COPY     `copy` gets p in bfloat16, rounded as gemm.c rounds a factor (pairs.h, placed before)
     STATE_T  1: m and v are bfloat16, rounded up with the probability that makes the mean right. The
              bits are RANDOM_BITS of an element's index, counted from first[0], with the key scalars[8]
              and scalars[9] (whole numbers below 2^24): the lower half for m, the upper half for v.
              p is changed by m and v before they are rounded. random_bits.h is placed before. */

#ifndef COPY
#define COPY 0
#endif
#ifndef STATE_T
#define STATE_T 0
#endif
typedef ELEM(STATE_T) moment;
#if COPY
#define PUT_COPY(copy, x, n) storen_half(copy, factor_encode(x), n)
#else
#define PUT_COPY(copy, x, n)
#endif

typedef struct {
  vf grad_scale, decay, rest1, beta2, rest2, step, root, eps;
  vu lanes; /* the index of the first elements */
  unsigned key[2];
} adamw_factors;

#if STATE_T
/* x in bfloat16: up if its lower half and `random`, below 2^16, have a carry. A NaN stays one. */
INLINE vh rounded_randomly(vf x, vu random) {
  vu u = (vu)x, nan = (vu)(x != x);
  return __builtin_convertvector((nan & ((u >> 16) | 0x40)) | (~nan & ((u + random) >> 16)), vh);
}
INLINE void put_moments(moment *m, moment *v, vf mean, vf square, vu bits, const adamw_factors *f,
                        int n) {
  RANDOM_BITS(bits, f->key[0], f->key[1]);
  storen_half(m, rounded_randomly(mean, bits & 0xffff), n);
  storen_half(v, rounded_randomly(square, bits >> 16), n);
}
#else
#define put_moments(m, v, mean, square, bits, f, n) \
  do {                                              \
    STOREN(0, m, mean, n);                          \
    STOREN(0, v, square, n);                        \
  } while (0)
#endif

INLINE void adamw_step(float *p, moment *m, moment *v, elem_1 *copy, const float *g, long at,
                       const adamw_factors *f, int n) {
  vf gradient = LOADN(0, g, n) * f->grad_scale;
  vf mean = LOADN(STATE_T, m, n), square = LOADN(STATE_T, v, n), parameter = LOADN(0, p, n);
  mean = vfma(gradient - mean, f->rest1, mean);
  square = vfma(gradient * f->rest2, gradient, square * f->beta2);
  vf size = vfma(vsqrt(square), f->root, f->eps);
  vf change = f->step * mean / size;
  if (DECAY) change = vfma(f->decay, parameter, change);
  parameter -= change;
  STOREN(0, p, parameter, n);
  PUT_COPY(copy, parameter, n);
  put_moments(m, v, mean, square, f->lanes + (unsigned)at, f, n);
}

#if COPY
#define COPY_PARAM , elem_1 *restrict copy
#define COPY_AT(i) (copy + (i))
#else
#define COPY_PARAM
#define COPY_AT(i) 0
#endif
#if STATE_T
#define FIRST_PARAM , const unsigned *restrict first
#else
#define FIRST_PARAM
#endif

void KERNEL(float *restrict p, moment *restrict m, moment *restrict v COPY_PARAM,
            const float *restrict g, const float *restrict scalars FIRST_PARAM, int core_id) {
  if (scalars[7] == 0) return;
  double lr = scalars[0], beta1 = scalars[1], beta2 = scalars[2], weight_decay = scalars[4];
  adamw_factors factors = {
      .grad_scale = vset(scalars[7]),
      .decay = vset(lr * weight_decay),
      .rest1 = vset(1.0 - beta1),
      .beta2 = vset(beta2),
      .rest2 = vset(1.0 - beta2),
      .step = vset(lr / scalars[5]),
      .root = vset(1.0f / __builtin_sqrtf(scalars[6])),
      .eps = vset(scalars[3]),
  };
#if STATE_T
  for (int i = 0; i < VW; i++) factors.lanes[i] = first[0] + i;
  for (int i = 0; i < 2; i++) factors.key[i] = (unsigned)scalars[8 + i];
#endif
  long i = split(COUNT, 64, core_id, NT), end = split(COUNT, 64, core_id + 1, NT);
  for (; i + VW <= end; i += VW)
    adamw_step(p + i, m + i, v + i, COPY_AT(i), g + i, i, &factors, VW);
  if (i < end) adamw_step(p + i, m + i, v + i, COPY_AT(i), g + i, i, &factors, end - i);
}
