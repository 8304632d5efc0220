#include "emulator.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>
#include <random>
#include <vector>

namespace emulator {
namespace {
enum State { RUNNABLE, AT_BARRIER, AT_MEETING, DONE };
struct Copy { void *to; const void *from; int valid; };
struct Fiber {
  ucontext_t context;  // of its first turn
  jmp_buf place;       // where it goes on after that
  bool started;
  std::vector<char> stack;
  State state;
  void *mine;
  void (*work)(void **);
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
};
std::vector<Fiber> fibers;
std::vector<int> asleep;  // turns that a group of 32 lanes sits out: groups run far apart
jmp_buf home;
int current;
Index block;
void (*body)(void **);
void **arguments;
std::mt19937 generator;
long bank_reads, bank_cycles;
const char *failure;

void stop(const char *reason) {  // from within a thread
  failure = reason;
  _longjmp(home, 1);
}
void enter() {
  body(arguments);
  fibers[current].state = DONE;
  _longjmp(home, 1);
}
// Without the system calls of swapcontext, which take far longer than a turn.
void leave(State state) {
  fibers[current].state = state;
  if (!_setjmp(fibers[current].place)) _longjmp(home, 1);
}
__attribute__((noinline)) void resume(int thread) {
  current = thread;
  if (_setjmp(home)) return;
  Fiber &f = fibers[thread];
  if (f.started) _longjmp(f.place, 1);
  f.started = true;
  setcontext(&f.context);
}
void copy(const Copy &c) {
  if (c.valid)
    memcpy(c.to, c.from, 16);
  else
    memset(c.to, 0, 16);
}
void run_block(int threads) {
  fibers.resize(threads);
  for (auto &f : fibers) {
    f.stack.resize(1 << 17);
    f.open.clear();
    f.groups.clear();
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.data();
    f.context.uc_stack.ss_size = f.stack.size();
    f.context.uc_link = nullptr;
    f.state = RUNNABLE;
    f.started = false;
    makecontext(&f.context, enter, 0);
  }
  std::vector<int> order(threads);
  for (int i = 0; i < threads; i++) order[i] = i;
  std::shuffle(order.begin(), order.end(), generator);
  asleep.assign(threads / 32, 0);
  for (;;) {
    bool ran = false, slept = false;
    for (int &turns : asleep) turns = turns ? turns - 1 : generator() % 64 ? 0 : generator() % 256;
    for (int thread : order) {
      if (fibers[thread].state != RUNNABLE) continue;
      if (asleep[thread / 32]) {
        slept = true;
        continue;
      }
      ran = true;
      resume(thread);
      if (failure) return;
    }
    if (ran || slept) continue;
    int alive = 0, waiting = 0;
    for (auto &f : fibers) alive += f.state != DONE, waiting += f.state == AT_BARRIER;
    if (!alive) return;
    if (waiting != alive) {
      failure = "the lanes of a group, or the threads of a block, do not meet";
      return;
    }
    for (auto &f : fibers)
      if (f.state == AT_BARRIER) f.state = RUNNABLE;
    std::shuffle(order.begin(), order.end(), generator);
  }
}
}  // namespace

extern "C" const char *emulate(int threads, int blocks_x, int blocks_z, void (*kernel)(void **),
                               void **given) {
  body = kernel;
  arguments = given;
  generator.seed(1);
  bank_reads = bank_cycles = 0;
  failure = nullptr;
  for (int z = 0; z < blocks_z && !failure; z++)
    for (int x = 0; x < blocks_x && !failure; x++) {
      block = {x, 0, z};
      run_block(threads);
    }
  return failure;
}
extern "C" double cycles_per_bank_read() {
  return bank_reads ? (double)bank_cycles / bank_reads : 0;
}

Index thread_index() { return {current, 0, 0}; }
Index block_index() { return block; }
void barrier() { leave(AT_BARRIER); }
void meet(void *mine, void (*work)(void **)) {
  const int first = current / 32 * 32;
  fibers[current].mine = mine;
  fibers[current].work = work;
  int here = 0;
  for (int l = 0; l < 32; l++) here += fibers[first + l].state == AT_MEETING;
  if (here < 31) return leave(AT_MEETING);
  void *lanes[32];
  for (int l = 0; l < 32; l++) {
    lanes[l] = fibers[first + l].mine;
    if (fibers[first + l].work != work) stop("lanes of a group meet at different instructions");
  }
  work(lanes);
  for (int l = 0; l < 32; l++) fibers[first + l].state = RUNNABLE;
}
void copy_later(void *to, const void *from, int valid) {
  const Copy c = {to, from, valid};
  if (generator() % 2)
    copy(c);
  else
    fibers[current].open.push_back(c);
}
void commit() {
  fibers[current].groups.push_back(std::move(fibers[current].open));
  fibers[current].open.clear();
}
void wait(int groups) {
  auto &pending = fibers[current].groups;
  for (; (int)pending.size() > groups; pending.pop_front())
    for (auto &c : pending.front()) copy(c);
}
void count_banks(const void **rows) {
  int reads[8] = {0};
  for (int i = 0; i < 8; i++) reads[(size_t)rows[i] / 16 % 8]++;
  bank_reads++;
  bank_cycles += *std::max_element(reads, reads + 8);
}

void copy_bytes(void *to, const void *from, int bytes) { memcpy(to, from, bytes); }
float bfloat16_to_float(unsigned short x) {
  const u32 bits = (u32)x << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
unsigned short float_to_bfloat16(float f) {
  u32 bits;
  memcpy(&bits, &f, 4);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
float float16_to_float(unsigned short x) {
  const int exponent = x >> 10 & 31, mantissa = x & 1023;
  const float f = exponent == 31 ? (mantissa ? NAN : INFINITY)
                  : exponent     ? ldexpf(1024 + mantissa, exponent - 25)
                                 : ldexpf(mantissa, -24);
  return x >> 15 ? -f : f;
}
unsigned short float_to_float16(float f) {
  const unsigned short sign = std::signbit(f) << 15;
  const float size = fabsf(f);
  if (std::isnan(f)) return sign | 0x7e00;
  if (size == 0) return sign;
  if (size >= 65520) return sign | 0x7c00;
  int exponent;
  frexpf(size, &exponent);
  const int unit = std::max(exponent - 11, -24);  // the exponent of the last bit
  const int count = (int)nearbyintf(ldexpf(size, -unit));
  return sign | (unit == -24 ? count : ((unit + 24) << 10) + count);  // carries into the exponent
}
float exp2(float x) { return exp2f(x); }
float log2(float x) { return log2f(x); }
float sqrt(float x) { return sqrtf(x); }
}  // namespace emulator
