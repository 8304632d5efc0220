/* out[n] = weight[ids[n]], the rows of a table; as torch.nn.Embedding.

   An id outside [0, V) gives a row of zeros, as a product with its one-hot row would.
   Macros: N ids, H width, V rows of the table, ACT, NT. Threads split the ids. */

void KERNEL(ELEM(ACT) *restrict out, const float *restrict weight, const int *restrict ids,
            int core_id) {
  for (long row = split(N, 1, core_id, NT); row < split(N, 1, core_id + 1, NT); row++) {
    ELEM(ACT) *to = out + row * H;
    if (ids[row] < 0 || ids[row] >= V) {
      for (long i = 0; i < H; i++) to[i] = 0;
      continue;
    }
    const float *from = weight + (long)ids[row] * H;
    long i = 0;
    for (; i + VW <= H; i += VW) STORE(ACT, to + i, vload(from + i));
    if (H % VW) STOREN(ACT, to + i, LOADN(0, from + i, H % VW), H % VW);
  }
}
