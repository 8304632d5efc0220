/* gemm.c for types A_T, B_T, C_T and a LAYOUT; with -DPACKED for the packed B of int4.h. Sizes and
   the number of threads are variables, so that one build runs all of them, set by CHOOSE; FIXED
   makes them constants, as the kernel has them in use. BLOCKS gives small matrices several panels
   and blocks along every side. */

#include "tile_permission.h"

#ifndef A_T
#define A_T 0
#endif
#ifndef B_T
#define B_T 0
#endif
#ifndef C_T
#define C_T 0
#endif
#ifndef COMPUTE_BF16
#define COMPUTE_BF16 0
#endif
#ifdef BF16X3 /* of one product in the worst case; about 2^-18 is the error of a sum */
#define PRODUCT_ERROR (0x1p-15 + 1e-6)
#else
#define PRODUCT_ERROR 1e-6
#endif
#ifdef BLOCKS
#ifdef TILE_AMX
#define KC 32
#define MC 64
#define KB 64
#define BC 6200
#else
#define KC 20
#define MC 24
#define KB 40
#define BC 2600
#endif
#endif
#ifdef FIXED
#define CHOOSE(m, n, k, block, nt)
#else
static int the_m, the_n, the_k, the_block, the_nt;
#define M the_m
#define N the_n
#define K the_k
#define BLOCK the_block
#define NT the_nt
#define CHOOSE(m, n, k, block, nt) \
  (the_m = m, the_n = n, the_k = k, the_block = block, the_nt = nt)
#endif
#define KERNEL gemm

#include "../../../tinyllama/ops/cpu/common.h"

#include "../../../tinyllama/ops/cpu/tile.h"

#ifdef PACKED
#include "../../../tinyllama/ops/cpu/int4.h"
#endif

#include "../../../tinyllama/ops/cpu/pairs.h"

#include "../../../tinyllama/ops/cpu/panels.h"

#ifdef TILE_IN_C
#include "tile_in_c.h"
#endif
#ifdef TILE_AMX
#include "../../../tinyllama/ops/cpu/amx.h"

#ifdef BF16X3
#include "../../../tinyllama/ops/cpu/bf16x3.h"
#endif

#include "../../../tinyllama/ops/cpu/tile_amx.h"
#else
#include "../../../tinyllama/ops/cpu/tile_vector.h"
#endif

#include "../../../tinyllama/ops/cpu/gemm.c"

#define LENGTH(array) (int)(sizeof(array) / sizeof(*(array)))
