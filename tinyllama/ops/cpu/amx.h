/* The registers of AMX, Intel's matrix unit, and one step of a product of 32 x 32 sums.

   The unit has eight tile registers of 16 rows of 64 bytes. `tdpbf16ps` adds to 16 x 16 floats the
   product of 16 rows of 32 bfloat16 of A with 16 rows of 16 pairs of B, pair k of a column in row k.
   Four registers hold 32 x 32 sums; two registers of A and two of B give 4 products for 4 loads. The
   unit treats subnormal factors and sums as 0, rounds every addition to nearest, and first adds the
   even and the odd k of 32 separately.

   A process must have requested the unit from the system (system/processor.py), or ldtilecfg ends
   it. The registers are configured at the beginning of a kernel and released at its end, so that
   the system has nothing to save when it gives the core to another thread.

   With TILE_IN_C a test defines the operations in C. */

#define AMX_SIDE 16                   /* rows of a register, and slots or floats of a row */
#define AMX_ROW_BYTES (4 * AMX_SIDE)

#ifndef TILE_IN_C
typedef struct {
  unsigned char palette, start, unused[14];
  unsigned short row_bytes[16];
  unsigned char rows[16];
} amx_shape;
#define AMX_8(x) {x, x, x, x, x, x, x, x}
static const amx_shape amx_square = {1, 0, {0}, AMX_8(AMX_ROW_BYTES), AMX_8(AMX_SIDE)};

#define tile_begin() __asm__ volatile("ldtilecfg %0" : : "m"(amx_square))
#define tile_end() __asm__ volatile("tilerelease")
#define tile_zero(t) __asm__ volatile("tilezero %%tmm" #t :)
/* Rows lie `width` slots or floats apart. */
#define tile_load(t, from, width) \
  __asm__ volatile("tileloadd (%0,%1), %%tmm" #t : : "r"(from), "r"(4L * (width)) : "memory")
#define tile_store(t, to, width) \
  __asm__ volatile("tilestored %%tmm" #t ", (%0,%1)" : : "r"(to), "r"(4L * (width)) : "memory")
#define tile_multiply(sum, a, b) \
  __asm__ volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #sum :)
#endif

/* Loads all four sums from 32 rows of floats, or stores them there. */
#define tile_every(move, place, width)              \
  move(0, (place), width);                          \
  move(1, (place) + AMX_SIDE, width);               \
  move(2, (place) + (long)AMX_SIDE * (width), width); \
  move(3, (place) + (long)AMX_SIDE * (width) + AMX_SIDE, width)

INLINE void tile_clear(void) {
  tile_zero(0);
  tile_zero(1);
  tile_zero(2);
  tile_zero(3);
}

/* Two registers of A, 32 rows of 16 slots, and of B, 16 rows of 32 slots; rows lie `width` apart. */
INLINE void amx_load_a(const float *a, long width) {
  tile_load(4, a, width);
  tile_load(5, a + AMX_SIDE * width, width);
}

INLINE void amx_load_b(const float *b, long width) {
  tile_load(6, b, width);
  tile_load(7, b + AMX_SIDE, width);
}

INLINE void amx_products(void) {
  tile_multiply(0, 4, 6);
  tile_multiply(1, 4, 7);
  tile_multiply(2, 5, 6);
  tile_multiply(3, 5, 7);
}

/* Adds one step along k, 16 slots of pairs, to the sums. */
INLINE void amx_step(const float *a, long a_width, const float *b, long b_width) {
  tile_load(4, a, a_width);
  amx_load_b(b, b_width);
  tile_load(5, a + AMX_SIDE * a_width, a_width);
  amx_products();
}
