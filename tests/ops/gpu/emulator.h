// A GPU's block of threads on a processor. Threads are fibers that run in a random order, and the
// 32 lanes of a group meet where an instruction needs all of them. Kept free of library headers,
// since kernels define macros such as T, D and K.
#pragma once
typedef unsigned int u32;
namespace emulator {
struct Index { int x, y, z; };
// A kernel as a function of addresses, run for every block of the grid. Returns what went wrong, or
// null.
extern "C" const char *emulate(int threads, int blocks_x, int blocks_z, void (*kernel)(void **),
                               void **arguments);
Index thread_index();
Index block_index();
void barrier();
// The last of a group's 32 lanes to come does the work of all, given what each lane passed.
void meet(void *mine, void (*work)(void **lanes));
// A copy that happens at some moment between the call and the wait that covers it.
void copy_later(void *to, const void *from, int valid);
void commit();
void wait(int groups);
// Counts how many times the banks of shared memory are read for 8 rows of 16 bytes: once at best.
void count_banks(const void **rows);

void copy_bytes(void *to, const void *from, int bytes);
float bfloat16_to_float(unsigned short x);
unsigned short float_to_bfloat16(float x);
float float16_to_float(unsigned short x);
unsigned short float_to_float16(float x);
float exp2(float x);
float log2(float x);
float sqrt(float x);

// Calls a kernel with addresses as its arguments; Metal's last two are indices.
template <class X> struct Argument {
  static X get(void **p, int i, int) { return (X)p[i]; }
};
template <int... I> struct Numbers {};
template <int N, int... I> struct Count : Count<N - 1, N - 1, I...> {};
template <int... I> struct Count<0, I...> { typedef Numbers<I...> type; };
template <class... A, int... I>
void call(void (*kernel)(A...), void **p, Numbers<I...>) {
  kernel(Argument<A>::get(p, I, sizeof...(A))...);
}
template <class... A> void call(void (*kernel)(A...), void **p) {
  call(kernel, p, typename Count<sizeof...(A)>::type());
}
}  // namespace emulator
