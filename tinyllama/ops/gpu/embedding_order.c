/* The tokens sorted by id, those of one id in their order: order[i] is the i-th token, sorted[i] its
   id. A token's place is the number of those that come before it, which its thread counts.
   Ids outside 0 .. V - 1 are taken as -1 or V.
   Macros: N tokens, V. */
#define KNOWN(id) ((id) < -1 ? -1 : (id) > V ? V : (id))
#define LAST(n) ((n) < N ? (n) : N - 1)
KERNEL_BEGIN(GLOBAL int *order, GLOBAL int *sorted, GLOBAL const int *ids)
  SHARED int tile[THREADS];
  const int n = bx * THREADS + tid, id = KNOWN(ids[LAST(n)]);
  int place = 0;
  for (int first = 0; first < N; first += THREADS) {
    BARRIER;
    tile[tid] = first + tid < N ? KNOWN(ids[LAST(first + tid)]) : V + 2;
    BARRIER;
    UNROLL_BY(8)
    for (int j = 0; j < THREADS; j++) place += tile[j] < id + (first + j < n);
  }
  if (n < N) {
    order[place] = n;
    sorted[place] = id;
  }
KERNEL_END
