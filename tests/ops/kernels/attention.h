/* attention_forward.c and attention_backward.c for sizes T, D, H, KV, B, NT threads, a type ACT; with
   -DTILE_AMX their forms for AMX. */

#include "tile_permission.h"

#ifndef B
#define B 1
#endif
#ifndef T
#define T 130
#endif
#ifndef D
#define D 64
#endif
#ifndef H
#define H 4
#endif
#ifndef KV
#define KV 2
#endif
#ifndef NT
#define NT 2
#endif
#ifdef TILE_AMX
#define ACT 1
#define VW 16
#endif
#ifndef ACT
#define ACT 0
#endif
#define SCALE (1.0f / __builtin_sqrtf(D))

/* Vectors wider than the machine's: every function that passes them is inlined. */
#pragma clang diagnostic ignored "-Wpsabi"
#include "../../../tinyllama/ops/cpu/common.h"

#include "../../../tinyllama/ops/cpu/attention.h"

#ifdef TILE_AMX
#include "../../../tinyllama/ops/cpu/pairs.h"

#ifdef TILE_IN_C
#include "tile_in_c.h"
#endif
#include "../../../tinyllama/ops/cpu/amx.h"

#include "../../../tinyllama/ops/cpu/attention_amx.h"
#define KERNEL attention_forward
#include "../../../tinyllama/ops/cpu/attention_forward_amx.c"
#undef KERNEL
#define KERNEL attention_backward
#include "../../../tinyllama/ops/cpu/attention_backward_amx.c"
#else
#define KERNEL attention_forward
#include "../../../tinyllama/ops/cpu/attention_forward.c"
#undef KERNEL
#define KERNEL attention_backward
#include "../../../tinyllama/ops/cpu/attention_backward.c"
#endif

#define Q_COUNT ((size_t)B * T * H * D)
#define KV_COUNT ((size_t)B * T * KV * D)
#define LSE_COUNT ((size_t)B * H * T)
typedef ELEM(ACT) elem;
