/* Whether kernels may run here: those of AMX need the unit, and the system's leave to use it. */

#if defined(TILE_AMX) && !defined(TILE_IN_C)
#include <sys/syscall.h>
#include <unistd.h>
static int tiles_permitted(void) {
  return !syscall(SYS_arch_prctl, 0x1023, 18); /* refused too where there is no unit */
}
#else
static int tiles_permitted(void) { return 1; }
#endif
