// File calls that fail, or kill the process, as a test says. Loaded by LD_PRELOAD.
//
//   faults_arm(root, seed, rate, kill_at)   from now on, calls on files below `root` are counted;
//                                           each fails with probability `rate`, by a generator that
//                                           `seed` starts, and call number `kill_at` is the last
//   faults_seen(), faults_made()            calls counted, calls that failed
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

static char root[PATH_MAX];
static uint64_t seed;
static double rate;
static long kill_at;
static atomic_long seen, made;

void faults_arm(const char *below, unsigned long with_seed, double with_rate, long last_call) {
  seed = with_seed;
  rate = with_rate;
  kill_at = last_call;
  strncpy(root, below, sizeof root - 1);
}
long faults_seen(void) { return seen; }
long faults_made(void) { return made; }

// splitmix64, Steele et al. 2014.
static uint64_t mixed(uint64_t x) {
  x += 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

static int below_root(const char *path) {
  size_t length = strlen(root);
  return length && strncmp(path, root, length) == 0 && (path[length] == '/' || !path[length]);
}

static int descriptor_below_root(int descriptor) {
  char link[64], path[PATH_MAX];
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return 0;
  path[length] = 0;
  return below_root(path);
}

static int path_below_root(int folder, const char *path) {
  if (!root[0] || !path) return 0;
  return path[0] == '/' ? below_root(path) : folder != AT_FDCWD && descriptor_below_root(folder);
}

// Whether a call fails now, with errno set to one of `codes` (ended by 0).
static int fails(int concerned, const int *codes) {
  if (!root[0] || !concerned) return 0;
  long number = ++seen;
  if (number == kill_at) kill(getpid(), SIGKILL);
  uint64_t random = mixed(seed * 1000003 + (uint64_t)number);
  if ((random >> 11) * 0x1p-53 >= rate) return 0;
  int count = 0;
  while (codes[count]) count++;
  ++made;
  errno = codes[mixed(random) % (uint64_t)count];
  return 1;
}

static const int ON_OPEN[] = {EIO, EACCES, EMFILE, ENOSPC, 0}, ON_READ[] = {EIO, 0};
static const int ON_WRITE[] = {ENOSPC, EIO, EDQUOT, 0}, ON_SYNC[] = {EIO, ENOSPC, 0};
static const int ON_NAME[] = {ENOSPC, EIO, EACCES, EROFS, 0}, ON_REMOVE[] = {EBUSY, EPERM, EIO, 0};

#define REAL(name) ((typeof(&name))dlsym(RTLD_NEXT, #name))
#define OPEN(name)                                                  \
  int name(const char *path, int flags, ...) {                      \
    va_list rest;                                                   \
    va_start(rest, flags);                                          \
    mode_t mode = va_arg(rest, mode_t);                             \
    va_end(rest);                                                   \
    if (fails(path_below_root(AT_FDCWD, path), ON_OPEN)) return -1; \
    return REAL(name)(path, flags, mode);                           \
  }
#define OPENAT(name)                                              \
  int name(int folder, const char *path, int flags, ...) {        \
    va_list rest;                                                 \
    va_start(rest, flags);                                        \
    mode_t mode = va_arg(rest, mode_t);                           \
    va_end(rest);                                                 \
    if (fails(path_below_root(folder, path), ON_OPEN)) return -1; \
    return REAL(name)(folder, path, flags, mode);                 \
  }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

ssize_t read(int file, void *data, size_t size) {
  if (fails(root[0] && descriptor_below_root(file), ON_READ)) return -1;
  return REAL(read)(file, data, size);
}
ssize_t write(int file, const void *data, size_t size) {
  if (fails(root[0] && descriptor_below_root(file), ON_WRITE)) {
    if (errno == ENOSPC && size > 1) return REAL(write)(file, data, size / 2);  // a short write
    return -1;
  }
  return REAL(write)(file, data, size);
}
int fsync(int file) {
  return fails(root[0] && descriptor_below_root(file), ON_SYNC) ? -1 : REAL(fsync)(file);
}
int rename(const char *from, const char *to) {
  return fails(path_below_root(AT_FDCWD, to), ON_NAME) ? -1 : REAL(rename)(from, to);
}
int renameat2(int a, const char *from, int b, const char *to, unsigned flags) {
  return fails(path_below_root(b, to), ON_NAME) ? -1 : REAL(renameat2)(a, from, b, to, flags);
}
int mkdir(const char *path, mode_t mode) {
  return fails(path_below_root(AT_FDCWD, path), ON_NAME) ? -1 : REAL(mkdir)(path, mode);
}
int unlink(const char *path) {
  return fails(path_below_root(AT_FDCWD, path), ON_REMOVE) ? -1 : REAL(unlink)(path);
}
int unlinkat(int folder, const char *path, int flags) {
  return fails(path_below_root(folder, path), ON_REMOVE) ? -1 : REAL(unlinkat)(folder, path, flags);
}
int rmdir(const char *path) {
  return fails(path_below_root(AT_FDCWD, path), ON_REMOVE) ? -1 : REAL(rmdir)(path);
}
int ftruncate64(int file, off64_t size) {
  return fails(root[0] && descriptor_below_root(file), ON_WRITE) ? -1 : REAL(ftruncate64)(file, size);
}
