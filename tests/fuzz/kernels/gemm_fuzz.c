/* gemm.c, plain and with a packed B (-DPACKED), and embedding_packed.c: any size, any bits. */

// variants: -DLAYOUT=0 -DC_T=1 -DADDEND=1; -DLAYOUT=1 -DA_T=1 -DB_T=1; -DLAYOUT=2 -DACCUMULATE=1
// variants: -DLAYOUT=0 -DA_T=2 -DB_T=2 -DC_T=2 -DCOMPUTE_BF16=1; -DLAYOUT=0 -DVW=16 -DTILE_AVX512
// variants: -DPACKED -DLAYOUT=0 -DA_T=1 -DC_T=1; -DPACKED -DLAYOUT=1 -DMINIMA=1
// variants: -DPACKED -DLAYOUT=0 -DBITS=8 -DVW=8 -DTILE_AVX2

#include "fuzz.h"

#define BLOCKS
#include "../../ops/kernels/product.h"

#ifdef PACKED
#undef KERNEL
#define KERNEL embedding_packed
#define COUNT the_m
#define ACT C_T
#include "../../../tinyllama/ops/cpu/embedding_packed.c"
#endif

static void multiply(void) {
  size_t rows = LAYOUT == 0 ? N : K, width = LAYOUT == 0 ? K : N;
  ELEM(A_T) *a = filled((size_t)M * K, sizeof(*a));
  ELEM(C_T) *out = filled((size_t)M * N, sizeof(*out));
  float *scratch = allocate((size_t)NT * SCRATCH_FLOATS, 4);
#ifdef PACKED
  unsigned char *packed = filled(rows * width * BITS / 8, 1);
  unsigned short *scales = filled(rows * (width / BLOCK), 2);
  unsigned short *minima = filled(rows * (width / BLOCK), 2);
  (void)minima;
  for (int core = 0; core < NT; core++) gemm(out, scratch, a, B_ARGS, core);
#else
  (void)rows, (void)width;
  ELEM(B_T) *b = filled((size_t)N * K, sizeof(*b));
  ELEM(C_T) *added = filled((size_t)M * N, sizeof(*added));
  (void)added;
  for (int core = 0; core < NT; core++) {
#if ADDEND
    gemm(out, scratch, a, b, added, core);
#else
    gemm(out, scratch, a, b, core);
#endif
  }
#endif
#ifdef PACKED
#if LAYOUT == 0
  int *ids = filled((size_t)M, 4);
  ELEM(C_T) *rows_out = allocate((size_t)M * K, sizeof(*rows_out));
  for (int i = 0; i < M; i++)
    if (ids[i] & 64) ids[i] = (int)((unsigned)ids[i] % (unsigned)(N + 2)) - 1;
  for (int core = 0; core < NT; core++) embedding_packed(rows_out, B_ARGS, ids, core);
#endif
#endif
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  begin(data, size);
  int is_huge = next_byte() == 255;
  int m = (int)size_between(1, is_huge ? 300 : 40), n = (int)size_between(1, is_huge ? 300 : 60);
  int k = (int)size_between(1, is_huge ? 700 : 60), threads = (int)size_between(1, 4), block = 0;
#ifdef PACKED
  static const int blocks[] = {2, 6, 32, 64};
  block = blocks[size_between(0, 3)];
  int width = block * (int)size_between(1, 3);
  if (LAYOUT == 0) k = width;
  else n = width;
#endif
  CHOOSE(m, n, k, block, threads);
  multiply();
  release_from(0);
  return 0;
}
