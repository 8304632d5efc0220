/* y = x, in bfloat16, rounded as gemm.c rounds a factor (pairs.h, placed before). Macros: COUNT
   elements, NT. Threads split the elements. */

void KERNEL(elem_1 *restrict y, const float *restrict x, int core_id) {
  long i = split(COUNT, 64, core_id, NT), end = split(COUNT, 64, core_id + 1, NT);
  for (; i + VW <= end; i += VW) *(vh_mem *)(y + i) = factor_encode(vload(x + i));
  if (i < end) storen_half(y + i, factor_encode(LOADN(0, x + i, end - i)), end - i);
}
