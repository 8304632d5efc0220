/* Shared by every CPU kernel: vectors, storage types, exp and log.

   The kernels run without libc or libm and are loaded by a small ELF loader, so every helper is
   INLINE and the kernel is the only function left in .text. Vectors are clang vector extensions
   of VW floats: 16 on AVX-512, 8 on AVX, 4 elsewhere (SSE2, NEON); -DVW= overrides.

   Arithmetic is always float32. Storage types have a code (the macro ACT of a kernel):
     0 float32   1 bfloat16 (upper half of a float32)   2 float16 (IEEE binary16)
   ELEM(code) is the C type, LOAD/STORE move VW elements, LOADN/STOREN the first n <= VW of them
   (the rest read as 0, nothing beyond is touched), LOAD1/STORE1 one. Addresses need only the
   alignment of their element. */

#define INLINE static inline __attribute__((always_inline))
/* Keeps clang from turning loops that clear or copy into calls of memset or memcpy. */
#define NO_LIBC __attribute__((no_builtin("memset", "memcpy", "memmove")))
/* Before a loop that runs too rarely to be worth vectorizing and unrolling: without these loops a
   kernel compiles in half the time. */
#define AS_WRITTEN _Pragma("clang loop vectorize(disable) unroll(disable)")
/* Warns about how vectors wider than the machine's are passed to functions: here all are inlined. */
#pragma clang diagnostic ignored "-Wpsabi"

#ifndef VW
#if defined(__AVX512F__)
#define VW 16
#elif defined(__AVX__)
#define VW 8
#else
#define VW 4
#endif
#endif

typedef float vf __attribute__((vector_size(4 * VW)));
typedef int vi __attribute__((vector_size(4 * VW)));
typedef unsigned vu __attribute__((vector_size(4 * VW)));
typedef unsigned short vh __attribute__((vector_size(2 * VW)));
/* The same vectors, aligned only as their elements are, over memory of any type. */
typedef vf vf_mem __attribute__((aligned(4), may_alias));
typedef vi vi_mem __attribute__((aligned(4), may_alias));
typedef vh vh_mem __attribute__((aligned(2), may_alias));

typedef float elem_0;
typedef unsigned short elem_1;
typedef unsigned short elem_2;

#define ELEM(code) ELEM_(code)
#define ELEM_(code) elem_##code

/* ---- vectors ---- */

/* x - 0 is x for every x, -0 included (0 + x is not), so this costs one broadcast. */
INLINE vf vset(float x) { return x - (vf){0}; }
INLINE vf vload(const void *p) { return *(const vf_mem *)p; }
INLINE void vstore(void *p, vf v) { *(vf_mem *)p = v; }
/* a * b + c, one rounding where the machine has FMA. */
INLINE vf vfma(vf a, vf b, vf c) { return a * b + c; }
/* Lane by lane: mask (all ones or zeros, as comparisons give) ? a : b. */
INLINE vf vselect(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }
/* The second operand is the result when either is NaN, as in the processor's max instruction. */
INLINE vf vmax(vf a, vf b) { return vselect(a > b, a, b); }
INLINE vf vmin(vf a, vf b) { return vselect(a < b, a, b); }
INLINE vf vsqrt(vf x) {
#if VW == 16 && defined(__AVX512F__) /* clang 14 compiles the loop to 16 scalar roots */
  return (vf)__builtin_ia32_sqrtps512(x, 4); /* 4: the current rounding mode */
#else
  vf y;
  for (int i = 0; i < VW; i++) y[i] = __builtin_sqrtf(x[i]);
  return y;
#endif
}

/* Horizontal sum and max, by halving: lane i meets lane i ^ distance. */
#if VW == 16
#define LANES(d) LANES_8(d), 8 ^ d, 9 ^ d, 10 ^ d, 11 ^ d, 12 ^ d, 13 ^ d, 14 ^ d, 15 ^ d
#elif VW == 8
#define LANES(d) LANES_8(d)
#else
#define LANES(d) LANES_4(d)
#endif
#define LANES_4(d) 0 ^ d, 1 ^ d, 2 ^ d, 3 ^ d
#define LANES_8(d) LANES_4(d), 4 ^ d, 5 ^ d, 6 ^ d, 7 ^ d
#define SWAP_LANES(v, d) __builtin_shufflevector(v, v, LANES(d))

INLINE float max1(float a, float b) { return a > b ? a : b; }

INLINE float hsum(vf v) {
#if VW > 8
  v += SWAP_LANES(v, 8);
#endif
#if VW > 4
  v += SWAP_LANES(v, 4);
#endif
  v += SWAP_LANES(v, 2);
  return v[0] + v[1];
}

INLINE float hmax(vf v) {
#if VW > 8
  v = vmax(v, SWAP_LANES(v, 8));
#endif
#if VW > 4
  v = vmax(v, SWAP_LANES(v, 4));
#endif
  v = vmax(v, SWAP_LANES(v, 2));
  return max1(v[0], v[1]);
}

/* ---- storage types ---- */

/* Rounds to nearest even; a NaN keeps its upper bits and is made quiet, so that it cannot round to
   infinity. */
INLINE vf bf16_decode(vh h) { return (vf)(__builtin_convertvector(h, vu) << 16); }
INLINE vh bf16_encode(vf x) {
  vu u = (vu)x, rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16, quiet = (u >> 16) | 0x40;
  vu nan = (vu)(x != x);
  return __builtin_convertvector((nan & quiet) | (~nan & rounded), vh);
}

#if defined(__F16C__) || defined(__aarch64__)
typedef __fp16 vfp16 __attribute__((vector_size(2 * VW)));
INLINE vf fp16_decode(vh h) { return __builtin_convertvector((vfp16)h, vf); }
INLINE vh fp16_encode(vf x) { return (vh)__builtin_convertvector(x, vfp16); }
#else
/* A binary16 value moved into binary32's fields is 2^112 too small, subnormals included. */
INLINE vf fp16_decode(vh h) {
  vu u = __builtin_convertvector(h, vu), sign = (u & 0x8000) << 16;
  vu special = (vu)((u & 0x7c00) == 0x7c00) & 0x7f800000;
  vf x = (vf)((u & 0x7fff) << 13) * 0x1p112f;
  return (vf)((vu)x | special | sign);
}
/* Normal results are rounded as integers; subnormal ones by adding 0.5, whose last place is 2^-24.
   Below 2^17 an overflow becomes infinity by itself; larger numbers are set to infinity. */
INLINE vh fp16_encode(vf x) {
  vu u = (vu)x, sign = (u >> 16) & 0x8000, a = u & 0x7fffffff;
  vu normal = (a - (112u << 23) + 0xfff + ((a >> 13) & 1)) >> 13;
  vu small = (vu)((vf)a + 0.5f) - 0x3f000000;
  vu is_small = (vu)((vi)a < (113 << 23)), is_big = (vu)((vi)a >= (143 << 23));
  vu is_nan = (vu)((vi)a > 0x7f800000);
  vu big = 0x7c00 | (is_nan & (0x200 | ((a >> 13) & 0x3ff)));
  vu half = (is_small & small) | (~is_small & normal);
  half = (is_big & big) | (~is_big & half);
  return __builtin_convertvector(half | sign, vh);
}
#endif

INLINE vf load_0(const elem_0 *p) { return vload(p); }
INLINE vf load_1(const elem_1 *p) { return bf16_decode(*(const vh_mem *)p); }
INLINE vf load_2(const elem_2 *p) { return fp16_decode(*(const vh_mem *)p); }
INLINE void store_0(elem_0 *p, vf x) { vstore(p, x); }
INLINE void store_1(elem_1 *p, vf x) { *(vh_mem *)p = bf16_encode(x); }
INLINE void store_2(elem_2 *p, vf x) { *(vh_mem *)p = fp16_encode(x); }

/* With a constant n = VW these become the plain forms: one function serves a loop and its tail. */
INLINE vf loadn_0(const elem_0 *p, int n) {
  if (n == VW) return load_0(p);
  vf x = {0};
  AS_WRITTEN for (int i = 0; i < n; i++) x[i] = p[i];
  return x;
}
INLINE vh loadn_half(const unsigned short *p, int n) {
  if (n == VW) return *(const vh_mem *)p;
  vh h = {0};
  AS_WRITTEN for (int i = 0; i < n; i++) h[i] = p[i];
  return h;
}
INLINE vf loadn_1(const elem_1 *p, int n) { return bf16_decode(loadn_half(p, n)); }
INLINE vf loadn_2(const elem_2 *p, int n) { return fp16_decode(loadn_half(p, n)); }
INLINE void storen_0(elem_0 *p, vf x, int n) {
  if (n == VW) {
    store_0(p, x);
    return;
  }
  AS_WRITTEN for (int i = 0; i < n; i++) p[i] = x[i];
}
INLINE void storen_half(unsigned short *p, vh h, int n) {
  if (n == VW) {
    *(vh_mem *)p = h;
    return;
  }
  AS_WRITTEN for (int i = 0; i < n; i++) p[i] = h[i];
}
INLINE void storen_1(elem_1 *p, vf x, int n) { storen_half(p, bf16_encode(x), n); }
INLINE void storen_2(elem_2 *p, vf x, int n) { storen_half(p, fp16_encode(x), n); }

#define JOIN(a, b) JOIN_(a, b)
#define JOIN_(a, b) a##b
#define LOAD(code, p) JOIN(load_, code)(p)
#define STORE(code, p, x) JOIN(store_, code)(p, x)
#define LOADN(code, p, n) JOIN(loadn_, code)(p, n)
#define STOREN(code, p, x, n) JOIN(storen_, code)(p, x, n)
#define LOAD1(code, p) (LOADN(code, p, 1)[0])
#define STORE1(code, p, x) STOREN(code, p, vset(x), 1)

/* ---- work for a thread ---- */

/* Where the share of thread `core` of `threads` begins in `count` items that are divided in whole
   grains: thread c works on [split(.., c, ..), split(.., c + 1, ..)). 16 floats are a cache line. */
INLINE long split(long count, long grain, int core, int threads) {
  long grains = (count + grain - 1) / grain, begin = grains * core / threads * grain;
  return begin < count ? begin : count;
}

/* ---- exp and log ---- */

/* Both after Cephes (S. Moshier), expf and logf: Cody-Waite reduction and a minimax polynomial. */
#define LOG2_E 1.44269504088896341f
#define LN2_HIGH 0.693359375f
#define LN2_LOW -2.12194440e-4f

/* Adding 1.5 * 2^23 rounds to an integer n, which is then in the low bits of the sum. Adding 126
   more turns those bits, shifted into the exponent field, into the float 2^(n - 1). The missing
   factor 2 is in the polynomial, so that n = 128 works. At n = -126 the field and the float are 0. */
#define ROUNDER (12582912.0f + 126.0f)

/* exp(x) for -87.3 <= x <= 89. */
INLINE vf exp_in_range(vf x) {
  vf shifted = vfma(x, vset(LOG2_E), vset(ROUNDER)), n = shifted - ROUNDER;
  vf r = vfma(n, vset(-LN2_LOW), vfma(n, vset(-LN2_HIGH), x)); /* |r| <= ln(2) / 2 */
  vf p = vset(2 * 1.9875691500e-4f);
  p = vfma(p, r, vset(2 * 1.3981999507e-3f));
  p = vfma(p, r, vset(2 * 8.3334519073e-3f));
  p = vfma(p, r, vset(2 * 4.1665795894e-2f));
  p = vfma(p, r, vset(2 * 1.6666665459e-1f));
  p = vfma(p, r, vset(2 * 5.0000001201e-1f));
  p = vfma(p, r * r, vfma(r, vset(2.0f), vset(2.0f)));
  return p * (vf)((vi)shifted << 23);
}

/* exp(x) to 1.3 ulp: 0 below -86.99 (results under 1.7e-38, no subnormals), inf from 88.73 on,
   NaN stays NaN. The second form is for x <= 0 and saves an instruction. */
INLINE vf vexp(vf x) { return exp_in_range(vmax(vset(-87.3f), vmin(vset(89.0f), x))); }
INLINE vf vexp_nonpositive(vf x) { return exp_in_range(vmax(vset(-87.3f), x)); }

/* log(x): -inf at 0, inf at inf, NaN below 0, right for subnormals. */
INLINE vf vlog(vf x) {
  vi tiny = x < 0x1p-126f;
  vf scaled = vselect(tiny, x * 0x1p23f, x);
  /* Bits relative to sqrt(1/2), so that the mantissa falls in [sqrt(1/2), sqrt(2)). */
  vi bits = (vi)scaled - 0x3f3504f3;
  vf e = __builtin_convertvector((bits >> 23) - (tiny & 23), vf);
  vf m = (vf)((bits & 0x7fffff) + 0x3f3504f3) - 1.0f, z = m * m;
  vf p = vset(7.0376836292e-2f);
  p = vfma(p, m, vset(-1.1514610310e-1f));
  p = vfma(p, m, vset(1.1676998740e-1f));
  p = vfma(p, m, vset(-1.2420140846e-1f));
  p = vfma(p, m, vset(1.4249322787e-1f));
  p = vfma(p, m, vset(-1.6668057665e-1f));
  p = vfma(p, m, vset(2.0000714765e-1f));
  p = vfma(p, m, vset(-2.4999993993e-1f));
  p = vfma(p, m, vset(3.3333331174e-1f));
  vf y = vfma(p * m, z, e * LN2_LOW);
  y = vfma(vset(-0.5f), z, y) + m;
  y = vfma(e, vset(LN2_HIGH), y);
  vf infinity = vset(__builtin_inff()), nan = vset(__builtin_nanf(""));
  y = vselect(x == infinity, infinity, y);
  y = vselect(x == 0.0f, -infinity, y);
  return vselect((x < 0.0f) | (x != x), nan, y);
}

INLINE float log1(float x) { return vlog(vset(x))[0]; }
