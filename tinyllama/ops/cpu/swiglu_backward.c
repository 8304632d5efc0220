/* The gradients of y = silu(gate) * up (swiglu_forward.c), with s = sigmoid(gate):

     dup = dy * gate * s        dgate = dy * up * s * (1 + gate * (1 - s))

   Macros: N rows, H their width (the intermediate size), ACT, NT. Threads split the elements. */

INLINE void swiglu_gradient_step(ELEM(ACT) *dgate, ELEM(ACT) *dup, const ELEM(ACT) *dy,
                                 const ELEM(ACT) *gate, const ELEM(ACT) *up, int n) {
  vf gradient = LOADN(ACT, dy, n), a = LOADN(ACT, gate, n), b = LOADN(ACT, up, n);
  vf s = 1.0f / (1.0f + vexp(-a)), scaled = gradient * s;
  STOREN(ACT, dup, scaled * a, n);
  STOREN(ACT, dgate, scaled * b * vfma(a, 1.0f - s, vset(1.0f)), n);
}

void KERNEL(ELEM(ACT) *restrict dgate, ELEM(ACT) *restrict dup, const ELEM(ACT) *restrict dy,
            const ELEM(ACT) *restrict gate, const ELEM(ACT) *restrict up, int core_id) {
  const long count = (long)N * H;
  long i = split(count, 64, core_id, NT), end = split(count, 64, core_id + 1, NT);
  for (; i + VW <= end; i += VW) {
    swiglu_gradient_step(dgate + i, dup + i, dy + i, gate + i, up + i, VW);
  }
  if (i < end) swiglu_gradient_step(dgate + i, dup + i, dy + i, gate + i, up + i, end - i);
}
