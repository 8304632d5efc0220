"""What the operating system lacks that a run uses, as on Windows. Everything else works there."""

import os
import signal

from tinyllama.system import memory, partials


def notice() -> str | None:
    """One line with what does not work here; None if everything does."""
    lacking = []
    if not partials.has_locks():
        lacking.append("no file locks (nothing stops a second run in the same folder)")
    if not hasattr(signal, "SIGHUP"):
        lacking.append("no SIGHUP (a run whose terminal is closed does not save)")
    if os.name == "nt":
        lacking.append("no sync of folders (a power cut may cost the last checkpoint)")
    if not memory.can_measure():
        lacking.append("no measure of a process's memory (memory_bytes is 0)")
    return f"this system has {', '.join(lacking)}" if lacking else None
