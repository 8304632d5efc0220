/* Rotary positions in x (B, T, HEADS, D): the pair (x[i], x[i + D/2]) at position t is turned by the
   angle whose cosine and sine are cos[t, i] and sin[t, i], (T, D/2) float32; with PASS BACKWARD by
   the negative angle, which is the gradient. A thread turns VEC pairs.
   Macros: B, T, HEADS, D, PASS. */
#define HALF (D / 2)
#define ACROSS (HALF / VEC) /* threads per head */
#define COUNT ((long)B * T * HEADS * ACROSS)
KERNEL_BEGIN(GLOBAL Element *y, GLOBAL const Element *x, GLOBAL const float *cos,
             GLOBAL const float *sin)
  const long n = (long)bx * THREADS + tid;
  if (COUNT % THREADS == 0 || n < COUNT) {
    const int i = n % ACROSS * VEC, t = n / (ACROSS * HEADS) % T;
    const long at = n / ACROSS * D + i;
    float a[VEC], b[VEC], c[VEC], s[VEC];
    LOAD(TYPE, a, x + at);
    LOAD(TYPE, b, x + at + HALF);
    LOAD(0, c, cos + t * HALF + i);
    LOAD(0, s, sin + t * HALF + i);
    UNROLL
    for (int k = 0; k < VEC; k++) {
      const float first = a[k], second = b[k], turn = PASS == BACKWARD ? -s[k] : s[k];
      a[k] = first * c[k] - second * turn;
      b[k] = second * c[k] + first * turn;
    }
    STORE(TYPE, y + at, a);
    STORE(TYPE, y + at + HALF, b);
  }
KERNEL_END
