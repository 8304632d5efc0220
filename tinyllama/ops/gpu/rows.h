/* Rows of numbers in memory, of which a thread reads and writes VEC neighbours at once, and sums and
   maxima over all threads of a block. Arithmetic is in float32.

   Macros: TYPE (of activations), THREADS, VEC (a power of two that divides the numbers of a row; at
   most 16 bytes of the type that is read most), H where a block's threads share a row of H. */
typedef ELEM(TYPE) Element;
#define LOG2E 1.4426950408889634f
#define LN2 0.6931471805599453f
#define NOT_A_NUMBER float_of(0x7fc00000u)
/* VEC numbers of a type, given by its code, from and to memory. */
#define LOAD(code, x, p) JOIN(load_, code)(x, (GLOBAL const uchar *)(p))
#define STORE(code, p, x) JOIN(store_, code)((GLOBAL uchar *)(p), x)
#define STORE_ONE(code, p, x) JOIN(store_one_, code)((GLOBAL uchar *)(p), x)

INLINE void load_0(PRIVATE float *x, GLOBAL const uchar *p) {
  u32 r[VEC];
  load_words(r, p, VEC);
  UNROLL
  for (int i = 0; i < VEC; i++) x[i] = float_of(r[i]);
}
INLINE void store_0(GLOBAL uchar *p, PRIVATE const float *x) {
  u32 r[VEC];
  UNROLL
  for (int i = 0; i < VEC; i++) r[i] = bits_of(x[i]);
  store_words(p, r, VEC);
}
INLINE void store_one_0(GLOBAL uchar *p, float x) { *(GLOBAL float *)p = x; }
INLINE void store_one_1(GLOBAL uchar *p, float x) {
  *(GLOBAL unsigned short *)p = (unsigned short)pack_1(x, 0);
}
INLINE void store_one_2(GLOBAL uchar *p, float x) {
  *(GLOBAL unsigned short *)p = (unsigned short)pack_2(x, 0);
}
#if VEC > 1
INLINE void load_1(PRIVATE float *x, GLOBAL const uchar *p) {
  u32 r[VEC / 2];
  load_words(r, p, VEC / 2);
  UNROLL
  for (int i = 0; i < VEC; i++) x[i] = float_of(i % 2 ? r[i / 2] & 0xffff0000u : r[i / 2] << 16);
}
INLINE void load_2(PRIVATE float *x, GLOBAL const uchar *p) {
  u32 r[VEC / 2];
  load_words(r, p, VEC / 2);
  UNROLL
  for (int i = 0; i < VEC; i++) x[i] = widen_f16((unsigned short)(r[i / 2] >> 16 * (i % 2)));
}
INLINE void store_1(GLOBAL uchar *p, PRIVATE const float *x) {
  u32 r[VEC / 2];
  UNROLL
  for (int i = 0; i < VEC; i += 2) r[i / 2] = pack_1(x[i], x[i + 1]);
  store_words(p, r, VEC / 2);
}
INLINE void store_2(GLOBAL uchar *p, PRIVATE const float *x) {
  u32 r[VEC / 2];
  UNROLL
  for (int i = 0; i < VEC; i += 2) r[i / 2] = pack_2(x[i], x[i + 1]);
  store_words(p, r, VEC / 2);
}
#else
INLINE void load_1(PRIVATE float *x, GLOBAL const uchar *p) {
  x[0] = float_of((u32) * (GLOBAL const unsigned short *)p << 16);
}
INLINE void load_2(PRIVATE float *x, GLOBAL const uchar *p) {
  x[0] = widen_f16(*(GLOBAL const unsigned short *)p);
}
INLINE void store_1(GLOBAL uchar *p, PRIVATE const float *x) { store_one_1(p, x[0]); }
INLINE void store_2(GLOBAL uchar *p, PRIVATE const float *x) { store_one_2(p, x[0]); }
#endif

/* A row of H shared by a block: thread tid has the columns from COLUMN(0), ..., COLUMN(PER - 1) on.
   Where the row's end cuts through a round of all threads, those past it read what is there for
   others, do not count and do not write. */
#define PER ((H / VEC + THREADS - 1) / THREADS)
#define COLUMN(i) ((tid + (i) * THREADS) * VEC)
#define INSIDE(col) (H / VEC % THREADS == 0 || (col) < H)
#define CLAMPED(col) (INSIDE(col) ? (col) : 0)

/* x summed, or its maximum, over the 32 lanes of a group, and over all threads of a block: over the
   lanes, then over the groups in their order. All get the same result. scratch has a number per
   thread. */
#define ADD(a, b) ((a) + (b))
#define OVER(name, op)                                                                    \
  INLINE float lanes_##name(float x, LOCAL float *scratch, int tid) {                     \
    UNROLL                                                                                \
    for (int mask = 1; mask < 32; mask *= 2) x = op(x, exchanged(x, mask, scratch, tid)); \
    return x;                                                                             \
  }                                                                                       \
  INLINE float block_##name(float x, LOCAL float *scratch, int tid) {                     \
    x = lanes_##name(x, scratch, tid);                                                    \
    BARRIER; /* the numbers of the last time have been read */                            \
    scratch[tid] = x;                                                                     \
    BARRIER;                                                                              \
    x = scratch[0];                                                                       \
    UNROLL                                                                                \
    for (int first = 32; first < THREADS; first += 32) x = op(x, scratch[first]);         \
    return x;                                                                             \
  }
OVER(sum, ADD)
OVER(max, MAXF)
