/* Prints C of gemm.c for many sizes, where B is float32 (B_T=0) or holds the same numbers, rounded as
   the kernel rounds a factor (B_T=1): both programs must print the same. */

#include <stdio.h>

#include "memory.h"

#define A_T 1
#define C_T 1
#define COMPUTE_BF16 1
#define MANY_ROWS 1
#include "product.h"

static const int size_m[] = {9, 33, 70, 257}, size_n[] = {1, 31, 33, 130}, size_k[] = {1, 31, 66, 800};

/* Most are ordinary numbers; some are too small for a normal bfloat16, or large. */
static float number(void) {
  float x = (rand() % 20001 - 10000) * 1.37e-4f;
  switch (rand() % 50) {
    case 0: return x * 1e-38f;
    case 1: return x * 1e-41f;
    case 2: return x * 0x1p110f;
    default: return x;
  }
}

static void run(void) {
  long a_count = (long)M * K, b_count = (long)N * K, c_count = (long)M * N;
  elem_1 *a = allocate(a_count, 2), *c = allocate(c_count, 2);
  ELEM(B_T) *b = allocate(b_count, sizeof(*b));
  float *scratch = allocate((long)NT * SCRATCH_FLOATS, 4);
  for (long i = 0; i < a_count; i++) a[i] = bf16_encode(vset((rand() % 2001 - 1000) * 1e-3f))[0];
  for (long i = 0; i < b_count; i++) {
    float x = number();
#if B_T == 1
    b[i] = factor_encode(vset(x))[0];
#else
    b[i] = x;
#endif
  }
  for (int core = 0; core < NT; core++) gemm(c, scratch, a, b, core);
  unsigned long long sum = 14695981039346656037u; /* FNV-1a */
  for (long i = 0; i < c_count; i++) sum = (sum ^ c[i]) * 1099511628211u;
  printf("%d x %d x %d: %016llx\n", M, N, K, sum);
  release_from(0);
}

int main(void) {
  if (!tiles_permitted()) return 0;
  srand(1);
  for (int i = 0; i < 4; i++)
    for (int j = 0; j < 4; j++)
      for (int k = 0; k < 4; k++) CHOOSE(size_m[i], size_n[j], size_k[k], 0, 2), run();
  return 0;
}
