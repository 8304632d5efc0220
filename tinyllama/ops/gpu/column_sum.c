/* sum (H) = the ROWS rows of x (ROWS, H), float32, added up: what blocks have summed, each for
   itself. A block sums 32 columns: group g the rows g, g + GROUPS, ..., then the groups in their
   order.
   Macros: ROWS, H. */
#define GROUPS (THREADS / 32)
KERNEL_BEGIN(GLOBAL float *sum, GLOBAL const float *x)
  SHARED float scratch[THREADS];
  const int col = bx * 32 + lane, from = col < H ? col : H - 1;
  float part = 0;
  UNROLL_BY(8)
  for (int row = group; row < ROWS; row += GROUPS) part += x[(long)row * H + from];
  scratch[tid] = part;
  BARRIER;
  float total = 0;
  UNROLL
  for (int g = 0; g < GROUPS; g++) total += scratch[32 * g + lane];
  if (group == 0 && col < H) sum[col] = total;
KERNEL_END
