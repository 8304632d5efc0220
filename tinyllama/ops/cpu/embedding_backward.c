/* dw[v] = sum of dout[n] over the n with ids[n] = v, or 0 if there is none: the gradient of
   embedding_forward.c.

   Threads split the columns, so that no two write the same element and every sum is in the order of
   n: the result is the same, bit for bit, for any NT. Ids outside [0, V) are ignored.
   Macros: N ids, H width, V rows of the table, ACT, NT. */

INLINE void embedding_add(float *dw, const ELEM(ACT) *dout, int n) {
  STOREN(0, dw, LOADN(0, dw, n) + LOADN(ACT, dout, n), n);
}

void KERNEL(float *restrict dw, const ELEM(ACT) *restrict dout, const int *restrict ids,
            int core_id) {
  const long begin = split(H, 16, core_id, NT), end = split(H, 16, core_id + 1, NT);
  for (long v = 0; v < V; v++) {
    for (long i = begin; i < end; i++) dw[v * H + i] = 0.0f;
  }
  for (long row = 0; row < N; row++) {
    if (ids[row] < 0 || ids[row] >= V) continue;
    float *to = dw + (long)ids[row] * H;
    const ELEM(ACT) *from = dout + row * H;
    long i = begin;
    for (; i + VW <= end; i += VW) embedding_add(to + i, from + i, VW);
    if (i < end) embedding_add(to + i, from + i, end - i);
  }
}
