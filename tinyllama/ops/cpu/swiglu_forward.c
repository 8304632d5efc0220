/* y = silu(gate) * up,  silu(a) = a * sigmoid(a) = a / (1 + exp(-a)).

   SwiGLU: Shazeer 2020, arXiv:2002.05202; as Hugging Face's LlamaMLP between its projections.
   Macros: N rows, H their width (the intermediate size), ACT, NT. Threads split the elements. */

INLINE void swiglu_step(ELEM(ACT) *y, const ELEM(ACT) *gate, const ELEM(ACT) *up, int n) {
  vf a = LOADN(ACT, gate, n), b = LOADN(ACT, up, n);
  STOREN(ACT, y, a / (1.0f + vexp(-a)) * b, n);
}

void KERNEL(ELEM(ACT) *restrict y, const ELEM(ACT) *restrict gate, const ELEM(ACT) *restrict up,
            int core_id) {
  const long count = (long)N * H;
  long i = split(count, 64, core_id, NT), end = split(count, 64, core_id + 1, NT);
  for (; i + VW <= end; i += VW) swiglu_step(y + i, gate + i, up + i, VW);
  if (i < end) swiglu_step(y + i, gate + i, up + i, end - i);
}
