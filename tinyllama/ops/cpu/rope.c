/* Rotary position embedding over [B, T, HEADS, D]: rotates each pair (i, i + D/2) by angle[t, i].

     out[i]       = x[i] * cos - x[i + D/2] * sin
     out[i + D/2] = x[i + D/2] * cos + x[i] * sin

   RoFormer: Su et al. 2021, arXiv:2104.09864; the halves are paired as in Hugging Face's
   rotate_half. cos and sin are [T, D/2] float32. INVERSE=1 rotates by the negative angle, which is
   the gradient: a rotation's transpose is its inverse.
   Macros: B, T, HEADS, D (even), ACT, NT, INVERSE. Threads split the B * T positions. */

INLINE void rope_step(ELEM(ACT) *out, const ELEM(ACT) *x, const float *cosine, const float *sine,
                      int n) {
  vf c = LOADN(0, cosine, n), s = LOADN(0, sine, n);
  vf first = LOADN(ACT, x, n), second = LOADN(ACT, x + D / 2, n);
  if (INVERSE) s = -s;
  STOREN(ACT, out, first * c - second * s, n);
  STOREN(ACT, out + D / 2, second * c + first * s, n);
}

void KERNEL(ELEM(ACT) *restrict out, const ELEM(ACT) *restrict x, const float *restrict cosine,
            const float *restrict sine, int core_id) {
  const long positions = (long)B * T, half = D / 2;
  long end = split(positions, 1, core_id + 1, NT);
  for (long p = split(positions, 1, core_id, NT); p < end; p++) {
    const float *c = cosine + p % T * half, *s = sine + p % T * half;
    for (long head = p * HEADS; head < (p + 1) * HEADS; head++) {
      ELEM(ACT) *to = out + head * D;
      const ELEM(ACT) *from = x + head * D;
      long i = 0;
      for (; i + VW <= half; i += VW) rope_step(to + i, from + i, c + i, s + i, VW);
      if (half % VW) rope_step(to + i, from + i, c + i, s + i, half % VW);
    }
  }
}
