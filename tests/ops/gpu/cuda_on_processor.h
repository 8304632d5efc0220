// What ops/gpu/cuda.h leaves to CUDA's compiler, as the PTX manual describes it.
#pragma once
#include "emulator.h"
#define CUDA_INDEX(name, call) \
  struct { \
    struct { operator int() const { return emulator::call().x; } } x; \
    struct { operator int() const { return emulator::call().z; } } z; \
  } name;
static CUDA_INDEX(threadIdx, thread_index)
static CUDA_INDEX(blockIdx, block_index)
#define __syncthreads() emulator::barrier()
#define INLINE static inline
#define SHARED alignas(128) static
#define SHARED_BY_LAUNCH(name) alignas(128) static Element name[1 << 17];
#define KERNEL static void
#define UNROLL
#define UNROLL_BY(count)

static inline void copy16(void *to, const void *from, int valid) {
  emulator::copy_later(to, from, valid);
}
#define COMMIT() emulator::commit()
#define WAIT(n) emulator::wait(n)

// Four 8 x 8 matrices of 16 bits: lanes 8 q to 8 q + 7 give the rows of matrix q. A lane gets two
// neighbours of a row of each; transposed, of a column.
struct LdMatrix { u32 *r; const void *row; bool transposed; };
static inline void ldmatrix_of(u32 *r, const void *p, bool transposed) {
  LdMatrix mine = {r, p, transposed};
  emulator::meet(&mine, [](void **lanes) {
    auto lane = [=](int l) { return (LdMatrix *)lanes[l]; };
    for (int q = 0; q < 4; q++) {
      const void *rows[8];
      for (int i = 0; i < 8; i++) rows[i] = lane(8 * q + i)->row;
      emulator::count_banks(rows);
      for (int l = 0; l < 32; l++) {
        u32 pair = 0;
        for (int i = 0; i < 2; i++) {
          const int along = l % 4 * 2 + i, row = lane(l)->transposed ? along : l / 4;
          const int col = lane(l)->transposed ? l / 4 : along;
          pair |= (u32)((const unsigned short *)rows[row])[col] << 16 * i;
        }
        lane(l)->r[q] = pair;
      }
    }
  });
}
static inline void ldmatrix(u32 *r, const void *p) { ldmatrix_of(r, p, false); }
static inline void ldmatrix_transposed(u32 *r, const void *p) { ldmatrix_of(r, p, true); }

static inline float float_of(u32 x) { float f; emulator::copy_bytes(&f, &x, 4); return f; }
static inline u32 bits_of(float x) { u32 u; emulator::copy_bytes(&u, &x, 4); return u; }

// d (16 x 8) += a (16 x DEPTH) b (DEPTH x 8); PER numbers share a register.
struct Mma { float *d; const u32 *a, *b; };
template <int DEPTH, int PER, float (*NUMBER)(u32, int)> static void mma(void **lanes) {
  float a[16][DEPTH], b[DEPTH][8];
  for (int l = 0; l < 32; l++) {
    const Mma *m = (const Mma *)lanes[l];
    for (int h = 0; h < PER; h++) {
      const int k = l % 4 * PER + h;
      for (int i = 0; i < 4; i++)
        a[l / 4 + 8 * (i % 2)][k + 4 * PER * (i / 2)] = NUMBER(m->a[i], h);
      for (int i = 0; i < 2; i++) b[k + 4 * PER * i][l / 4] = NUMBER(m->b[i], h);
    }
  }
  for (int l = 0; l < 32; l++)
    for (int e = 0; e < 4; e++) {
      float sum = 0;
      for (int k = 0; k < DEPTH; k++) sum += a[l / 4 + 8 * (e / 2)][k] * b[k][l % 4 * 2 + e % 2];
      ((Mma *)lanes[l])->d[e] += sum;
    }
}
static inline float as_bf16(u32 x, int h) { return emulator::bfloat16_to_float(x >> 16 * h); }
static inline float as_f16(u32 x, int h) { return emulator::float16_to_float(x >> 16 * h); }
static inline float as_tf32(u32 x, int) { return float_of(x & 0xffffe000u); }
static inline void mma_1(float *d, const u32 *a, const u32 *b) {
  Mma mine = {d, a, b};
  emulator::meet(&mine, mma<16, 2, as_bf16>);
}
static inline void mma_2(float *d, const u32 *a, const u32 *b) {
  Mma mine = {d, a, b};
  emulator::meet(&mine, mma<16, 2, as_f16>);
}
static inline void mma_tf32(float *d, const u32 *a, const u32 *b) {
  Mma mine = {d, a, b};
  emulator::meet(&mine, mma<8, 1, as_tf32>);
}

static inline u32 pack_1(float lo, float hi) {
  return emulator::float_to_bfloat16(lo) | (u32)emulator::float_to_bfloat16(hi) << 16;
}
static inline u32 pack_2(float lo, float hi) {
  return emulator::float_to_float16(lo) | (u32)emulator::float_to_float16(hi) << 16;
}
static inline float widen_f16(unsigned short x) { return emulator::float16_to_float(x); }
// Vector accesses of a GPU must be aligned.
static inline void aligned(const void *p, int bytes) { if ((unsigned long)p % bytes) __builtin_trap(); }
static inline void load16(u32 *r, const void *p) { aligned(p, 16); emulator::copy_bytes(r, p, 16); }
static inline void load8(u32 *r, const void *p) { aligned(p, 8); emulator::copy_bytes(r, p, 8); }
static inline void store16(void *to, u32 a, u32 b, u32 c, u32 d) {
  const u32 v[4] = {a, b, c, d};
  aligned(to, 16);
  emulator::copy_bytes(to, v, 16);
}
static inline void store8(void *to, u32 a, u32 b) {
  const u32 v[2] = {a, b};
  aligned(to, 8);
  emulator::copy_bytes(to, v, 8);
}

struct Exchange { float x, result; int mask; };
static inline float exchanged(float x, int mask, float *, int) {
  Exchange mine = {x, 0, mask};
  emulator::meet(&mine, [](void **lanes) {
    auto lane = [=](int l) { return (Exchange *)lanes[l]; };
    for (int l = 0; l < 32; l++) lane(l)->result = lane(l ^ lane(l)->mask)->x;
  });
  return mine.result;
}
#define EXP2(x) emulator::exp2(x)
#define LOG2(x) emulator::log2(x)
#define SQRT(x) emulator::sqrt(x)
static inline float MAXF(float a, float b) { return a > b ? a : b; }
