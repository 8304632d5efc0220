/* loss = log(sum(exp(x))) - x[target] and its gradient over a chunk of logits x [N, V]:

     dx = softmax(x) - onehot(target)

   written over the logits. A row whose target is -1 has loss 0 and gradient 0. The
   objective is the sum of the losses: the caller divides by the number of trained tokens.
   The maximum and the sum come from one pass that rescales the sum when the maximum grows
   (Milakov and Gimelshein 2018, arXiv:1805.02867), a cached block at a time.
   GRADIENT=0 leaves the logits as they are. A target below 0 is not trained; one from V on, for
   which there is no logit, has the loss NaN and gradient 0, so that the run stops with an error.
   Macros: N rows, V width, ACT (of the logits), NT, GRADIENT. Threads split the rows. */

/* x becomes exp(x - max) / sum, and 1 less at the target. */
INLINE void cross_entropy_gradient(ELEM(ACT) *x, float max, float sum, int target) {
  float scale = 1.0f / sum, at_target = LOAD1(ACT, x + target) - max;
  long i = 0;
  for (; i + VW <= V; i += VW) {
    STORE(ACT, x + i, vexp_nonpositive(LOAD(ACT, x + i) - max) * scale);
  }
  if (V % VW) {
    vf tail = vexp_nonpositive(LOADN(ACT, x + i, V % VW) - max) * scale;
    STOREN(ACT, x + i, tail, V % VW);
  }
  STORE1(ACT, x + target, vexp_nonpositive(vset(at_target))[0] * scale - 1.0f);
}

void KERNEL(ELEM(ACT) *restrict logits, float *restrict loss, const int *restrict targets,
            int core_id) {
  AS_WRITTEN for (long row = split(N, 1, core_id, NT); row < split(N, 1, core_id + 1, NT); row++) {
    ELEM(ACT) *x = logits + row * V;
    if (targets[row] < 0 || targets[row] >= V) {
      loss[row] = targets[row] < 0 ? 0.0f : __builtin_nanf("");
      AS_WRITTEN for (long i = 0; GRADIENT && i < V; i++) x[i] = 0;
      continue;
    }
    float max = CROSS_ENTROPY_LOWEST, sum = 0.0f;
    AS_WRITTEN for (long i = 0; i < V; i += CROSS_ENTROPY_BLOCK) {
      long n = V - i < CROSS_ENTROPY_BLOCK ? V - i : CROSS_ENTROPY_BLOCK;
      float higher = cross_entropy_max(x + i, n, max);
      sum *= vexp_nonpositive(vset(max - higher))[0];
      max = higher;
      sum += cross_entropy_sum(x + i, n, max);
    }
    loss[row] = log1(sum) + (max - LOAD1(ACT, x + targets[row]));
    if (GRADIENT) cross_entropy_gradient(x, max, sum, targets[row]);
  }
}
