/* A tile of C in vector registers, for gemm.c: MR rows of NR columns, one slot of depth at a time.
   Placed after panels.h. Each of the two files with a tile (the other is tile_amx.h) defines
   tile_begin, tile_end, finish_a and finish_b (for what has been packed), panels_ahead with its type,
   and multiply_panel. */

#define COLS (NR / VW)
#define tile_begin()
#define tile_end()
#define finish_a(out, depth, m0, m1)
#define finish_b(out, depth, n0, n1)

/* Packed panels are already in the cache when they are needed: nothing is prefetched. */
typedef int ahead;
#define panels_ahead(B, k, depth, n0, n1, steps) 0

/* a stays in memory: an AVX-512 product reads and broadcasts it in one instruction. */
INLINE vf multiply_add(const slot *a, vf b, vf sum) {
#if !COMPUTE_BF16
  return vfma(vset(*a), b, sum);
#elif defined(__AVX512BF16__) && VW == 16
  __asm__("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(b), "m"(*a));
  return sum;
#else
  vi x = (vi)vset(*a), y = (vi)b;
  sum = vfma((vf)(x << 16), (vf)(y << 16), sum);
  return vfma((vf)(x & -65536), (vf)(y & -65536), sum);
#endif
}

INLINE void tile_step(vf sum[MR][COLS], const slot *a, const slot *b) {
  vf row[COLS];
#pragma clang loop unroll(full)
  for (int j = 0; j < COLS; j++) row[j] = vload(b + j * VW);
#pragma clang loop unroll(full)
  for (int i = 0; i < MR; i++)
#pragma clang loop unroll(full)
    for (int j = 0; j < COLS; j++) sum[i][j] = multiply_add(a + i * A_ROW_STEP, row[j], sum[i][j]);
}

INLINE void tile_product(vf sum[MR][COLS], const slot *a, const slot *b, int depth) {
#pragma clang loop unroll(full)
  for (int i = 0; i < MR; i++)
#pragma clang loop unroll(full)
    for (int j = 0; j < COLS; j++) sum[i][j] = (vf){0};
  /* Keeps each address in its own register; clang would add two of them in every instruction. */
  __asm__("" : "+r"(a), "+r"(b));
  int k = 0;
#pragma clang loop unroll(disable)
  for (; k + 4 <= depth; k += 4) {
#pragma clang loop unroll(full)
    for (int u = 0; u < 4; u++) tile_step(sum, a + u * A_K_STEP, b + u * NR);
    a += 4 * A_K_STEP;
    b += 4 * NR;
  }
#pragma clang loop unroll(disable)
  for (; k < depth; k++, a += A_K_STEP, b += NR) tile_step(sum, a, b);
}

INLINE void put(target t, vf sum, long at, long at_partial, int count) {
  if (PARTIAL && !t.first) sum += vload(t.partial + at_partial);
  if (PARTIAL && !t.last) {
    vstore(t.partial + at_partial, sum);
    return;
  }
  sum = with_others(t, sum, at, count);
  if (count == VW) STORE(C_T, t.C + at, sum);
  else STOREN(C_T, t.C + at, sum, count);
}

INLINE void put_tile(target t, vf sum[MR][COLS], int m, int n, long at_partial) {
  if (m + MR <= M && n + NR <= N) {
#pragma clang loop unroll(full)
    for (int i = 0; i < MR; i++)
#pragma clang loop unroll(full)
      for (int j = 0; j < COLS; j++)
        put(t, sum[i][j], (long)(m + i) * N + n + j * VW, at_partial + i * BLOCK_COLS + j * VW, VW);
    return;
  }
  vf edge[MR][COLS];
#pragma clang loop unroll(full)
  for (int i = 0; i < MR; i++)
#pragma clang loop unroll(full)
    for (int j = 0; j < COLS; j++) edge[i][j] = sum[i][j];
#pragma clang loop unroll(disable)
  for (int i = 0; i < MR && m + i < M; i++)
#pragma clang loop unroll(disable)
    for (int j = 0; j < COLS && n + j * VW < N; j++)
      put(t, edge[i][j], (long)(m + i) * N + n + j * VW, at_partial + i * BLOCK_COLS + j * VW,
          MIN(VW, N - n - j * VW));
}

/* One panel of B times the block of A. */
INLINE void multiply_panel(target t, const slot *a, const slot *b, int depth, int m0, int m1, int n,
                           long at_partial, ahead *next) {
  (void)next;
#pragma clang loop unroll(disable)
  for (int m = m0; m < m1; m += MR) {
    vf sum[MR][COLS];
#pragma clang loop unroll(full)
    for (int i = 0; i < MR; i++) __builtin_prefetch((const char *)(t.C + (long)(m + i) * N + n), 1);
    tile_product(sum, a, b, depth);
    put_tile(t, sum, m, n, at_partial);
    a += A_PANEL;
    at_partial += MR * BLOCK_COLS;
  }
}
