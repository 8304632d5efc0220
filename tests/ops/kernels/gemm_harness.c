/* gemm.c against a double precision product, for every M, N, K out of a list of awkward sizes and
   1 to 3 threads. The sizes are variables here, so that one build runs all of them; FIXED makes
   them constants, as the kernel has them in use. The threads' parts run one by one: each must
   do without what the others leave in the scratch memory, which is NaN until written. */

// variants: -DLAYOUT=0; -DLAYOUT=1; -DLAYOUT=2
// variants: -DLAYOUT=0 -DADDEND=1; -DLAYOUT=1 -DACCUMULATE=1; -DLAYOUT=2 -DACCUMULATE=1 -DADDEND=1
// variants: -DLAYOUT=0 -DBLOCKS; -DLAYOUT=1 -DBLOCKS -DADDEND=1; -DLAYOUT=2 -DBLOCKS -DACCUMULATE=1
// variants: -DLAYOUT=0 -DA_T=1 -DC_T=1 -DADDEND=1; -DLAYOUT=0 -DA_T=1 -DB_T=1 -DC_T=1 -DBLOCKS
// variants: -DLAYOUT=1 -DA_T=1 -DB_T=1 -DC_T=1 -DBLOCKS -DADDEND=1 -DACCUMULATE=1
// variants: -DLAYOUT=2 -DA_T=1 -DB_T=1 -DBLOCKS -DACCUMULATE=1; -DLAYOUT=2 -DA_T=2 -DB_T=2
// variants: -DLAYOUT=0 -DA_T=2 -DB_T=2 -DC_T=2 -DBLOCKS -DADDEND=1; -DLAYOUT=1 -DA_T=2 -DC_T=2
// variants: -DLAYOUT=0 -DCOMPUTE_BF16=1; -DLAYOUT=1 -DCOMPUTE_BF16=1; -DLAYOUT=2 -DCOMPUTE_BF16=1
// variants: -DLAYOUT=0 -DCOMPUTE_BF16=1 -DA_T=1 -DB_T=1 -DC_T=1 -DBLOCKS
// variants: -DLAYOUT=1 -DCOMPUTE_BF16=1 -DA_T=1 -DB_T=2 -DC_T=1 -DBLOCKS
// variants: -DLAYOUT=2 -DCOMPUTE_BF16=1 -DA_T=1 -DB_T=1 -DBLOCKS -DVW=16 -DTILE_AVX512
// variants: -DLAYOUT=0 -DVW=16 -DTILE_AVX512 -DADDEND=1; -DLAYOUT=1 -DVW=16 -DTILE_AVX512 -DC_T=1
// variants: -DLAYOUT=2 -DVW=16 -DTILE_AVX512 -DBLOCKS; -DLAYOUT=0 -DVW=4 -DTILE_NEON
// variants: -DLAYOUT=1 -DVW=4 -DTILE_NEON -DBLOCKS; -DLAYOUT=2 -DVW=4 -DTILE_NEON -DBLOCKS
// variants: -DLAYOUT=0 -DVW=4 -DTILE_GENERIC -DBLOCKS; -DLAYOUT=2 -DVW=4 -DTILE_GENERIC
// variants: -DLAYOUT=0 -DVW=8 -DTILE_AVX2; -DLAYOUT=1 -DVW=8 -DTILE_AVX2 -DA_T=2 -DB_T=2 -DBLOCKS
// variants: -DLAYOUT=2 -DVW=8 -DTILE_AVX2 -DCOMPUTE_BF16=1 -DBLOCKS
// variants: -DTILE_AMX -DLAYOUT=0 -DCOMPUTE_BF16=1 -DA_T=1 -DC_T=1 -DBLOCKS
// variants: -DTILE_AMX -DLAYOUT=1 -DCOMPUTE_BF16=1 -DA_T=1 -DADDEND=1
// variants: -DTILE_AMX -DLAYOUT=2 -DCOMPUTE_BF16=1 -DA_T=1 -DB_T=1 -DACCUMULATE=1
// variants: -DTILE_AMX -DTILE_IN_C -DLAYOUT=0 -DCOMPUTE_BF16=1 -DA_T=1 -DC_T=1 -DBLOCKS -DADDEND=1
// variants: -DTILE_AMX -DTILE_IN_C -DLAYOUT=1 -DCOMPUTE_BF16=1 -DA_T=1 -DB_T=2 -DC_T=1 -DBLOCKS
// variants: -DTILE_AMX -DTILE_IN_C -DLAYOUT=2 -DCOMPUTE_BF16=1 -DBLOCKS -DACCUMULATE=1 -DADDEND=1
// variants: -DTILE_AMX -DTILE_IN_C -DLAYOUT=2 -DCOMPUTE_BF16=1 -DA_T=1 -DB_T=1 -DACCUMULATE=1
// variants: -DTILE_AMX -DTILE_IN_C -DLAYOUT=0 -DCOMPUTE_BF16=1 -DB_T=1 -DADDEND=1 -DMANY_ROWS=1
// variants: -DTILE_AMX -DTILE_IN_C -DLAYOUT=0 -DCOMPUTE_BF16=1 -DA_T=1 -DB_T=1 -DC_T=1 -DMANY_ROWS=1
// variants: -DTILE_AMX -DTILE_IN_C -DLAYOUT=1 -DCOMPUTE_BF16=1 -DA_T=1 -DB_T=1 -DC_T=1 -DBLOCKS
// variants: -DTILE_AMX -DBF16X3 -DLAYOUT=0 -DBLOCKS -DADDEND=1
// variants: -DTILE_AMX -DBF16X3 -DTILE_IN_C -DLAYOUT=0 -DBLOCKS -DADDEND=1
// variants: -DTILE_AMX -DBF16X3 -DTILE_IN_C -DLAYOUT=1 -DACCUMULATE=1
// variants: -DTILE_AMX -DBF16X3 -DTILE_IN_C -DLAYOUT=2 -DBLOCKS -DACCUMULATE=1
// variants: -DFIXED -DLAYOUT=0 -DM=97 -DN=70 -DK=700 -DNT=2 -DC_T=1 -DADDEND=1
// variants: -DFIXED -DLAYOUT=1 -DM=50 -DN=33 -DK=2500 -DNT=3 -DA_T=1 -DC_T=2
// variants: -DFIXED -DLAYOUT=2 -DM=256 -DN=257 -DK=64 -DNT=2 -DACCUMULATE=1
// variants: -DFIXED -DLAYOUT=0 -DM=1 -DN=1000 -DK=259 -DNT=2 -DA_T=1 -DB_T=1 -DC_T=1

#include <math.h>
#include <stdio.h>
#include "memory.h"

#include "product.h"

#ifdef FIXED
static const int size_m[] = {M}, size_n[] = {N}, size_k[] = {K}, threads[] = {NT};
#else
static const int size_m[] = {1, 7, 31, 33, 257}, size_n[] = {1, 7, 31, 33, 257};
static const int size_k[] = {1, 7, 31, 33, 257}, threads[] = {1, 2, 3};
#endif

/* A matrix in its storage type, the values that stand there and those that are multiplied. */
typedef struct {
  void *stored;
  double *value;
} matrix;

static float rounded(float x, int code) {
  if (code == 0) return x;
  return code == 1 ? bf16_decode(bf16_encode(vset(x)))[0] : fp16_decode(fp16_encode(vset(x)))[0];
}

static matrix random_matrix(size_t count, int code, int bf16_again) {
  matrix x = {allocate(count, code ? 2 : 4), allocate(count, sizeof(double))};
  for (size_t i = 0; i < count; i++) {
    float v = rounded((rand() % 2001 - 1000) * 1.37e-3f, code);
    if (code == 0) ((float *)x.stored)[i] = v;
    else {
      vh h = code == 1 ? bf16_encode(vset(v)) : fp16_encode(vset(v));
      ((unsigned short *)x.stored)[i] = h[0];
    }
    x.value[i] = bf16_again ? rounded(v, 1) : v;
  }
  return x;
}

static void reference(double *sum, double *bound, matrix a, matrix b, matrix c, matrix r) {
  for (int i = 0; i < M; i++)
    for (int j = 0; j < N; j++) {
      double s = 0, t = 0;
      for (int k = 0; k < K; k++) {
        double p = a.value[LAYOUT == 2 ? (size_t)k * M + i : (size_t)i * K + k];
        p *= b.value[LAYOUT == 0 ? (size_t)j * K + k : (size_t)k * N + j];
        s += p, t += fabs(p);
      }
      size_t at = (size_t)i * N + j;
      if (ACCUMULATE) s += c.value[at], t += fabs(c.value[at]);
      if (ADDEND) s += r.value[at], t += fabs(r.value[at]);
      /* sums of K terms, then one rounding to the storage type */
      sum[at] = s;
      bound[at] = t * PRODUCT_ERROR + fabs(s) * (C_T == 0 ? 0 : C_T == 1 ? 0x1.01p-8 : 0x1.01p-11) + 1e-7;
    }
}

static double squared_errors, squared_sums; /* of all products */

/* One product with one number of threads against the reference; 1 where a value is wrong. */
static int run(int nt_index, int m, int n, int k, matrix a, matrix b, matrix c, matrix r,
               const double *sum, const double *bound) {
  CHOOSE(m, n, k, 0, threads[nt_index]);
  int kept = memory_count;
  size_t count = (size_t)M * N;
  ELEM(C_T) *out = allocate(count, sizeof(*out));
  if (ACCUMULATE) memcpy(out, c.stored, count * sizeof(*out));
  float *scratch = allocate((size_t)NT * SCRATCH_FLOATS, 4);
  for (int core = 0; core < NT; core++) {
#if ADDEND
    gemm(out, scratch, a.stored, b.stored, r.stored, core);
#else
    (void)r;
    gemm(out, scratch, a.stored, b.stored, core);
#endif
  }
  int wrong = 0;
  for (size_t i = 0; i < count && !wrong; i++) {
    double got = LOAD1(C_T, out + i);
    squared_errors += (got - sum[i]) * (got - sum[i]), squared_sums += sum[i] * sum[i];
    if (fabs(got - sum[i]) <= bound[i]) continue;
    wrong = 1;
    printf("M %d N %d K %d NT %d: C[%zu,%zu] = %.9g, ", m, n, k, NT, i / N, i % N, got);
    printf("want %.9g +- %.2g\n", sum[i], bound[i]);
  }
  release_from(kept);
  return wrong;
}

int main(void) {
  int wrong = 0, runs = 0;
  if (!tiles_permitted()) return 0;
  for (int i = 0; i < LENGTH(size_m) * LENGTH(size_n) * LENGTH(size_k); i++) {
    int m = size_m[i % LENGTH(size_m)], n = size_n[i / LENGTH(size_m) % LENGTH(size_n)];
    int k = size_k[i / LENGTH(size_m) / LENGTH(size_n)];
    if (LENGTH(size_m) > 1 && m + n + k > 400) continue; /* two are large */
    CHOOSE(m, n, k, 0, 1);
    int bf16 = COMPUTE_BF16 && M > SKINNY; /* whether the kernel rounds its operands */
    matrix a = random_matrix((size_t)M * K, A_T, bf16), b = random_matrix((size_t)N * K, B_T, bf16);
    matrix c = random_matrix((size_t)M * N, C_T, 0), r = random_matrix((size_t)M * N, C_T, 0);
    double *sum = allocate((size_t)M * N, sizeof(double));
    double *bound = allocate((size_t)M * N, sizeof(double));
    reference(sum, bound, a, b, c, r);
    for (int t = 0; t < LENGTH(threads); t++, runs++)
      wrong += run(t, m, n, k, a, b, c, r, sum, bound);
    release_from(0);
  }
  double error = sqrt(squared_errors / squared_sums);
#ifdef BF16X3
  wrong += error > 1.5 * 0x1p-18;
#endif
  printf("%d of %d products are wrong, error %.2g of the results (root mean square)\n", wrong, runs,
         error);
  return wrong != 0;
}
