/* delta (B, H, T) float32 = sums of dout out along D, both (B, T, H, D): what attention's gradients
   subtract. ACROSS threads share a row, each with VEC neighbours of it.
   Macros: B, T, H, D. */
#define ACROSS (D / VEC)
#define PER_BLOCK (THREADS / ACROSS) /* rows */
#define ROWS (B * T * H)
KERNEL_BEGIN(GLOBAL float *delta, GLOBAL const Element *dout, GLOBAL const Element *out)
  SHARED float parts[THREADS];
  const int row = bx * PER_BLOCK + tid / ACROSS;
  const long at = (long)(row < ROWS ? row : 0) * D + tid % ACROSS * VEC;
  float x[VEC], y[VEC], part = 0;
  LOAD(TYPE, x, dout + at);
  LOAD(TYPE, y, out + at);
  UNROLL
  for (int k = 0; k < VEC; k++) part += x[k] * y[k];
  parts[tid] = part;
  BARRIER;
  const int mine = bx * PER_BLOCK + tid;
  if (tid < PER_BLOCK && mine < ROWS) {
    float sum = 0;
    UNROLL
    for (int i = 0; i < ACROSS; i++) sum += parts[tid * ACROSS + i];
    delta[((long)(mine / (T * H)) * H + mine % H) * T + mine / H % T] = sum;
  }
KERNEL_END
