/* The element-wise and reduction kernels, for a type ACT and a FORM, the plain (0) or the other (1)
   of each kernel that has two; their sizes and number of threads are variables. */

#include "../../../tinyllama/ops/cpu/common.h"

static long N, H, V, B, T, HEADS, D, COUNT;
static int NT;
#define EPS 1e-5
#define INVERSE FORM
#define ACCUMULATE FORM
#define GRADIENT FORM
#define DECAY FORM

#define KERNEL rms_norm_forward
#include "../../../tinyllama/ops/cpu/rms_norm_forward.c"
#undef KERNEL
#define KERNEL rms_norm_backward
#include "../../../tinyllama/ops/cpu/rms_norm_backward.c"
#undef KERNEL
#define KERNEL swiglu_forward
#include "../../../tinyllama/ops/cpu/swiglu_forward.c"
#undef KERNEL
#define KERNEL swiglu_backward
#include "../../../tinyllama/ops/cpu/swiglu_backward.c"
#undef KERNEL
#define KERNEL rope
#include "../../../tinyllama/ops/cpu/rope.c"
#undef KERNEL
#define KERNEL embedding_forward
#include "../../../tinyllama/ops/cpu/embedding_forward.c"
#undef KERNEL
#define KERNEL embedding_backward
#include "../../../tinyllama/ops/cpu/embedding_backward.c"
#undef KERNEL
#define KERNEL cross_entropy
#include "../../../tinyllama/ops/cpu/softmax.h"
#include "../../../tinyllama/ops/cpu/cross_entropy.c"
#undef KERNEL
#define KERNEL square_sum
#include "../../../tinyllama/ops/cpu/square_sum.c"
#undef KERNEL
/* AdamW in FORM 1 writes a copy, and its state has the type ACT where that is float32 or bfloat16. */
#define COPY FORM
#include "../../../tinyllama/ops/cpu/pairs.h"
#if ACT == 1
#define STATE_T 1
#include "../../../tinyllama/ops/random_bits.h"
#endif
#define KERNEL adamw
#include "../../../tinyllama/ops/cpu/adamw.c"
#undef KERNEL
#define KERNEL narrow
#include "../../../tinyllama/ops/cpu/narrow.c"
#undef KERNEL
#if STATE_T
#define FIRST_ARG , first
#else
#define FIRST_ARG
#endif
#if COPY
#define COPY_ARG(copy) , copy
#else
#define COPY_ARG(copy)
#endif

typedef ELEM(ACT) act;
