/* Puts the kernels of a captured step into an OpenCL queue, one after another.

   Each has its own cl_kernel, which keeps the arguments it was given. `made` gets the event of each
   unless it is 0. Returns 0, or OpenCL's error and, in `failed`, the number of the kernel. */

typedef unsigned long word;
typedef int enqueue_function(void *queue, void *kernel, unsigned dimensions, const word *offset,
                             const word *global, const word *local, unsigned events,
                             const void *after, void **event);

struct launch {
  void *kernel;
  word global[3]; /* threads in all */
  word local[3];  /* threads per block; local[0] is 0 where the driver chooses */
};

int KERNEL(enqueue_function *call, void *queue, const struct launch *launches, word count,
           word *failed, void **made) {
  for (word i = 0; i < count; i++) {
    const struct launch *l = launches + i;
    const word *local = l->local[0] ? l->local : 0;
    int error = call(queue, l->kernel, 3, 0, l->global, local, 0, 0, made ? made + i : 0);
    if (error) {
      *failed = i;
      return error;
    }
  }
  return 0;
}
