/* float32 products as three of bfloat16, for tile_amx.h with COMPUTE_BF16 0 and BF16X3. A factor x is

     high = bfloat16(x)    low = bfloat16(x - high)    |x - high - low| <= 2^-17 |x|

   and a product is high high + high low + low high, summed in float32. What it leaves out, low low
   and what the factors lost, is at most 2^-15 of |a||b|; of a sum it is about 2^-18 (root
   mean square), some 12 times the error of float32. Both parts of a factor together take the place of
   the float, so panels are divided where they lie. */

INLINE vf low_part(vf x) { return x - bf16_decode(factor_encode(x)); }

/* Rows of floats along k -> per 32 of them, 16 slots of high and then 16 of low. */
INLINE void divide_a(slot *out, int depth, int m0, int m1) {
  AS_WRITTEN for (int m = m0; m < m1; m++)
    for (int k = 0; k < depth; k += TILE_K) {
      slot *at = out + (long)(m - m0) / MR * A_PANEL + (m - m0) % MR * KC + k;
      vf first = vload(at), second = vload(at + VW);
      *(halves_mem *)at = factor_encode_two(first, second);
      *(halves_mem *)(at + AMX_SIDE) = factor_encode_two(low_part(first), low_part(second));
    }
}

/* Two rows of NR columns each -> a row of pairs of high, and one of low. */
INLINE void divide_b(slot *out, int depth, int n0, int n1) {
  AS_WRITTEN for (int n = n0; n < n1; n += NR)
    for (int k = 0; k < depth; k += 2)
      for (int j = 0; j < NR; j += VW) {
        slot *even_at = out + (n - n0) * DEPTH + k * NR + j, *odd_at = even_at + NR;
        vf even = vload(even_at), odd = vload(odd_at);
        vstore(even_at, factor_pairs(even, odd));
        vstore(odd_at, factor_pairs(low_part(even), low_part(odd)));
      }
}

/* The low parts' registers are loaded in place of the high ones, those of B twice. */
INLINE void tile_step(const slot *a, const slot *b) {
  const slot *low_a = a + AMX_SIDE, *low_b = b + NR;
  amx_step(a, KC, b, 2 * NR);
  amx_load_b(low_b, 2 * NR);
  amx_products();
  amx_load_a(low_a, KC);
  amx_load_b(b, 2 * NR);
  amx_products();
}
