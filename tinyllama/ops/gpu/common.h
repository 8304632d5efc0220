/* Names of the numbers that choose among a kernel's code, and macros that pick by a type's code.
   tinyllama/runtime/blocks.py puts a kernel's text together: its macros, this file, the header of a
   dialect (cuda.h says what one gives), tile.h or rows.h, the kernel. */
#define NT 0 /* LAYOUT: A B^T */
#define NN 1 /* A B */
#define TN 2 /* A^T B */

#define FRAGMENT_FMA 0       /* a lane multiplies its own rows and columns */
#define FRAGMENT_TF32X3 1    /* float32 as three products of tensor cores */
#define FRAGMENT_MMA16 2     /* CUDA's tensor cores, 16 bits */
#define FRAGMENT_SIMDGROUP 3 /* Metal's 8 x 8 matrices */

#define FORWARD 0 /* PASS of attention */
#define GRADIENT_Q 1
#define GRADIENT_KV 2
#define BACKWARD 1 /* PASS of other operations, beside FORWARD */

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define ELEM(code) JOIN(ELEM_, code)
#define WIDEN(code, x) JOIN(WIDEN_, code)(x)
#define STORE2(code, p, x, y) JOIN(STORE2_, code)(p, x, y)
