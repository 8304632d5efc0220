/* AMX's registers in C: for machines without the unit, and because the sanitizers do not see what an
   instruction written out reads and writes. Operations outside of a kernel's begin and end abort.

   Placed after common.h. A kernel that is loaded without memory of its own has the registers at the
   address TILE_PLACE, and runs on one thread (tests/helpers/amx_in_c.py). */

#define TILE_SIDE 16
#ifdef TILE_PLACE
#define tile_register (*(float(*)[8][TILE_SIDE][TILE_SIDE])TILE_PLACE)
#define tiles_are_shaped (*(int *)(TILE_PLACE + sizeof(tile_register)))
#else
static float tile_register[8][TILE_SIDE][TILE_SIDE];
static int tiles_are_shaped;
#endif

INLINE void tile_is(int shaped, int next) {
  if (tiles_are_shaped != shaped) __builtin_trap();
  tiles_are_shaped = next;
}

INLINE void tile_read(int t, const float *from, long width) {
  tile_is(1, 1);
  for (int i = 0; i < TILE_SIDE; i++)
    for (int j = 0; j < TILE_SIDE; j++) tile_register[t][i][j] = from[i * width + j];
}

INLINE void tile_write(int t, float *to, long width) {
  tile_is(1, 1);
  for (int i = 0; i < TILE_SIDE; i++)
    for (int j = 0; j < TILE_SIDE; j++) to[i * width + j] = tile_register[t][i][j];
}

INLINE void tile_fill(int t) {
  tile_is(1, 1);
  for (int i = 0; i < TILE_SIDE; i++)
    for (int j = 0; j < TILE_SIDE; j++) tile_register[t][i][j] = 0;
}

INLINE float tile_half(float pair, int odd) {
  union {
    float number;
    unsigned bits;
  } u = {pair};
  u.bits = odd ? u.bits & 0xffff0000 : u.bits << 16;
  return u.number;
}

INLINE void tile_add_product(int sum, int a, int b) {
  tile_is(1, 1);
  for (int i = 0; i < TILE_SIDE; i++)
    for (int j = 0; j < TILE_SIDE; j++) {
      float part[2] = {0, 0};
      for (int k = 0; k < TILE_SIDE; k++)
        for (int odd = 0; odd < 2; odd++)
          part[odd] +=
              tile_half(tile_register[a][i][k], odd) * tile_half(tile_register[b][k][j], odd);
      tile_register[sum][i][j] += part[0] + part[1];
    }
}

#define tile_begin() tile_is(0, 1)
#define tile_end() tile_is(1, 0)
#define tile_zero(t) tile_fill(t)
#define tile_load(t, from, width) tile_read(t, from, width)
#define tile_store(t, to, width) tile_write(t, to, width)
#define tile_multiply(sum, a, b) tile_add_product(sum, a, b)
