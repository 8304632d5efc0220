/* out[n] = weight[ids[n]], the rows of a table, as in torch.nn.Embedding.

   An id outside [0, V) gives a row of zeros, as a product with its one-hot row would.
   Macros: N ids, H width, V rows of the table, ACT, W_T (storage code of the table, 0 unless set),
   NT. Threads split the ids. */

#ifndef W_T
#define W_T 0
#endif

void KERNEL(ELEM(ACT) *restrict out, const ELEM(W_T) *restrict weight,
            const int *restrict ids, int core_id) {
  for (long row = split(N, 1, core_id, NT); row < split(N, 1, core_id + 1, NT); row++) {
    ELEM(ACT) *to = out + row * H;
    if (ids[row] < 0 || ids[row] >= V) {
      for (long i = 0; i < H; i++) to[i] = 0;
      continue;
    }
    const ELEM(W_T) *from = weight + (long)ids[row] * H;
    long i = 0;
    for (; i + VW <= H; i += VW) STORE(ACT, to + i, LOAD(W_T, from + i));
    if (H % VW) STOREN(ACT, to + i, LOADN(W_T, from + i, H % VW), H % VW);
  }
}
