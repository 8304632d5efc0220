"""The operations of the model, one a file; the only package that knows kernels and UOps.

Each operation has one signature and two forms: portable (plain tinygrad tensors, which every
device runs) and, where one pays, a CPU kernel written in C (`ops/cpu/*.c`). `kernel.uses_kernels`
picks by device; `kernel.forced` makes either form run everywhere, as the tests do.
"""
