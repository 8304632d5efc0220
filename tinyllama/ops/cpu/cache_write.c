/* Keys and values of T new tokens into the cache (cache.h), from `position` on; what would lie past
   its end is left out.

   k, v (T, KV, D) ACT; position (SEQUENCES) int32. Threads split the heads' dimensions. */

NO_LIBC void KERNEL(ELEM(ACT) *restrict keys, ELEM(ACT) *restrict values,
                    const ELEM(ACT) *restrict k, const ELEM(ACT) *restrict v,
                    const int *restrict position, int core_id) {
  const long width = (long)KV * D;
  long begin = split(width, 16, core_id, NT), end = split(width, 16, core_id + 1, NT);
  for (long t = 0; t < T; t++)
    AS_WRITTEN for (long i = begin; i < end; i++) {
      long head = i / D, d = i % D, from = t * width + i, first = FIRST_OF(head);
      if (first + t >= S) continue;
      keys[key_place(head, first + t, d)] = k[from];
      values[value_place(head, first + t) + d] = v[from];
    }
}
