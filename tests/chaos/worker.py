"""A server that forks a process for each command, so that a run costs no start of Python.

Reads a JSON object per line: the words of a command, the files for what it prints (out, err), what
it has saved and what it met (saves, counts), and the parts of a `lab.Fault`, which begins at files
below `root`. Answers "started PID", then "ended STATUS".
"""

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
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
        code, stops = ended(process, job["signal"] == signal.SIGSTOP)
        print("ended", code, stops, flush=True)


def ended(process: int, is_continued: bool) -> tuple[int, int]:
    """The exit code of a process, and how often it stopped and was continued."""
    stops = 0
    while True:
        _, status = os.waitpid(process, os.WUNTRACED if is_continued else 0)
        if not os.WIFSTOPPED(status):
            return os.waitstatus_to_exitcode(status), stops
        stops += 1
        time.sleep(0.02)
        os.kill(process, signal.SIGCONT)


def run(job: dict[str, Any]) -> None:
    """One command, in the process that was forked for it."""
    code = 99
    try:
        for group in job["groups"]:
            Path(group, "cgroup.procs").write_text(str(os.getpid()))
        for name, number in (("out", 1), ("err", 2)):
            handle = os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(handle, number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        note_saves(Path(job["saves"]))
        faults = armed(job)
        try:
            commands.get(job["words"][0], main)(job["words"])
        except SystemExit as ended:
            code = int(ended.code or 0)
        sys.stdout.flush()
        sys.stderr.flush()
        counts = [faults.faults_seen(), faults.faults_made(), faults.faults_jumps()]
        Path(job["counts"]).write_text(json.dumps(counts))
    finally:
        os._exit(code)


def armed(job: dict[str, Any]) -> ctypes.CDLL:
    """The library of faults.c, once it knows what to do."""
    faults = ctypes.CDLL(os.environ["LD_PRELOAD"])
    number, share = ctypes.c_ulong, ctypes.c_double
    faults.faults_arm.argtypes = [ctypes.c_char_p, number, share, ctypes.c_long, ctypes.c_int]
    faults.faults_jump.argtypes = [number, share]
    root, numbers = job["root"].encode(), [job[n] for n in ("seed", "rate", "at_call", "signal")]
    faults.faults_arm(root, *numbers)
    if job["jump_rate"]:
        faults.faults_jump(job["seed"], job["jump_rate"])
    return faults


def tokenize(words: Sequence[str]) -> None:
    """tokenize TEXT TOKENIZER FOLDER: the tokens of a text, kept in a folder, as a run does."""
    from tinyllama.cli.arguments import exit_code
    from tinyllama.data.corpus import prepare
    from tinyllama.tokenizers.opening import open_tokenizer

    text, tokenizer, folder = words[1:]

    def command() -> None:
        print(prepare(text, open_tokenizer(tokenizer), folder, progress=False).tokens.sum())

    sys.exit(exit_code(command, "tokenize"))


def note_saves(file: Path) -> None:
    """Write the step of each save that has returned: what a user may count on from then on."""
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    save = trainer.Trainer.save

    def noted(self: trainer.Trainer, name: str) -> Path:
        folder = save(self, name)
        os.write(handle, f"{self.step}\n".encode())
        return folder

    trainer.Trainer.save = noted  # type: ignore[method-assign]


commands = {"tokenize": tokenize}

if __name__ == "__main__":
    serve()
