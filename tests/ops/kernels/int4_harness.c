/* gemm.c with the packed B of int4.h against a double precision product, for groups and matrices of
   awkward sizes, one thread or three. Sizes are variables, so that one build runs all of them; FIXED
   makes them constants, as the kernel has them in use. */

// variants: -DLAYOUT=0; -DLAYOUT=1; -DLAYOUT=0 -DBLOCKS -DA_T=1 -DC_T=1; -DLAYOUT=1 -DBLOCKS -DC_T=2
// variants: -DLAYOUT=0 -DCOMPUTE_BF16=1 -DA_T=1 -DC_T=1; -DLAYOUT=1 -DCOMPUTE_BF16=1 -DBLOCKS
// variants: -DLAYOUT=0 -DVW=16 -DTILE_AVX512 -DCOMPUTE_BF16=1 -DBLOCKS -DA_T=1
// variants: -DLAYOUT=0 -DVW=16 -DTILE_AVX512; -DLAYOUT=1 -DVW=16 -DTILE_AVX512 -DCOMPUTE_BF16=1
// variants: -DLAYOUT=0 -DVW=4 -DTILE_NEON -DBLOCKS; -DLAYOUT=1 -DVW=4 -DTILE_NEON
// variants: -DLAYOUT=1 -DVW=4 -DTILE_GENERIC -DBLOCKS; -DLAYOUT=0 -DVW=8 -DTILE_AVX2 -DBLOCKS
// variants: -DTILE_AMX -DTILE_IN_C -DLAYOUT=0 -DCOMPUTE_BF16=1 -DA_T=1 -DC_T=1 -DBLOCKS
// variants: -DTILE_AMX -DTILE_IN_C -DLAYOUT=1 -DCOMPUTE_BF16=1 -DA_T=1
// variants: -DTILE_AMX -DLAYOUT=0 -DCOMPUTE_BF16=1 -DA_T=1
// variants: -DLAYOUT=0 -DMINIMA=1; -DLAYOUT=1 -DMINIMA=1 -DBLOCKS; -DLAYOUT=0 -DBITS=8 -DBLOCKS
// variants: -DLAYOUT=1 -DBITS=8; -DLAYOUT=0 -DMINIMA=1 -DCOMPUTE_BF16=1 -DA_T=1 -DC_T=1
// variants: -DLAYOUT=0 -DVW=16 -DTILE_AVX512 -DMINIMA=1; -DLAYOUT=1 -DVW=16 -DTILE_AVX512 -DBITS=8
// variants: -DLAYOUT=0 -DVW=4 -DTILE_NEON -DMINIMA=1; -DLAYOUT=0 -DVW=4 -DTILE_NEON -DBITS=8
// variants: -DLAYOUT=1 -DVW=8 -DTILE_AVX2 -DMINIMA=1; -DLAYOUT=0 -DVW=8 -DTILE_AVX2 -DBITS=8
// variants: -DTILE_AMX -DTILE_IN_C -DLAYOUT=0 -DCOMPUTE_BF16=1 -DA_T=1 -DMINIMA=1
// variants: -DTILE_AMX -DTILE_IN_C -DLAYOUT=1 -DCOMPUTE_BF16=1 -DA_T=1 -DBITS=8
// variants: -DTILE_AMX -DBF16X3 -DTILE_IN_C -DLAYOUT=0 -DBLOCKS
// variants: -DTILE_AMX -DBF16X3 -DTILE_IN_C -DLAYOUT=1
// variants: -DFIXED -DLAYOUT=0 -DM=1 -DN=70 -DK=704 -DBLOCK=32 -DNT=2 -DMINIMA=1
// variants: -DFIXED -DLAYOUT=0 -DM=3 -DN=70 -DK=704 -DBLOCK=32 -DNT=2 -DBITS=8 -DA_T=1
// variants: -DFIXED -DLAYOUT=0 -DM=8 -DN=70 -DK=704 -DBLOCK=32 -DNT=2 -DMINIMA=1 -DA_T=2
// variants: -DFIXED -DLAYOUT=0 -DM=50 -DN=70 -DK=704 -DBLOCK=64 -DNT=2 -DC_T=1
// variants: -DFIXED -DLAYOUT=1 -DM=50 -DN=192 -DK=701 -DBLOCK=64 -DNT=2 -DA_T=2

#include <math.h>
#include <stdio.h>
#include "memory.h"

#define PACKED
#include "product.h"

#ifdef FIXED
static const int size_m[] = {M}, size_rows[] = {LAYOUT == 0 ? N : K}, groups[] = {1};
static const int group[] = {BLOCK}, threads[] = {NT};
#else
static const int size_m[] = {7, 33}, size_rows[] = {1, 33, 61}, groups[] = {1, 3};
static const int group[] = {2, 6, 32, 64}, threads[] = {1, 3};
#endif

/* Whether the kernel rounds its operands. */
#define ROUNDS (COMPUTE_BF16 && M > SKINNY)
static float bf16(float x) { return bf16_decode(bf16_encode(vset(x)))[0]; }

/* W[rows, width]: bytes, scales (one in eight subnormal) and the values that are multiplied. */
static void random_weight(int rows, int width, unsigned char *packed, unsigned short *scales,
                          unsigned short *minima, double *value) {
  for (long i = 0; i < (long)rows * width * BITS / 8; i++) packed[i] = rand();
  for (long i = 0; i < (long)rows * (width / BLOCK); i++) {
    scales[i] = rand() % 8 ? 0x1c00 + rand() % 0x800 : rand() % 0x400;
    minima[i] = 0x9c00 + rand() % 0x800;
  }
  for (int r = 0; r < rows; r++)
    for (int i = 0; i < width; i++) {
      int byte = packed[((long)r * width + i) * BITS / 8];
      int q = BITS == 8 ? byte : i % 2 ? byte >> 4 : byte & 15;
      if (!MINIMA && q >= 1 << (BITS - 1)) q -= 1 << BITS;
      long group = (long)r * (width / BLOCK) + i / BLOCK;
      float w = (float)q * fp16_decode((vh){0} + scales[group])[0];
      if (MINIMA) w += fp16_decode((vh){0} + minima[group])[0];
      value[(long)r * width + i] = ROUNDS ? bf16(w) : w;
    }
}

static void random_input(ELEM(A_T) *stored, double *value, long count) {
  for (long i = 0; i < count; i++) {
    STORE1(A_T, stored + i, (rand() % 2001 - 1000) * 1.37e-3f);
    float x = LOAD1(A_T, stored + i);
    value[i] = ROUNDS ? bf16(x) : x;
  }
}

static int check(const ELEM(C_T) *out, const double *a, const double *w) {
  for (int i = 0; i < M; i++)
    for (int j = 0; j < N; j++) {
      double s = 0, t = 0;
      for (int k = 0; k < K; k++) {
        double p = a[(long)i * K + k] * w[LAYOUT == 0 ? (long)j * K + k : (long)k * N + j];
        s += p, t += fabs(p);
      }
      double got = LOAD1(C_T, out + (long)i * N + j);
      double rounding = C_T == 0 ? 0 : C_T == 1 ? 0x1.01p-8 : 0x1.01p-11;
      if (fabs(got - s) <= t * PRODUCT_ERROR + fabs(s) * rounding + 1e-7) continue;
      printf("M %d N %d K %d block %d threads %d: C[%d,%d] = %.9g, want %.9g\n", M, N, K, BLOCK, NT,
             i, j, got, s);
      return 1;
    }
  return 0;
}

static int run(int m, int rows, int width, int block) {
  int n = LAYOUT == 0 ? rows : width, k = LAYOUT == 0 ? width : rows, wrong = 0;
  CHOOSE(m, n, k, block, 1);
  unsigned char *packed = allocate((size_t)rows * width * BITS / 8, 1);
  unsigned short *scales = allocate((size_t)rows * (width / block), 2);
  unsigned short *minima = allocate((size_t)rows * (width / block), 2);
  double *w = allocate((size_t)rows * width, sizeof(double));
  double *a = allocate((size_t)m * k, sizeof(double));
  ELEM(A_T) *stored = allocate((size_t)m * k, sizeof(*stored));
  random_weight(rows, width, packed, scales, minima, w);
  random_input(stored, a, (long)m * k);
  for (int t = 0; t < LENGTH(threads); t++) {
    CHOOSE(m, n, k, block, threads[t]);
    ELEM(C_T) *out = allocate((size_t)m * n, sizeof(*out));
    float *scratch = allocate((size_t)NT * SCRATCH_FLOATS, 4);
    for (int core = 0; core < NT; core++) gemm(out, scratch, stored, B_ARGS, core);
    wrong += check(out, a, w);
  }
  release_from(0);
  return wrong;
}

int main(void) {
  int wrong = 0, runs = 0;
  if (!tiles_permitted()) return 0;
  for (int g = 0; g < LENGTH(group); g++)
    for (int count = 0; count < LENGTH(groups); count++)
      for (int r = 0; r < LENGTH(size_rows); r++)
        for (int i = 0; i < LENGTH(size_m); i++, runs++) {
          int width = group[g] * groups[count];
#ifdef FIXED
          width = LAYOUT == 0 ? K : N;
#endif
          wrong += run(size_m[i], size_rows[r], width, group[g]);
        }
  printf("%d of %d products are wrong\n", wrong, runs * LENGTH(threads));
  return wrong != 0;
}
