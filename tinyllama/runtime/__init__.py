"""How operations run inside tinygrad: kernels, launches, stages, captured steps, memory."""
