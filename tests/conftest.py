"""Every test runs on the CPU backend unless it starts a process of its own."""

import json
import os
from pathlib import Path

for name in ("GPU", "CPU", "METAL", "CUDA", "NV", "AMD", "CL"):
    os.environ.pop(name, None)
os.environ["DEV"] = "CPU"
# Tests that call make speak with it as a person does, not as the make that runs the tests.
for name in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEOVERRIDES"):
    os.environ.pop(name, None)


def pytest_collection_modifyitems(items):
    """Under `make mutants` quick tests come first: the first that fails ends a mutant's run."""
    if os.environ.get("MUTANT_UNDER_TEST"):
        stats = Path("mutmut-stats.json")
        seconds = json.loads(stats.read_text())["duration_by_test"] if stats.exists() else {}
        items.sort(key=lambda item: seconds.get(item.nodeid, 0))
