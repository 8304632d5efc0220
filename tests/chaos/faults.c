// File calls that fail, or signal the process, as a test says. Loaded by LD_PRELOAD.
//
//   faults_arm(root, seed, rate, at, signal)  from now on, calls on files below `root` are counted;
//                                           each fails with probability `rate`, by a generator that
//                                           `seed` starts; before call number `at`, the process
//                                           gets this signal
//   faults_jump(seed, rate)                 the clock of the day jumps, at such a share of its readings
//   faults_seen(), faults_made()            calls counted, calls that failed
//   faults_jumps()                          jumps of the clock
#define _GNU_SOURCE
#include <dirent.h>
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
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

static char root[PATH_MAX];
static uint64_t seed;
static double rate;
static long signalled_call;
static int signal_number;
static atomic_long seen, made;

void faults_arm(const char *below, unsigned long with_seed, double with_rate, long at, int signal) {
  seed = with_seed;
  rate = with_rate;
  signalled_call = at;
  signal_number = signal;
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
  if (number == signalled_call) kill(getpid(), signal_number);
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

// The same for what takes a descriptor first, and for what takes a path first.
#define DESCRIPTOR(type, name, codes, takes, ...)                                       \
  type name takes {                                                                     \
    if (fails(root[0] && descriptor_below_root(file), codes)) return -1;                \
    return REAL(name)(file, __VA_ARGS__);                                               \
  }
#define PATH(type, name, codes, takes, ...)                           \
  type name takes {                                                   \
    if (fails(path_below_root(AT_FDCWD, path), codes)) return -1;     \
    return REAL(name)(path, __VA_ARGS__);                             \
  }
static const int ON_LOOK[] = {EIO, EACCES, ESTALE, 0}, ON_MODE[] = {EPERM, EROFS, EIO, 0};
DESCRIPTOR(ssize_t, pread64, ON_READ, (int file, void *to, size_t size, off64_t at), to, size, at)
DESCRIPTOR(ssize_t, pwrite64, ON_WRITE, (int file, const void *from, size_t size, off64_t at), from,
           size, at)
DESCRIPTOR(off64_t, lseek64, ON_READ, (int file, off64_t at, int from), at, from)
DESCRIPTOR(int, fchmod, ON_MODE, (int file, mode_t mode), mode)
DESCRIPTOR(int, futimens, ON_MODE, (int file, const struct timespec times[2]), times)
DESCRIPTOR(int, fstat, ON_LOOK, (int file, struct stat *to), to)
DESCRIPTOR(int, fstat64, ON_LOOK, (int file, struct stat64 *to), to)
PATH(int, stat, ON_LOOK, (const char *path, struct stat *to), to)
PATH(int, stat64, ON_LOOK, (const char *path, struct stat64 *to), to)
PATH(int, lstat, ON_LOOK, (const char *path, struct stat *to), to)
PATH(int, lstat64, ON_LOOK, (const char *path, struct stat64 *to), to)
PATH(int, chmod, ON_MODE, (const char *path, mode_t mode), mode)
PATH(int, truncate64, ON_WRITE, (const char *path, off64_t size), size)
int fdatasync(int file) {
  return fails(root[0] && descriptor_below_root(file), ON_SYNC) ? -1 : REAL(fdatasync)(file);
}
int flock(int file, int how) {
  static const int codes[] = {ENOLCK, EIO, 0};
  return fails(root[0] && descriptor_below_root(file), codes) ? -1 : REAL(flock)(file, how);
}
int utimensat(int folder, const char *path, const struct timespec times[2], int flags) {
  if (fails(path_below_root(folder, path), ON_MODE)) return -1;
  return REAL(utimensat)(folder, path, times, flags);
}
ssize_t sendfile64(int to, int from, off64_t *at, size_t size) {
  if (fails(root[0] && descriptor_below_root(to), ON_WRITE)) return -1;
  return REAL(sendfile64)(to, from, at, size);
}
ssize_t copy_file_range(int from, off64_t *at, int to, off64_t *into, size_t size, unsigned flags) {
  if (fails(root[0] && descriptor_below_root(to), ON_WRITE)) return -1;
  return REAL(copy_file_range)(from, at, to, into, size, flags);
}
int link(const char *from, const char *to) {
  return fails(path_below_root(AT_FDCWD, to), ON_NAME) ? -1 : REAL(link)(from, to);
}
int symlink(const char *from, const char *to) {
  return fails(path_below_root(AT_FDCWD, to), ON_NAME) ? -1 : REAL(symlink)(from, to);
}
DIR *opendir(const char *path) {
  return fails(path_below_root(AT_FDCWD, path), ON_OPEN) ? NULL : REAL(opendir)(path);
}
DIR *fdopendir(int file) {
  return fails(root[0] && descriptor_below_root(file), ON_OPEN) ? NULL : REAL(fdopendir)(file);
}
#define MAP(name, offset)                                                               \
  void *name(void *at, size_t size, int protection, int flags, int file, offset from) { \
    static const int codes[] = {ENOMEM, EIO, 0};                                        \
    int concerned = root[0] && file >= 0 && descriptor_below_root(file);                \
    if (fails(concerned, codes)) return MAP_FAILED;                                     \
    return REAL(name)(at, size, protection, flags, file, from);                         \
  }
MAP(mmap, off_t)
MAP(mmap64, off64_t)

// The clock of the day. What counts seconds (CLOCK_MONOTONIC) does not jump, as on a real machine.
static double jump_rate;
static atomic_llong offset;
static atomic_long read_times, jumps;

void faults_jump(unsigned long with_seed, double with_rate) {
  seed = with_seed;
  jump_rate = with_rate;
}
long faults_jumps(void) { return jumps; }

static void jump(void) {
  uint64_t random = mixed(seed * 7000003 + (uint64_t)++read_times);
  if ((random >> 11) * 0x1p-53 >= jump_rate) return;
  // An hour, a day, a year, back to 1990, past 2038.
  static const long long by[] = {3600, 86400, 31622400, 1135000000, 600000000};
  long long size = by[mixed(random) % 5];
  offset = size == by[3] || (size != by[4] && random & 1) ? -size : size;
  ++jumps;
}
int clock_gettime(clockid_t clock, struct timespec *to) {
  static typeof(&clock_gettime) real;
  if (!real) real = REAL(clock_gettime);
  int done = real(clock, to);
  if (done == 0 && jump_rate > 0 && clock == CLOCK_REALTIME) {
    jump();
    to->tv_sec += offset;
  }
  return done;
}
int gettimeofday(struct timeval *restrict to, void *restrict zone) {
  int done = REAL(gettimeofday)(to, zone);
  if (done == 0 && jump_rate > 0) {
    jump();
    to->tv_sec += offset;
  }
  return done;
}
time_t time(time_t *to) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (to) *to = now.tv_sec;
  return now.tv_sec;
}
