"""Every test runs on the CPU backend unless it starts a process of its own."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from tinyllama.system.device import FLAGS
from tinyllama.system.memory import collect_seldom

collect_seldom()  # as the command line does
for name in ("GPU", *FLAGS):
    os.environ.pop(name, None)
os.environ["DEV"] = "CPU"
# Tests that call make speak with it as a person does, not as the make that runs the tests.
for name in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEOVERRIDES"):
    os.environ.pop(name, None)

# What a script starts in the background ignores Ctrl-C, and under nohup SIGHUP too; so would all
# that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Test files and tests that take a second or so: make tier2 leaves them out.
TESTS = Path(__file__).parent
SLOW = frozenset((TESTS / "slow.txt").read_text().split())


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        file = item.path.relative_to(TESTS).as_posix()
        name = item.name.partition("[")[0]
        if {file, f"{file}::{name}"} & SLOW:
            item.add_marker("slow")
    if os.environ.get("MUTANT_UNDER_TEST"):
        _quick_ones_first(items)


def pytest_collection_finish() -> None:
    """A test that makes a graph by tinygrad alone sees it as our own code does."""
    if "tinygrad" in sys.modules:
        from tinyllama.runtime.patches import install

        install()


def _quick_ones_first(items: list[pytest.Item]) -> None:
    """Under `make mutants`, where the first test that fails ends the run of a mutant."""
    stats = Path("mutmut-stats.json")
    seconds = json.loads(stats.read_text())["duration_by_test"] if stats.exists() else {}
    items.sort(key=lambda item: seconds.get(item.nodeid, 0))
