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
INLINE void load_words(PRIVATE u32 *r, GLOBAL const uchar *p, int count) {
  for (int i = 0; i < count; i++) r[i] = ((GLOBAL const u32 *)p)[i];
}
INLINE float exchanged(float x, int mask, LOCAL float *, int) {
  return simd_shuffle_xor(x, (ushort)mask);
}
