// variants: -DPATIENCE=20000; -DPATIENCE=0
// Threads walk tables of random kernels together: each part of each kernel runs once, with its
// arguments, after all parts of the kernels before it.
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define KERNEL launch
#include "../../../tinyllama/runtime/launch.c"

enum { KERNELS = 60, PARTS = 9, THREADS = 7, RUNS = 5 };

static struct kernel table[KERNELS];
static word arguments[KERNELS][MOST];
static int done[KERNELS][PARTS], parts_before[KERNELS + 1], all_done, failures, waiting;
static struct head *head;

/* What every kernel here does with its first words, its last one and its part. */
static void record(word number, word part, word last) {
  const struct kernel *k = &table[number];
  if (__atomic_load_n(&all_done, __ATOMIC_RELAXED) < parts_before[number]) failures++;
  if (part >= k->parts || last != 1000 + number) failures++;
  for (word i = 0; i < (number * 7 + part * 5) % 16 * 40; i++) rest(); /* some are long */
  done[number][part]++; /* no atomic: nobody else may be at this part */
  __atomic_add_fetch(&all_done, 1, __ATOMIC_RELAXED);
}

static void takes_3(word number, word part, word last) { record(number, part, last); }
static void takes_4(word number, word a, word last, word part) { record(number, part, last + a); }
#define SKIP(a) word a##0, word a##1, word a##2, word a##3
#define SKIP_12(a) SKIP(a##0), SKIP(a##1), SKIP(a##2)
static void takes_15(word number, SKIP_12(x), word part, word last) { record(number, part, last); }
#define SKIP_48(a) SKIP_12(a##0), SKIP_12(a##1), SKIP_12(a##2), SKIP_12(a##3)
static void takes_63(word number, SKIP_48(x), SKIP_12(y), word part, word last) {
  record(number, part, last);
}
static void takes_128(word number, SKIP_48(x), SKIP_48(y), SKIP_12(z), SKIP_12(v), SKIP(w),
                      word v1, word part, word last) {
  record(number, part, last);
}

static const struct { /* arguments, and which are the part and the last */
  word count, core, last;
} FORMS[] = {{3, 1, 2}, {4, 3, 2}, {15, 13, 14}, {63, 61, 62}, {128, 126, 127}};

static void make_kernel(int number) {
  word functions[] = {(word)takes_3, (word)takes_4, (word)takes_15, (word)takes_63,
                      (word)takes_128};
  int form = rand() % 5;
  word *a = arguments[number], count = FORMS[form].count;
  memset(a, 0, sizeof arguments[number]);
  a[0] = number;
  a[FORMS[form].core] = 99; /* replaced by the part's number */
  a[FORMS[form].last] = 1000 + number;
  table[number] = (struct kernel){functions[form], (word)a, count, 1 + rand() % PARTS,
                                  FORMS[form].core};
}

static void *walk(void *thread) {
  __atomic_sub_fetch(&waiting, 1, __ATOMIC_RELAXED); /* all begin together */
  for (int i = 0; i < 100000 && __atomic_load_n(&waiting, __ATOMIC_RELAXED) > 0; i++) rest();
  do launch(head, (int)(long)thread);
  while (__atomic_load_n(&head->open, __ATOMIC_ACQUIRE) != head->first + head->kernels);
  return NULL;
}

static void run(int threads) {
  pthread_t ids[THREADS];
  all_done = 0;
  waiting = threads;
  memset(done, 0, sizeof done);
  head->first = head->open;
  for (int number = 0; number < KERNELS; number++) {
    make_kernel(number);
    parts_before[number + 1] = parts_before[number] + (int)table[number].parts;
  }
  for (long t = 0; t < threads; t++) pthread_create(&ids[t], NULL, walk, (void *)t);
  for (int t = 0; t < threads; t++) pthread_join(ids[t], NULL);
  for (int number = 0; number < KERNELS; number++)
    for (word part = 0; part < PARTS; part++)
      if (done[number][part] != (part < table[number].parts)) failures++;
}

int main(void) {
  size_t bytes = sizeof(struct head) + PARTS * LINE * sizeof(word);
  head = calloc(1, bytes);
  head->table = (word)table;
  head->kernels = KERNELS;
  for (int threads = 1; threads <= THREADS; threads++)
    for (int i = 0; i < RUNS; i++) run(threads);
  if (head->open != (word)KERNELS * THREADS * RUNS || failures) {
    printf("%d failures, %lu kernels\n", failures, head->open);
    return 1;
  }
  free(head);
  return 0;
}
