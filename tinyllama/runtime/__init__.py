"""How operations run on tinygrad: kernels, launches, stages, captured steps, memory, patches."""
