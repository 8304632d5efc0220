/* The CUDA dialect: tensor cores through mma.sync, copies that do not block, sm_80 and later.

   A dialect header gives tile.h and the kernels the same words in every language:
     GLOBAL LOCAL PRIVATE  address spaces;  SHARED declares a block's memory;  BARRIER
     copy16 COMMIT WAIT    16 bytes from global to local memory, perhaps asynchronously
     ELEM WIDEN STORE2     element types by code: 0 float32, 1 bfloat16, 2 float16
     store_chunk           floats into 16 bytes of local memory
     load_words store_words  words of 4 bytes, in as few accesses as their number allows
     bits_of float_of      a float's bits;  pack_1 pack_2 widen_f16: 16-bit floats and their bits
     exchanged             a lane's number as seen by the lane whose index differs in `mask`
     LANE_ROW LANE_COL     which numbers of a 16 x 8 result a lane holds (see tile.h)
   The tests define EMULATED and give what stands under it as C++ that runs on a processor. */
#ifndef EMULATED
typedef unsigned int u32;
#define INLINE __device__ __forceinline__
#define SHARED __shared__ __align__(128)
#define SHARED_BY_LAUNCH(name) extern __shared__ __align__(128) Element name[];
#define KERNEL extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
#define PRAGMA(text) _Pragma(#text)
#define UNROLL_BY(count) PRAGMA(unroll count)
#define UNROLL PRAGMA(unroll)

INLINE u32 shared_address(const void *p) { return (u32)__cvta_generic_to_shared(p); }
/* Zeros instead where `valid` is 0; then nothing is read. */
INLINE void copy16(void *to, const void *from, int valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(to)),
               "l"(from), "r"(valid ? 16 : 0));
}
#define COMMIT() asm volatile("cp.async.commit_group;\n" ::)
#define WAIT(n) asm volatile("cp.async.wait_group %0;\n" ::"n"(n))

#define LDMATRIX(KIND)                                                              \
  asm volatile("ldmatrix.sync.aligned.m8n8.x4" KIND ".shared.b16 {%0,%1,%2,%3}, [%4];\n" \
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(p)))
INLINE void ldmatrix(u32 *r, const void *p) { LDMATRIX(""); }
INLINE void ldmatrix_transposed(u32 *r, const void *p) { LDMATRIX(".trans"); }

#define MMA(SHAPE_AND_TYPES)                                                             \
  asm volatile("mma.sync.aligned." SHAPE_AND_TYPES                                       \
               " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"                \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                          \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
INLINE void mma_1(float *d, const u32 *a, const u32 *b) {
  MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
}
INLINE void mma_2(float *d, const u32 *a, const u32 *b) {
  MMA("m16n8k16.row.col.f32.f16.f16.f32");
}
INLINE void mma_tf32(float *d, const u32 *a, const u32 *b) {
  MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
}

INLINE u32 bits_of(float x) { return __float_as_uint(x); }
INLINE float float_of(u32 x) { return __uint_as_float(x); }
/* Two numbers in 32 bits, the first in the lower half. */
INLINE u32 pack_1(float lo, float hi) {
  u32 r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
}
INLINE u32 pack_2(float lo, float hi) {
  u32 r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
}
INLINE float widen_f16(unsigned short x) {
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(x));
  return r;
}
INLINE void load16(u32 *r, const void *p) {
  uint4 x = *(const uint4 *)p;
  r[0] = x.x; r[1] = x.y; r[2] = x.z; r[3] = x.w;
}
INLINE void load8(u32 *r, const void *p) {
  uint2 x = *(const uint2 *)p;
  r[0] = x.x; r[1] = x.y;
}
INLINE void store16(void *to, u32 a, u32 b, u32 c, u32 d) { *(uint4 *)to = make_uint4(a, b, c, d); }
INLINE void store8(void *to, u32 a, u32 b) { *(uint2 *)to = make_uint2(a, b); }
INLINE float exchanged(float x, int mask, float *, int) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}
INLINE float EXP2(float x) { /* error of 2 units in the last place; subnormals become 0 */
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
#define LOG2(x) log2f(x)
#define SQRT(x) sqrtf(x)
#define MAXF(a, b) fmaxf(a, b)
#endif

#define GLOBAL
#define LOCAL
#define PRIVATE
#define BARRIER __syncthreads()
#define KERNEL_BEGIN(...)                                                                   \
  KERNEL NAME(__VA_ARGS__) {                                                                \
    const int tid = threadIdx.x, lane = tid % 32, group = tid / 32;                         \
    const int bx = blockIdx.x, bz = blockIdx.z;                                             \
    (void)lane; (void)group; (void)bx; (void)bz;
#define KERNEL_END }
#define LANE_ROW (lane / 4)
#define LANE_COL (lane % 4 * 2)
#define ACROSS_ROW_1 1 /* the lanes that hold the same rows differ in these bits */
#define ACROSS_ROW_2 2

typedef unsigned char uchar;
typedef unsigned short ushort_bits;
typedef struct { float v[4]; } Acc;
#define ELEM_0 float
#define ELEM_1 ushort_bits
#define ELEM_2 ushort_bits
#define F16 ushort_bits
#define WIDEN_0(x) (x)
#define WIDEN_1(x) float_of((u32)(x) << 16)
#define WIDEN_2(x) widen_f16(x)
#define STORE2_0(p, x, y) store8(p, bits_of(x), bits_of(y))
#define STORE2_1(p, x, y) (*(u32 *)(p) = pack_1(x, y))
#define STORE2_2(p, x, y) (*(u32 *)(p) = pack_2(x, y))
#if TYPE == 0
INLINE void store_chunk(void *to, const float *x) {
  store16(to, bits_of(x[0]), bits_of(x[1]), bits_of(x[2]), bits_of(x[3]));
}
#else
#define PACK(x, y) JOIN(pack_, TYPE)(x, y)
INLINE void store_chunk(void *to, const float *x) {
  store16(to, PACK(x[0], x[1]), PACK(x[2], x[3]), PACK(x[4], x[5]), PACK(x[6], x[7]));
}
#endif
/* `count` words of 4 bytes; the address is a multiple of 4 count, or of 16. */
INLINE void load_words(u32 *r, const uchar *p, int count) {
  if (count % 4 == 0)
    for (int i = 0; i < count; i += 4) load16(r + i, p + 4 * i);
  else if (count == 2)
    load8(r, p);
  else
    for (int i = 0; i < count; i++) r[i] = ((const u32 *)p)[i];
}
INLINE void store_words(uchar *p, const u32 *r, int count) {
  if (count % 4 == 0)
    for (int i = 0; i < count; i += 4) store16(p + 4 * i, r[i], r[i + 1], r[i + 2], r[i + 3]);
  else if (count == 2)
    store8(p, r[0], r[1]);
  else
    for (int i = 0; i < count; i++) ((u32 *)p)[i] = r[i];
}
