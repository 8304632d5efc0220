/* Runs many kernels one after another by one call on every thread.

   A kernel is divided into `parts`, each a call with the part's number as its core_id. A thread runs
   its own part first and then those that no thread has begun, so a thread that is late, or that the
   system has suspended, delays no more than the part it is in. Kernels are numbered consecutively
   over all runs of one table: a part's claim holds the number after the last kernel of which that
   part was begun, so claims never have to be cleared.

   The table consists of 64-bit words: the head below, in which fields that many threads write are on
   cache lines of their own, then one line for each part's claim. Arguments are addresses and int32
   values. Passed as 64-bit words, both are what the x86-64 System V and AArch64 calling conventions
   require, and a kernel ignores words beyond its arguments.

   With TIMED each part's begin and end, as the processor's counter has them, and its thread are
   written to the head's `stamps`, three words for each part of each kernel of a run. */

typedef unsigned long word;
#define INLINE static inline __attribute__((always_inline))
#define LINE 8 /* words */

struct head {
  word first;   /* number of the first kernel of this run */
  word kernels; /* how many */
  word table;   /* address of their struct kernel */
  word stamps;  /* with TIMED: address of the stamps */
  word most;    /* with TIMED: parts of the kernel with most parts */
  word unused[LINE - 5];
  word open; /* number of the kernel that runs now */
  word unused_1[LINE - 1];
  word done; /* parts of it that are done */
  word unused_2[LINE - 1];
  word claims[]; /* one line each */
};

struct kernel {
  word function, arguments, count, parts;
  word core; /* place of the part's number among the arguments; `count` or more: none */
};

/* How often a waiting thread looks before it gives up: a fraction of a millisecond. */
#ifndef PATIENCE
#define PATIENCE 20000
#endif

INLINE void rest(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

/* The processor's counter, which runs evenly and is the same on every core. */
INLINE word stamp(void) {
#if defined(__x86_64__)
  return __builtin_ia32_rdtsc();
#elif defined(__aarch64__)
  word now;
  __asm__ volatile("mrs %0, cntvct_el0" : "=r"(now));
  return now;
#else
  return __builtin_readcyclecounter();
#endif
}

#ifdef COUNTER
word KERNEL(void) { return stamp(); }
#else

#define MOST 128 /* arguments of a kernel */
#define A4(i) a[i], a[i + 1], a[i + 2], a[i + 3]
#define A16(i) A4(i), A4(i + 4), A4(i + 8), A4(i + 12)
#define A64(i) A16(i), A16(i + 16), A16(i + 32), A16(i + 48)
#define T4 word, word, word, word
#define T16 T4, T4, T4, T4
#define T64 T16, T16, T16, T16

INLINE void call(const struct kernel *k, word part) {
  volatile word a[MOST]; /* volatile: a plain copy would become a call of memcpy */
  const word *given = (const word *)k->arguments;
  for (word i = 0; i < k->count; i++) a[i] = given[i];
  if (k->core < k->count) a[k->core] = part;
  if (k->count <= 4)
    ((void (*)(T4))k->function)(A4(0));
  else if (k->count <= 16)
    ((void (*)(T16))k->function)(A16(0));
  else if (k->count <= 64)
    ((void (*)(T64))k->function)(A64(0));
  else
    ((void (*)(T64, T64))k->function)(A64(0), A64(64));
}

/* True for exactly one thread; no part of a kernel that has ended can be taken. */
INLINE int take(word *claim, word number) {
  word last = __atomic_load_n(claim, __ATOMIC_RELAXED);
  return last <= number && __atomic_compare_exchange_n(claim, &last, number + 1, 0,
                                                       __ATOMIC_RELAXED, __ATOMIC_RELAXED);
}

/* Returns when all kernels are done (`open` is then first + kernels), or after waiting long for
   other threads: then the caller calls it again. */
void KERNEL(struct head *h, int thread) {
  const struct kernel *kernels = (const struct kernel *)h->table;
  word first = h->first, end = first + h->kernels;
  for (;;) {
    word now = __atomic_load_n(&h->open, __ATOMIC_ACQUIRE);
    if (now == end) return;
    const struct kernel *k = kernels + (now - first);
    for (word i = 0, part = thread % k->parts; i < k->parts; i++) {
      if (take(&h->claims[part * LINE], now)) {
#ifdef TIMED
        word *at = (word *)h->stamps + 3 * ((now - first) * h->most + part);
        at[0] = stamp();
        call(k, part);
        at[1] = stamp();
        at[2] = thread;
#else
        call(k, part);
#endif
        if (__atomic_add_fetch(&h->done, 1, __ATOMIC_ACQ_REL) == k->parts) {
          __atomic_store_n(&h->done, 0, __ATOMIC_RELAXED);
          __atomic_store_n(&h->open, now + 1, __ATOMIC_RELEASE);
        }
      }
      if (++part == k->parts) part = 0;
    }
    for (int left = PATIENCE; __atomic_load_n(&h->open, __ATOMIC_RELAXED) == now; rest())
      if (!left--) return;
  }
}
#endif
