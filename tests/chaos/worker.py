"""A server that forks a process for each command, so that a run costs no start of Python.

Reads a JSON object per line: {"words": [...], "out": FILE, "err": FILE, "saves": FILE, "fault":
[root, seed, rate, kill_at] or null}; answers "started PID", then "ended STATUS SEEN MADE".
"""

import ctypes
import json
import os
import sys
from pathlib import Path
from typing import Any

from tinyllama.cli.app import main
from tinyllama.system.memory import collect_seldom
from tinyllama.train import trainer


def serve() -> None:
    """Serve until standard input ends. Nothing here opens a device: a fork would not survive it."""
    collect_seldom()
    for line in sys.stdin:
        job = json.loads(line)
        process = os.fork()
        if process == 0:
            run(job)
        print("started", process, flush=True)
        _, status = os.waitpid(process, 0)
        print("ended", os.waitstatus_to_exitcode(status), flush=True)


def run(job: dict[str, Any]) -> None:
    """One command, in the process that was forked for it."""
    code = 99
    try:
        for name, number in (("out", 1), ("err", 2)):
            handle = os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(handle, number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        note_saves(Path(job["saves"]))
        faults = ctypes.CDLL(os.environ["LD_PRELOAD"])
        if job["fault"] is not None:
            root, seed, rate, kill_at = job["fault"]
            faults.faults_arm.argtypes = [
                ctypes.c_char_p, ctypes.c_ulong, ctypes.c_double, ctypes.c_long,
            ]  # fmt: skip
            faults.faults_arm(root.encode(), seed, rate, kill_at)
        try:
            main(job["words"])
        except SystemExit as ended:
            code = int(ended.code or 0)
        sys.stdout.flush()
        sys.stderr.flush()
        counts = [faults.faults_seen(), faults.faults_made()]
        Path(f"{job['saves']}.faults").write_text(json.dumps(counts))
    finally:
        os._exit(code)


def note_saves(file: Path) -> None:
    """Write the step of each save that has returned: what a user may count on from then on."""
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    save = trainer.Trainer.save

    def noted(self: trainer.Trainer, name: str) -> Path:
        folder = save(self, name)
        os.write(handle, f"{self.step}\n".encode())
        return folder

    trainer.Trainer.save = noted  # type: ignore[method-assign]


if __name__ == "__main__":
    serve()
