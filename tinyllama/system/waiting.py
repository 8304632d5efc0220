"""How long this process was ready to run, and other programs had the processors.

Linux keeps it per thread, in nanoseconds, in /proc/self/task/ID/schedstat (Documentation/scheduler/
sched-stats.rst: time on the processor, time on a run queue, slices). Elsewhere it counts as none.
"""

import os
from contextlib import suppress


class Waiting:
    """Seconds of waiting since the last question."""

    def __init__(self, tasks: str = "/proc/self/task") -> None:
        self._tasks, self._before = tasks, dict[str, int]()
        self.take()

    def take(self) -> float:
        """The longest time that one of the threads waited since the last call."""
        now = dict[str, int]()
        for task in self._threads():
            with (
                suppress(OSError, ValueError, IndexError),  # a thread that ended, another system
                open(f"{self._tasks}/{task}/schedstat", "rb", buffering=0) as file,
            ):
                now[task] = int(file.read(100).split()[1])
        waits = [time - self._before.get(name, time) for name, time in now.items()]
        self._before = now
        return max(waits, default=0) / 1e9

    def _threads(self) -> list[str]:
        try:
            return os.listdir(self._tasks)
        except OSError:  # another system
            return []
