/* Keys and values of the tokens so far, as cache_write.c lays them and cached_attention.c reads
   them. Both go through them in the order of memory: keys in blocks of LANES positions, whose
   product with a query then fills whole vectors, values a position at a time.

     keys    [KV][S / LANES][D][LANES]
     values  [KV][S][D]

   Macros: KV heads, D width of a head, S positions (a multiple of LANES), ACT, T tokens. */

#define LANES 16

INLINE long key_place(long head, long slot, long d) {
  return ((head * (S / LANES) + slot / LANES) * D + d) * LANES + slot % LANES;
}
INLINE long value_place(long head, long slot) { return (head * S + slot) * D; }
