"""A command in a pseudo-terminal, typed at and read."""

import os
import pty
import re
import select
import subprocess
import sys
import time

from runs_helpers import environment

# The terminal becomes the process's own, so that Ctrl-C reaches it.
OWN_TERMINAL = (
    "import fcntl, os, sys, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
    "os.execv(sys.executable, [sys.executable, '-m', 'tinyllama', *sys.argv[1:]])"
)


class Terminal:
    """`tinyllama WORDS` in a process of its own, and what its terminal shows."""

    def __init__(self, *words, **variables):
        self._master, slave = pty.openpty()
        command = [sys.executable, "-c", OWN_TERMINAL, *map(str, words)]
        given = environment(TERM="xterm", PROMPT_TOOLKIT_NO_CPR="1", **variables)
        self.process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=given)
        os.close(slave)
        self._raw = b""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        os.close(self._master)

    def type(self, text):
        os.write(self._master, text.encode())

    @property
    def shown(self):
        """All that was shown, without the terminal's own codes."""
        text = self._raw.decode(errors="replace")
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b[=>]|\r", "", text)

    def wait_for_prompt(self, count, seconds=60):
        """Read until a line can be typed for the count-th time (bracketed paste is switched on)."""
        self.wait(lambda: self._raw.count(b"\x1b[?2004h") >= count, seconds)

    def wait_for(self, text, count=1):
        """Read until `text` has been shown so many times."""
        self.wait(lambda: self.shown.count(text) >= count)

    def wait(self, is_there, seconds=60):
        """Read until `is_there()`."""
        deadline = time.monotonic() + seconds
        while not is_there():
            assert time.monotonic() < deadline, self.shown
            if select.select([self._master], [], [], 0.2)[0]:
                try:
                    self._raw += os.read(self._master, 65536)
                except OSError:  # the other end is closed
                    raise AssertionError(self.shown) from None

    def end(self):
        """The exit code."""
        deadline = time.monotonic() + 60
        while self.process.poll() is None:
            assert time.monotonic() < deadline, self.shown
            if select.select([self._master], [], [], 0.1)[0]:
                try:
                    self._raw += os.read(self._master, 65536)
                except OSError:
                    break
        return self.process.wait(10)
