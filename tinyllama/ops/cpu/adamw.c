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
   Macros: COUNT elements, NT, DECAY. Threads split the elements. */

typedef struct {
  vf grad_scale, decay, rest1, beta2, rest2, step, root, eps;
} adamw_factors;

INLINE void adamw_step(float *p, float *m, float *v, const float *g, const adamw_factors *f,
                       int n) {
  vf gradient = LOADN(0, g, n) * f->grad_scale;
  vf mean = LOADN(0, m, n), square = LOADN(0, v, n), parameter = LOADN(0, p, n);
  mean = vfma(gradient - mean, f->rest1, mean);
  square = vfma(gradient * f->rest2, gradient, square * f->beta2);
  vf size = vfma(vsqrt(square), f->root, f->eps);
  vf change = f->step * mean / size;
  if (DECAY) change = vfma(f->decay, parameter, change);
  STOREN(0, p, parameter - change, n);
  STOREN(0, m, mean, n);
  STOREN(0, v, square, n);
}

void KERNEL(float *restrict p, float *restrict m, float *restrict v, const float *restrict g,
            const float *restrict scalars, int core_id) {
  if (scalars[7] == 0) return;
  double lr = scalars[0], beta1 = scalars[1], beta2 = scalars[2], weight_decay = scalars[4];
  const adamw_factors factors = {
      .grad_scale = vset(scalars[7]),
      .decay = vset(lr * weight_decay),
      .rest1 = vset(1.0 - beta1),
      .beta2 = vset(beta2),
      .rest2 = vset(1.0 - beta2),
      .step = vset(lr / scalars[5]),
      .root = vset(1.0f / __builtin_sqrtf(scalars[6])),
      .eps = vset(scalars[3]),
  };
  long i = split(COUNT, 64, core_id, NT), end = split(COUNT, 64, core_id + 1, NT);
  for (; i + VW <= end; i += VW) adamw_step(p + i, m + i, v + i, g + i, &factors, VW);
  if (i < end) adamw_step(p + i, m + i, v + i, g + i, &factors, end - i);
}
