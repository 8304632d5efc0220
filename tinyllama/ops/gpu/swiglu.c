/* FORWARD   y = gate s up with s = 1 / (1 + exp(-gate))
   BACKWARD  dup = dy gate s,  dgate = dy up s (1 + gate (1 - s))
   over COUNT numbers, VEC per thread.
   Macros: COUNT, PASS. */
#if PASS == FORWARD
KERNEL_BEGIN(GLOBAL Element *y, GLOBAL const Element *gate, GLOBAL const Element *up)
#else
KERNEL_BEGIN(GLOBAL Element *dgate, GLOBAL Element *dup, GLOBAL const Element *dy,
             GLOBAL const Element *gate, GLOBAL const Element *up)
#endif
  const long at = ((long)bx * THREADS + tid) * VEC;
  if (COUNT / VEC % THREADS == 0 || at < COUNT) {
    float g[VEC], u[VEC];
    LOAD(TYPE, g, gate + at);
    LOAD(TYPE, u, up + at);
#if PASS == FORWARD
    UNROLL
    for (int k = 0; k < VEC; k++) u[k] *= g[k] / (1 + EXP2(-LOG2E * g[k]));
    STORE(TYPE, y + at, u);
#else
    float d[VEC];
    LOAD(TYPE, d, dy + at);
    UNROLL
    for (int k = 0; k < VEC; k++) {
      const float s = 1 / (1 + EXP2(-LOG2E * g[k]));
      const float gradient = d[k] * s;
      d[k] = gradient * u[k] * (1 + g[k] * (1 - s));
      u[k] = gradient * g[k];
    }
    STORE(TYPE, dgate + at, d);
    STORE(TYPE, dup + at, u);
#endif
  }
KERNEL_END
