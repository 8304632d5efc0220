/* Loss and gradient over a chunk of logits x [N, V] that are compared with more than one target:

     hard = log Z - (1 - EPS) x[target] - EPS mean(x) + ZW (log Z)^2,   Z = sum(exp(x))
     soft = sum_k p_k (log p_k - x[id_k] / TEMP) + log sum(exp(x / TEMP))
     loss = HARD hard + SOFT soft

   dx is written over the logits. SOFT includes TEMP^2; K teacher tokens a row, none where K is 0.
   A row whose target is -1 has loss 0 and gradient 0; a target from V on has the loss NaN.
   GRADIENT=0 leaves the logits as they are. Ids are 0 to V - 1 and differ within a row.
   Macros: N rows, V width, K, ACT (of the logits), NT, GRADIENT, EPS, ZW, TEMP, HARD, SOFT. */

/* What a softmax subtracts and divides by, at both temperatures. */
typedef struct {
  float max, inverse_sum, inverse_soft_sum, per_hard;
} soft_targets_row;

INLINE vf soft_targets_tempered(vf below_max) {
  return vexp_nonpositive(below_max * (float)(1.0 / (TEMP)));
}

/* Sum of the logits, or at the temperature of their exponentials. */
INLINE float soft_targets_sum(const ELEM(ACT) *x, float max, int plain) {
  vf sum = {0};
  long i = 0;
  AS_WRITTEN for (; i + VW <= V; i += VW) {
    vf v = LOAD(ACT, x + i);
    sum += plain ? v : soft_targets_tempered(v - max);
  }
  if (i < V) {
    vf v = plain ? LOADN(ACT, x + i, V - i) : cross_entropy_tail(x + i, V - i) - max;
    sum += plain ? v : soft_targets_tempered(v);
  }
  return hsum(sum);
}

INLINE vf soft_targets_dense(soft_targets_row r, vf x) {
  vf below = x - r.max, d = vexp_nonpositive(below) * (r.inverse_sum * r.per_hard);
  if (K) d += soft_targets_tempered(below) * (r.inverse_soft_sum * (float)((SOFT) / (TEMP)));
  return d - (float)((HARD) * (EPS) / V);
}

/* x becomes the gradient: first as if no token were a target, then less at those that are. */
INLINE void soft_targets_gradient(ELEM(ACT) *x, soft_targets_row r, int target, const int *ids,
                                  const float *p) {
  float at_target = LOAD1(ACT, x + target), at[K + 1];
  AS_WRITTEN for (int k = 0; k < K; k++) at[k] = LOAD1(ACT, x + ids[k]);
  long i = 0;
  AS_WRITTEN for (; i + VW <= V; i += VW) STORE(ACT, x + i, soft_targets_dense(r, LOAD(ACT, x + i)));
  if (i < V) STOREN(ACT, x + i, soft_targets_dense(r, LOADN(ACT, x + i, V - i)), V - i);
  float less = (float)((HARD) * (1.0 - (EPS)));
  STORE1(ACT, x + target, soft_targets_dense(r, vset(at_target))[0] - less);
  AS_WRITTEN for (int k = 0; k < K; k++) {
    float d = soft_targets_dense(r, vset(at[k]))[0] - p[k] * (float)((SOFT) / (TEMP));
    STORE1(ACT, x + ids[k], ids[k] == target ? d - less : d);
  }
}

INLINE float soft_targets_divergence(const ELEM(ACT) *x, float log_sum, const int *ids,
                                     const float *p) {
  float total = 0.0f;
  AS_WRITTEN for (int k = 0; k < K; k++) {
    if (p[k] > 0.0f) {
      total += p[k] * (log1(p[k]) - LOAD1(ACT, x + ids[k]) * (float)(1.0 / (TEMP)) + log_sum);
    }
  }
  return total;
}

void KERNEL(ELEM(ACT) *restrict logits, float *restrict loss, const int *restrict targets,
#if K
            const int *restrict ids, const float *restrict probabilities,
#endif
            int core_id) {
#if !K
  const int *ids = 0;
  const float *probabilities = 0;
#endif
  AS_WRITTEN for (long row = split(N, 1, core_id, NT); row < split(N, 1, core_id + 1, NT); row++) {
    ELEM(ACT) *x = logits + row * V;
    int target = targets[row];
    if (target < 0 || target >= V) {
      loss[row] = target < 0 ? 0.0f : __builtin_nanf("");
      AS_WRITTEN for (long i = 0; GRADIENT && i < V; i++) x[i] = 0;
      continue;
    }
    float max = cross_entropy_max(x, V, CROSS_ENTROPY_LOWEST);
    float sum = cross_entropy_sum(x, V, max), log_z = log1(sum) + max;
    float picked = LOAD1(ACT, x + target);
    float hard = log_z - picked + (float)(ZW) * log_z * log_z;
    if ((EPS) > 0.0) hard += (float)(EPS) * (picked - soft_targets_sum(x, max, 1) / V);
    soft_targets_row r = {max, 1.0f / sum, 0.0f, (float)(HARD) * (1.0f + 2.0f * (float)(ZW) * log_z)};
    loss[row] = (float)(HARD) * hard;
    if (K) {
      float soft_sum = soft_targets_sum(x, max, 0);
      float log_sum = log1(soft_sum) + max * (float)(1.0 / (TEMP));
      r.inverse_soft_sum = 1.0f / soft_sum;
      loss[row] += (float)(SOFT) *
                   soft_targets_divergence(x, log_sum, ids + row * K, probabilities + row * K);
    }
    if (GRADIENT) soft_targets_gradient(x, r, target, ids + row * K, probabilities + row * K);
  }
}
