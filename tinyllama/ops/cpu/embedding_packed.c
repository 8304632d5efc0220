/* out[n] = W[ids[n]], rows of a packed table (int4.h), widened; an id outside [0, N) gives zeros.

   Macros: COUNT ids, N rows of the table, K width, ACT, NT, and those of int4.h. Threads split the
   ids. */

NO_LIBC void KERNEL(ELEM(ACT) *restrict out, B_PARAMS, const int *restrict ids, int core_id) {
  for (long n = split(COUNT, 1, core_id, NT); n < split(COUNT, 1, core_id + 1, NT); n++) {
    for (int i = 0; i < K; i += INT4_STEP) {
      float run[INT4_STEP + VW];
      AS_WRITTEN for (int j = 0; j < INT4_STEP + VW; j += VW) vstore(run + j, (vf){0});
      int count = K - i < INT4_STEP ? K - i : INT4_STEP;
      if (ids[n] >= 0 && ids[n] < N) int4_run(run, B_ARGS, ids[n], i, count);
      AS_WRITTEN for (int j = 0; j < count; j += VW)
        STOREN(ACT, out + n * K + i + j, vload(run + j), count - j < VW ? count - j : VW);
    }
  }
}
