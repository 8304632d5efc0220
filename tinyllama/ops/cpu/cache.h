/* Keys and values of the tokens so far, as cache_write.c lays them and cached_attention.c reads
   them. Both go through them in the order of memory: keys in blocks of KEY_LANES positions, whose
   product with a query then fills whole vectors, values a position at a time.

     keys    [KV][S / KEY_LANES][D][KEY_LANES]
     values  [KV][S][D]

   Macros: KV heads, D width of a head, S positions (a multiple of KEY_LANES), ACT, T tokens, and
   SEQUENCES (1 unless set): those of several sequences lie one after the other, KV heads of all of
   them, and with T = 1 their rows do so too. Each has a position of its own. */

#ifndef SEQUENCES
#define SEQUENCES 1
#endif
#define FIRST_OF(head) position[(head) / (KV / SEQUENCES)]

#define KEY_LANES 16

INLINE long key_place(long head, long slot, long d) {
  return ((head * (S / KEY_LANES) + slot / KEY_LANES) * D + d) * KEY_LANES + slot % KEY_LANES;
}
INLINE long value_place(long head, long slot) { return (head * S + slot) * D; }
