/* A tile of C in AMX (amx.h), for gemm.c with TILE_AMX, and with COMPUTE_BF16 or BF16X3 (bf16x3.h,
   placed before this file). Placed after panels.h, it defines the same names as tile_vector.h. The
   panels that panels.h packs, A's with rows along k, are what the unit reads. */

#ifndef BF16X3
#define divide_a(out, depth, m0, m1)
#define divide_b(out, depth, n0, n1)
INLINE void tile_step(const slot *a, const slot *b) { amx_step(a, KC, b, NR); }
#endif

#define finish_a(out, depth, m0, m1) divide_a(out, depth, m0, m1)

/* Clears what the last panels of B have past K, up to a whole step of the tile. */
INLINE void finish_b(slot *restrict out, int depth, int n0, int n1) {
  for (int n = n0; n < n1; n += NR)
    for (int k = depth; k % TILE_K; k++)
      for (int j = 0; j < NR; j += VW) vstore(out + (n - n0) * DEPTH + k * NR + j, (vf){0});
  divide_b(out, depth, n0, n1);
}

/* Memory that is needed next, prefetched while the matrix unit works: `rows` rows of `lines` cache
   lines, `row_bytes` apart, `each` lines per step. */
typedef struct {
  const char *row;
  long row_bytes;
  int lines, line, rows, each;
} ahead;

INLINE void bring_near(ahead *next) {
  AS_WRITTEN for (int i = 0; i < next->each && next->rows; i++) {
    __builtin_prefetch(next->row + 64L * next->line, 0, 2);
    if (++next->line < next->lines) continue;
    next->line = 0, next->rows--, next->row += next->row_bytes;
  }
}

#ifndef B_IS_PACKED_OTHERWISE
/* The memory behind the panels of B of columns n0 .. n1 at depth k, spread over `steps` steps. */
INLINE ahead panels_ahead(b_ptr B, int k, int depth, int n0, int n1, long steps) {
  ahead next = {0, 0, 0, 0, 0, 0};
  if (n0 >= n1) return next;
  int count = MIN(depth * PAIR, K - k * PAIR);
  long first = LAYOUT == 0 ? (long)n0 * K + k * PAIR : (long)k * PAIR * N + n0;
  next.row = (const char *)(B + first);
  next.row_bytes = sizeof(*B) * (long)(LAYOUT == 0 ? K : N);
  next.lines = CEIL((long)(LAYOUT == 0 ? count : n1 - n0) * sizeof(*B), 64);
  next.rows = LAYOUT == 0 ? n1 - n0 : count;
  next.each = CEIL((long)next.lines * next.rows, steps);
  return next;
}
#else
#define panels_ahead(B, k, depth, n0, n1, steps) ((ahead){0, 0, 0, 0, 0, 0})
#endif

#if C_T == 1 && defined(ENCODED_TWO)
#define PUT_TWO(place, low, high) (*(halves_mem *)(place) = factor_encode_two(low, high))
#else
#define PUT_TWO(place, low, high) (STORE(C_T, place, low), STORE(C_T, (place) + VW, high))
#endif

INLINE void prefetch_tile(target t, int m, int n) {
  AS_WRITTEN for (int i = 0; i < MR; i++) {
    const char *row = (const char *)(t.C + (long)(m + i) * N + n);
    __builtin_prefetch(row, 1);
    if (C_T == 0) __builtin_prefetch(row + 64, 1);
  }
}

/* Writes float32 sums, MR rows of NR, which include those of earlier panels, to C. */
INLINE void put_sums(target t, const float *sums, int m, int n) {
  if (m + MR <= M && n + NR <= N) {
    for (int i = 0; i < MR; i++)
      for (int j = 0; j < NR; j += 2 * VW) {
        long at = (long)(m + i) * N + n + j;
        vf low = with_others(t, vload(sums + i * NR + j), at, VW);
        vf high = with_others(t, vload(sums + i * NR + j + VW), at + VW, VW);
        PUT_TWO(t.C + at, low, high);
      }
    return;
  }
  for (int i = 0; i < MR && m + i < M; i++)
    for (int j = 0; j < NR && n + j < N; j += VW) {
      long at = (long)(m + i) * N + n + j;
      int count = MIN(VW, N - n - j);
      STOREN(C_T, t.C + at, with_others(t, vload(sums + i * NR + j), at, count), count);
    }
}

/* The registers start from what is in memory and are stored there, where that is float32. */
INLINE void multiply_panel(target t, const slot *a, const slot *b, int depth, int m0, int m1, int n,
                           long at_partial, ahead *next) {
  float sums[MR * NR] __attribute__((aligned(64)));
  for (int m = m0; m < m1; m += MR, a += A_PANEL, at_partial += MR * BLOCK_COLS) {
    int in_place = !PARTIAL && C_T == 0 && !(ACCUMULATE && ADDEND) && m + MR <= M && n + NR <= N;
    float *place = PARTIAL ? t.partial + at_partial : (float *)t.C + (long)m * N + n;
    long width = PARTIAL ? BLOCK_COLS : N;
    prefetch_tile(t, m, n);
    if (PARTIAL ? !t.first : in_place && (ACCUMULATE || !t.first)) {
      tile_every(tile_load, place, width);
    } else if (in_place && ADDEND) {
      tile_every(tile_load, (const float *)t.R + (long)m * N + n, width);
    } else {
      tile_clear();
    }
    for (int k = 0; k < depth; k += TILE_K) {
      tile_step(a + k, b + (long)k * NR);
      bring_near(next);
    }
    if (PARTIAL ? !t.last : in_place) {
      tile_every(tile_store, place, width);
    } else {
      tile_every(tile_store, sums, NR);
      put_sums(t, sums, m, n);
    }
  }
}
