/* y = x of several tensors, x in float32, y in a smaller type. TENSORS(X) is X(i, its numbers, its
   first block) for each tensor, REST(X) the same without the first; a block has ROUNDS vectors per
   thread of one.
   Macros: TENSORS, REST, ROUNDS. */
#define PER_BLOCK (THREADS * VEC * ROUNDS)
#define TO(i, ...) , GLOBAL Element *y##i
#define FROM(i, ...) , GLOBAL const float *x##i
#define CHOOSE(i, its_count, its_first) \
  if (bx >= its_first) y = y##i, x = x##i, count = its_count, first = its_first;
KERNEL_BEGIN(GLOBAL Element *y0 REST(TO) TENSORS(FROM))
  GLOBAL Element *y = y0;
  GLOBAL const float *x = x0;
  long count = 0, first = 0;
  TENSORS(CHOOSE)
  UNROLL
  for (int i = 0; i < ROUNDS; i++) {
    const long at = (bx - first) * PER_BLOCK + (i * THREADS + tid) * VEC;
    if (at < count) {
      float numbers[VEC];
      LOAD(0, numbers, x + at);
      STORE(TYPE, y + at, numbers);
    }
  }
KERNEL_END
