/* cache_write.c and cached_attention.c for T new tokens, D numbers a head, a type ACT, a WINDOW (0:
   none), ROWS queries at once; the number of threads is a variable. */

#ifndef ACT
#define ACT 0
#endif
#ifndef ROWS
#define ROWS 1
#endif
#ifndef WINDOW
#define WINDOW 0
#endif
#ifndef D
#define D 64
#endif
#ifndef H
#define H 6
#define KV 2
#endif
#define S 48
#define SCALE 0.125f
#define SCRATCH_FLOATS (ROWS * S)
static int NT;

#include "../../../tinyllama/ops/cpu/common.h"

#include "../../../tinyllama/ops/cpu/cache.h"

#define KERNEL cache_write
#include "../../../tinyllama/ops/cpu/cache_write.c"
#undef KERNEL
#define KERNEL cached_attention
#include "../../../tinyllama/ops/cpu/cached_attention.c"

typedef ELEM(ACT) stored;
