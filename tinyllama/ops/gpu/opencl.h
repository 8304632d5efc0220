/* The OpenCL C 1.2 dialect: no matrix instructions, a lane multiplies its own rows and columns.
   See cuda.h for the words every dialect gives. Three rules for pocl 3.1 (Debian 12), which
   miscompiles the opposite: no unrolling, no branch on the thread's number inside a loop that holds
   a barrier, and one thread (POCL_MAX_PTHREAD_COUNT=1) for kernels with large private arrays. */
#define GLOBAL __global
#define LOCAL __local
#define PRIVATE
#define SHARED __local __attribute__((aligned(16))) /* for copy16 */
#define INLINE static inline
#define UNROLL_BY(count)
#define UNROLL
#define BARRIER barrier(CLK_LOCAL_MEM_FENCE | CLK_GLOBAL_MEM_FENCE) /* of both: cached_attention.c */
#define KERNEL_BEGIN(...)                                                                   \
  __kernel __attribute__((reqd_work_group_size(THREADS, 1, 1))) void NAME(__VA_ARGS__) {    \
    const int tid = get_local_id(0), lane = tid % 32, group = tid / 32;                     \
    const int bx = get_group_id(0), bz = get_group_id(2);                                   \
    (void)lane; (void)group; (void)bx; (void)bz;
#define KERNEL_END }
#define COMMIT()
#define WAIT(n)
#define LANE_ROW (lane / 4)
#define LANE_COL (lane % 4 * 2)
#define ACROSS_ROW_1 1 /* the lanes that hold the same rows differ in these bits */
#define ACROSS_ROW_2 2
#define EXP2(x) exp2(x)
#define LOG2(x) log2(x)
#define SQRT(x) sqrt(x)
#define MAXF(a, b) fmax(a, b)

typedef uint u32;
typedef struct { float v[4]; } Acc;
#define ELEM_0 float
#define ELEM_1 ushort
#define ELEM_2 ushort
#define F16 ushort
INLINE float widen_bf16(ushort x) { return as_float((uint)x << 16); }
INLINE ushort narrow_bf16(float x) {
  uint u = as_uint(x);
  return (u + 0x7fff + (u >> 16 & 1)) >> 16;
}
/* float16 is read and written as 16 bits, since arithmetic in it is an extension. */
INLINE float widen_f16(ushort x) { return vload_half(0, (const half *)&x); }
INLINE ushort narrow_f16(float x) {
  ushort r;
  vstore_half_rte(x, 0, (half *)&r);
  return r;
}
#define WIDEN_0(x) (x)
#define WIDEN_1(x) widen_bf16(x)
#define WIDEN_2(x) widen_f16(x)
#define NARROW_0(x) (x)
#define NARROW_1(x) narrow_bf16(x)
#define NARROW_2(x) narrow_f16(x)
#define STORE2_0(p, x, y) ((p)[0] = (x), (p)[1] = (y))
#define STORE2_1(p, x, y) ((p)[0] = narrow_bf16(x), (p)[1] = narrow_bf16(y))
#define STORE2_2(p, x, y) ((p)[0] = narrow_f16(x), (p)[1] = narrow_f16(y))

/* Zeros instead where `valid` is 0; then nothing is read. */
INLINE void copy16(LOCAL void *to, GLOBAL const void *from, int valid) {
  *(LOCAL uint4 *)to = valid ? *(GLOBAL const uint4 *)from : (uint4)(0);
}
INLINE void store_chunk(LOCAL ELEM(TYPE) *to, const float *x) {
  for (int i = 0; i < 16 / (int)sizeof(ELEM(TYPE)); i++) to[i] = JOIN(NARROW_, TYPE)(x[i]);
}
INLINE float float_of(u32 x) { return as_float(x); }
INLINE u32 bits_of(float x) { return as_uint(x); }
INLINE u32 pack_1(float lo, float hi) { return narrow_bf16(lo) | (u32)narrow_bf16(hi) << 16; }
INLINE u32 pack_2(float lo, float hi) { return narrow_f16(lo) | (u32)narrow_f16(hi) << 16; }
/* `count` words of 4 bytes; the address is a multiple of 4 count, or of 16. */
INLINE void load_words(u32 *r, GLOBAL const uchar *p, int count) {
  if (count % 4 == 0)
    for (int i = 0; i < count; i += 4) vstore4(*(GLOBAL const uint4 *)(p + 4 * i), 0, r + i);
  else
    for (int i = 0; i < count; i++) r[i] = ((GLOBAL const u32 *)p)[i];
}
INLINE void store_words(GLOBAL uchar *p, const u32 *r, int count) {
  if (count % 4 == 0)
    for (int i = 0; i < count; i += 4) *(GLOBAL uint4 *)(p + 4 * i) = vload4(0, r + i);
  else
    for (int i = 0; i < count; i++) ((GLOBAL u32 *)p)[i] = r[i];
}
INLINE float exchanged(float x, int mask, LOCAL float *lanes, int tid) {
  BARRIER;
  lanes[tid] = x;
  BARRIER;
  return lanes[tid ^ mask];
}
