/* Factors of a bfloat16 product: float32 numbers rounded to bfloat16, and pairs of these, which take
   the place of a float (a slot) because a product instruction multiplies and adds two at a time. */

#if VW == 16 && defined(__AVX512BF16__)
#define PAIRS_BY_PROCESSOR
#endif

/* bf16_encode for a factor. The processor's own rounding turns subnormal numbers into 0, as its
   products do anyway. */
INLINE vh factor_encode(vf x) {
#ifdef PAIRS_BY_PROCESSOR
  vh y;
  __asm__("vcvtneps2bf16 %1, %0" : "=v"(y) : "v"(x));
  return y;
#else
  return bf16_encode(x);
#endif
}

/* Two vectors of factors, in order. */
#if VW == 16
typedef unsigned short halves __attribute__((vector_size(4 * VW)));
typedef halves halves_mem __attribute__((aligned(2), may_alias));
INLINE halves factor_encode_two(vf low, vf high) {
#ifdef PAIRS_BY_PROCESSOR
  halves y;
  __asm__("vcvtne2ps2bf16 %1, %2, %0" : "=v"(y) : "v"(low), "v"(high));
  return y;
#else
  return __builtin_shufflevector(factor_encode(low), factor_encode(high), 0, 1, 2, 3, 4, 5, 6, 7, 8,
                                 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25,
                                 26, 27, 28, 29, 30, 31);
#endif
}
#endif

/* Lane by lane, the pair of an even and the odd number that follows it. */
INLINE vf factor_pairs(vf even, vf odd) {
#ifdef PAIRS_BY_PROCESSOR
  halves y = factor_encode_two(even, odd);
  return (vf)__builtin_shufflevector(y, y, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8,
                                     24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#else
  vu low = __builtin_convertvector(factor_encode(even), vu);
  return (vf)(low | __builtin_convertvector(factor_encode(odd), vu) << 16);
#endif
}
