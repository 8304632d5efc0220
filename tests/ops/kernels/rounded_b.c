/* Prints C of gemm.c for many sizes, where B is float32 (B_T=0) or holds the same numbers, rounded as
   the kernel rounds a factor (B_T=1): both programs must print the same. */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tile_permission.h"

static const int size_m[] = {9, 33, 70, 257}, size_n[] = {1, 31, 33, 130}, size_k[] = {1, 31, 66, 800};
static int M, N, K;
#define NT 2
#define A_T 1
#define C_T 1
#define COMPUTE_BF16 1
#define MANY_ROWS 1
#define KERNEL gemm

#include "../../../tinyllama/ops/cpu/common.h"

#include "../../../tinyllama/ops/cpu/tile.h"

#include "../../../tinyllama/ops/cpu/panels.h"

#ifdef TILE_IN_C
#include "tile_in_c.h"
#endif
#ifdef TILE_AMX
#include "../../../tinyllama/ops/cpu/tile_amx.h"
#else
#include "../../../tinyllama/ops/cpu/tile_vector.h"
#endif

#include "../../../tinyllama/ops/cpu/gemm.c"

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
  elem_1 *a = malloc(2 * a_count), *c = malloc(2 * c_count);
  ELEM(B_T) *b = malloc(sizeof(*b) * b_count);
  float *scratch = malloc(4L * NT * SCRATCH_FLOATS);
  if (!a || !b || !c || !scratch) exit(3);
  memset(scratch, 0xff, 4L * NT * SCRATCH_FLOATS);
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
  free(a), free(b), free(c), free(scratch);
}

int main(void) {
  if (!tiles_permitted()) return 0;
  srand(1);
  for (int i = 0; i < 4; i++)
    for (int j = 0; j < 4; j++)
      for (int k = 0; k < 4; k++) M = size_m[i], N = size_n[j], K = size_k[k], run();
  return 0;
}
