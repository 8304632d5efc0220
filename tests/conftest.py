"""Every test runs on the CPU backend unless it starts a process of its own."""

import os

for name in ("GPU", "CPU", "METAL", "CUDA", "NV", "AMD", "CL"):
    os.environ.pop(name, None)
os.environ["DEV"] = "CPU"
# Tests that call make speak with it as a person does, not as the make that runs the tests.
for name in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEOVERRIDES"):
    os.environ.pop(name, None)
