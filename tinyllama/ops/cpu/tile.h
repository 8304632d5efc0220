/* Register tile and cache blocks of the matrix product (gemm.c), for one instruction set.

   A tile of C is MR rows of NR columns, held in MR * NR / VW vector registers while k runs; what is
   left of the register file holds NR / VW vectors of B and one broadcast value of A.
     KC  depth of a packed panel: KC * NR of B stays in the L1 cache, beside MR * KC of A
     MC  rows of a packed block of A: MC * KC stays in the L2 cache
     KB  depth of a packed block of B, in whole panels
     BC  floats of that block, which stays in the L3 cache
   Each can be set with -D. TILE_AVX512, TILE_AVX2, TILE_NEON or TILE_GENERIC chooses a whole set;
   VW, which common.h reads, must then be set to match. TILE_AMX is never chosen automatically,
   because a process must request AMX from the system; its tile of C is in tile_amx.h. */

#if !defined(TILE_AVX512) && !defined(TILE_AVX2) && !defined(TILE_NEON) && \
    !defined(TILE_GENERIC) && !defined(TILE_AMX)
#if defined(__AVX512F__)
#define TILE_AVX512
#elif defined(__AVX2__) && defined(__FMA__)
#define TILE_AVX2
#elif defined(__ARM_NEON)
#define TILE_NEON
#else
#define TILE_GENERIC
#endif
#endif

#if defined(TILE_AMX) /* 2 x 2 of 16 x 16; 16 slots of a panel that are pairs */
#define TILE_ROWS 32
#define TILE_COLS 32
#ifdef BF16X3 /* slots are floats until they are divided (bf16x3.h) */
#define TILE_K 32
#else
#define TILE_K 16
#endif
#ifndef KC
#define KC 384
#endif
#ifndef MC
#define MC 512
#endif
#elif defined(TILE_AVX512) /* 24 of 32 registers */
#define TILE_ROWS 12
#define TILE_COLS 32
#elif defined(TILE_NEON) /* 24 of 32 registers */
#define TILE_ROWS 8
#define TILE_COLS 12
#elif defined(TILE_AVX2) /* 12 of 16 registers */
#define TILE_ROWS 6
#define TILE_COLS 16
#else /* 12 of 16 registers of 4 floats */
#define TILE_ROWS 6
#define TILE_COLS 8
#endif

/* A panel's depth is a multiple of this. */
#ifndef TILE_K
#define TILE_K 4
#endif
#ifndef MR
#define MR TILE_ROWS
#endif
#ifndef NR
#define NR TILE_COLS
#endif
#ifndef KC
#define KC 320
#endif
#ifndef MC
#define MC 144
#endif
#ifndef KB
#define KB 2048
#endif
#ifndef BC
#define BC 1048576
#endif
