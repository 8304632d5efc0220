/* Attention's products in AMX (amx.h), for attention_forward_amx.c and attention_backward_amx.c; ACT
   is bfloat16. q, k, v and dout are multiplied as they are stored. P and dS are rounded to bfloat16
   for the products that read them, as PyTorch does; softmax and all sums are float32.

   Blocks of 32 x 32 sums are computed at a time. The left factor of a product has rows along the
   depth, the right one has pairs along the depth: a slot is two bfloat16 that are added up. A tile
   of TILE rows of D numbers therefore has up to four forms, PACKED_FLOATS slots each, with 0 past D
   and past the last row:

     rows     [TILE][WIDTH / 2]   left,  depth D      k of k q^T,     v of v dout^T
     columns  [WIDTH / 2][TILE]   right, depth D      q of k q^T,     dout of v dout^T
     pairs    [TILE / 2][WIDTH]   right, depth TILE   q of dS^T q,    dout of P^T dout
     lines    [WIDTH][TILE / 2]   left,  depth TILE   v of v^T P^T,   k of k^T dS^T

   out and dq are thus computed transposed, [WIDTH][TILE], queries along the vector lanes as in the
   scores. */

#define PACKED_FLOATS ((long)TILE * WIDTH / 2)
#define HALF_SCORE_FLOATS (SCORE_FLOATS / 2)

typedef unsigned short half_mem __attribute__((may_alias));

/* ---- packing ---- */

INLINE void pack_tile(float *rows, const ELEM(ACT) *from, long heads, long count) {
  AS_WRITTEN for (long r = 0; r < TILE; r++)
    AS_WRITTEN for (long d = 0; d < WIDTH; d += VW) {
      long inside = r < count ? least(VW, D - d) : 0;
      vh part = inside > 0 ? loadn_half(from + r * heads * D + d, (int)inside) : (vh){0};
      *(vh_mem *)((half_mem *)rows + r * WIDTH + d) = part;
    }
}

/* to[c][r] = from[r][c] for multiples of VW. */
INLINE void turn(float *to, long to_width, const float *from, long rows, long width) {
  AS_WRITTEN for (long r = 0; r < rows; r += VW)
    AS_WRITTEN for (long c = 0; c < width; c += VW)
      transpose_block(to + c * to_width + r, to_width, from + r * width + c, width);
}

INLINE void rows_to_columns(float *columns, const float *rows) {
  turn(columns, TILE, rows, TILE, WIDTH / 2);
}

INLINE void rows_to_pairs(float *pairs, const float *rows) {
  const half_mem *half = (const half_mem *)rows;
  AS_WRITTEN for (long r = 0; r < TILE; r += 2)
    AS_WRITTEN for (long d = 0; d < WIDTH; d += VW) {
      vu even = __builtin_convertvector(*(const vh_mem *)(half + r * WIDTH + d), vu);
      vu odd = __builtin_convertvector(*(const vh_mem *)(half + (r + 1) * WIDTH + d), vu);
      vstore(pairs + r / 2 * WIDTH + d, (vf)(even | odd << 16));
    }
}

INLINE void pairs_to_lines(float *lines, const float *pairs) {
  turn(lines, TILE / 2, pairs, TILE / 2, WIDTH);
}

/* The first `count` queries of [WIDTH][TILE] sums, each times its factor, as rows of out or dq. */
INLINE void unpack_lines(ELEM(ACT) *to, const float *lines, const float *factor, long count) {
  float row[VW][WIDTH];
  AS_WRITTEN for (long r = 0; r < count; r += VW) {
    AS_WRITTEN for (long d = 0; d < WIDTH; d += VW)
      transpose_block(row[0] + d, WIDTH, lines + d * TILE + r, TILE);
    AS_WRITTEN for (long i = 0; i < least(VW, count - r); i++)
      unpack_row(to + (r + i) * H * D, row[i], factor[r + i]);
  }
}

INLINE void clear(float *sums, long count) {
  AS_WRITTEN for (long i = 0; i < count; i += VW) vstore(sums + i, vset(0.0f));
}

/* ---- products ---- */

/* A block of sums: c = a b, or c += a b; `depth` in slots, a multiple of 16. */
INLINE void block_product(float *c, long c_width, int add, const float *a, long a_width,
                          const float *b, long b_width, long depth) {
  if (add) {
    tile_every(tile_load, c, c_width);
  } else {
    tile_clear();
  }
  AS_WRITTEN for (long k = 0; k < depth; k += AMX_SIDE)
    amx_step(a + k, a_width, b + k * b_width, b_width);
  tile_every(tile_store, c, c_width);
}

/* Like make_strip, in whole blocks: keys from the last one on are masked or packed as 0. */
INLINE strip make_blocks(tile t, long panel) {
  strip s = make_strip(t, panel);
  s.high = round_up(s.high, MR);
  return s;
}

/* Scores (keys, TILE) of a strip: `rows` of k or v times its `columns` of q or dout. */
INLINE void score_blocks(float *scores, strip s, const float *rows, const float *columns) {
  AS_WRITTEN for (long k = s.low; k < s.high; k += MR)
    block_product(scores + k * TILE, TILE, 0, rows + k * WIDTH / 2, WIDTH / 2, columns, TILE,
                  WIDTH / 2);
}

/* out [WIDTH][TILE] of a strip += lines of v or k times P or dS, pairs of keys [TILE / 2][TILE]. */
INLINE void add_blocks_over_keys(float *out, strip s, const float *lines, const float *weights) {
  AS_WRITTEN for (long d = 0; d < WIDTH; d += MR)
    block_product(out + d * TILE, TILE, 1, lines + d * TILE / 2 + s.low / 2, TILE / 2,
                  weights + s.low / 2 * TILE, TILE, (s.high - s.low) / 2);
}

INLINE int strip_has(tile t, long query, long key) {
  strip s = make_blocks(t, query / NR);
  return s.low <= key && key < s.high;
}

/* out [keys][WIDTH] += P or dS, rows along queries [TILE][TILE / 2], times pairs of dout or q. A block
   of keys takes the queries whose strips have it. */
INLINE void add_blocks_over_queries(float *out, const float *weights, const float *pairs, tile t) {
  AS_WRITTEN for (long k = 0; k < t.keys; k += MR) {
    long low = 0, high = round_up(t.queries, NR);
    while (low < high && !strip_has(t, low, k)) low += NR;
    while (low < high && !strip_has(t, high - NR, k)) high -= NR;
    AS_WRITTEN for (long d = 0; d < WIDTH && low < high; d += NR)
      block_product(out + k * WIDTH + d, WIDTH, 1, weights + (k * TILE + low) / 2, TILE / 2,
                    pairs + low / 2 * WIDTH + d, WIDTH, (high - low) / 2);
  }
}
