/* The Metal dialect: 8 x 8 matrices of a simdgroup. See cuda.h for the words every dialect gives.
   `#include <metal_stdlib>` stands before all macros, since sizes have names such as D and T. */
using namespace metal;
#define GLOBAL device
#define LOCAL threadgroup
#define PRIVATE thread
#ifndef SHARED /* the tests run the text on a processor, where a block's memory is static */
#define SHARED alignas(16) threadgroup /* for copy16 */
#endif
#define INLINE static inline __attribute__((always_inline))
#define PRAGMA(text) _Pragma(#text)
#define UNROLL_BY(count) PRAGMA(unroll count)
#define UNROLL PRAGMA(unroll)
#define BARRIER threadgroup_barrier(mem_flags::mem_threadgroup)
#define KERNEL_BEGIN(...)                                                                   \
  kernel void NAME(__VA_ARGS__, uint3 block_index [[threadgroup_position_in_grid]],         \
                   uint3 thread_index [[thread_position_in_threadgroup]]) {                 \
    const int tid = thread_index.x, lane = tid % 32, group = tid / 32;                      \
    const int bx = block_index.x, bz = block_index.z;                                       \
    (void)lane; (void)group; (void)bx; (void)bz;
#define KERNEL_END }
#define COMMIT()
#define WAIT(n)
/* Apple documents no lane layout; this is the one that MLX and tinygrad rely on. */
#define LANE_ROW (lane / 16 * 4 + lane / 2 % 4)
#define LANE_COL (lane / 8 % 2 * 4 + lane % 2 * 2)
#define ACROSS_ROW_1 1 /* the lanes that hold the same rows differ in these bits */
#define ACROSS_ROW_2 8
#define EXP2(x) exp2(x)
#define LOG2(x) log2(x)
#define SQRT(x) sqrt(x)
#define MAXF(a, b) fmax(a, b)

typedef uint u32;
typedef struct { simdgroup_matrix<float, 8, 8> m[2]; } Acc;
#define ELEM_0 float
#define ELEM_1 bfloat
#define ELEM_2 half
#define F16 half
#define WIDEN_0(x) (x)
#define WIDEN_1(x) float(x)
#define WIDEN_2(x) float(x)
#define STORE2_0(p, x, y) ((p)[0] = (x), (p)[1] = (y))
#define STORE2_1(p, x, y) ((p)[0] = bfloat(x), (p)[1] = bfloat(y))
#define STORE2_2(p, x, y) ((p)[0] = half(x), (p)[1] = half(y))

/* Zeros instead where `valid` is 0; then nothing is read. */
INLINE void copy16(LOCAL void *to, GLOBAL const void *from, int valid) {
  *(LOCAL uint4 *)to = valid ? *(GLOBAL const uint4 *)from : uint4(0);
}
INLINE void store_chunk(LOCAL ELEM(TYPE) *to, PRIVATE const float *x) {
  for (int i = 0; i < 16 / (int)sizeof(ELEM(TYPE)); i++) to[i] = ELEM(TYPE)(x[i]);
}
INLINE float float_of(u32 x) { return as_type<float>(x); }
INLINE u32 bits_of(float x) { return as_type<u32>(x); }
INLINE float widen_f16(ushort x) { return float(as_type<half>(x)); }
INLINE u32 pack_1(float lo, float hi) {
  return as_type<ushort>(bfloat(lo)) | (u32)as_type<ushort>(bfloat(hi)) << 16;
}
INLINE u32 pack_2(float lo, float hi) {
  return as_type<ushort>(half(lo)) | (u32)as_type<ushort>(half(hi)) << 16;
}
/* `count` words of 4 bytes; the address is a multiple of 4 count, or of 16. */
INLINE void load_words(PRIVATE u32 *r, GLOBAL const uchar *p, int count) {
  if (count % 4 == 0)
    for (int i = 0; i < count; i += 4) {
      const uint4 x = *(GLOBAL const uint4 *)(p + 4 * i);
      r[i] = x.x; r[i + 1] = x.y; r[i + 2] = x.z; r[i + 3] = x.w;
    }
  else
    for (int i = 0; i < count; i++) r[i] = ((GLOBAL const u32 *)p)[i];
}
INLINE void store_words(GLOBAL uchar *p, PRIVATE const u32 *r, int count) {
  if (count % 4 == 0)
    for (int i = 0; i < count; i += 4)
      *(GLOBAL uint4 *)(p + 4 * i) = uint4{r[i], r[i + 1], r[i + 2], r[i + 3]};
  else
    for (int i = 0; i < count; i++) ((GLOBAL u32 *)p)[i] = r[i];
}
INLINE float exchanged(float x, int mask, LOCAL float *, int) {
  return simd_shuffle_xor(x, (ushort)mask);
}
