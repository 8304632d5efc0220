"""A folder for each try, and processes that run a command there under a fault."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
STDLIB = Path(os.__file__).parent
STEPS, SAVE_EVERY = 6, 2
CONFIG = """
[model]
vocab_size = 400
hidden_size = 64
num_layers = 1
num_heads = 2
intermediate_size = 64
max_seq_len = 32
[training]
learning_rate = 1e-2
batch_size = 2
max_steps = {steps}
seed = 3
[lr_schedule]
warmup_steps = 2
min_lr = 1e-4
[data]
train_path = "{folder}/text.txt"
context_length = 32
tokenizer = "train"
tokenizer_vocab_size = 400
cache_dir = "{folder}/cache"
[checkpointing]
save_every = {save_every}
checkpoint_dir = "{folder}/run"
keep_last_n = 2
"""


LORA = """
[model]
base = "{folder}/run/final"
[lora]
rank = 2
[training]
learning_rate = 1e-2
batch_size = 2
max_steps = 2
[lr_schedule]
warmup_steps = 1
[data]
train_path = "{folder}/text.txt"
context_length = 32
cache_dir = "{folder}/cache"
[checkpointing]
checkpoint_dir = "{folder}/lora"
"""


@dataclass
class Ended:
    """How a command ended: its exit code (negative: a signal), its words, the faults it met."""

    code: int
    out: str
    err: str
    saved: list[int]
    calls: int  # on files of the try
    faults: int  # of these, that failed
    jumps: int  # of the clock
    stops: int = 0  # after which it was continued


@dataclass
class Fault:
    """What happens to a process, see faults.c; 0 is never."""

    seed: int = 0
    rate: float = 0.0  # of file calls that fail
    at_call: int = 0  # the file call before which the process gets a signal
    signal: int = signal.SIGKILL  # SIGSTOP is followed by SIGCONT
    jump_rate: float = 0.0  # of readings of the clock before which it jumps
    groups: Sequence[str] = field(default_factory=list)  # control groups that the process enters


class Failure(Exception):
    """A promise that did not hold."""


class Skipped(Exception):
    """A fault that this machine cannot make."""


class Server:
    """A process that forks one for each command, so that a run costs no start of Python."""

    def __init__(self, folder: Path, environment: dict[str, str], *before: str) -> None:
        """`before`: words before Python's own, such as those of unshare."""
        folder.mkdir()
        self.folder = folder
        self.process = subprocess.Popen(
            [*before, sys.executable, str(HERE / "worker.py")], env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def run(
        self, words: Sequence[str], fault: Fault, root: Path, meanwhile: Callable[[int], None]
    ) -> Ended:
        """Run a command to its end; `meanwhile` is called with its process on another thread."""
        files = {name: str(self.folder / name) for name in ("out", "err", "saves", "counts")}
        for file in files.values():
            Path(file).write_text("")
        job = {"words": words, "root": str(root), **vars(fault), **files}
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        process = int(self.process.stdout.readline().split()[1])
        acting = threading.Thread(target=meanwhile, args=(process,))
        acting.start()
        code, stops = map(int, self.process.stdout.readline().split()[1:])
        acting.join()
        out, err, saves, counts = (Path(file).read_text() for file in files.values())
        numbers = json.loads(counts) if counts else [0, 0, 0]
        return Ended(code, out, err, [int(line) for line in saves.split()], *numbers, stops)

    def close(self) -> None:
        """End the process."""
        with self.process:
            assert self.process.stdin is not None
            self.process.stdin.close()


class Lab:
    """Runs commands in forked processes, in a folder that is made anew for each try."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.library = folder / "faults.so"
        subprocess.run(
            ["clang", "-O1", "-shared", "-fPIC", "-o", self.library, HERE / "faults.c", "-ldl"],
            check=True,
        )
        kept = {n: v for n, v in os.environ.items() if n not in ("DEV", "GPU")}
        self.environment = kept | {
            "DEV": "CPU",
            "NUM_CPU_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "LD_PRELOAD": str(self.library),
            "TINYLLAMA_KERNEL_CACHE": str(folder / "try" / "kernels"),
            "XDG_CACHE_HOME": str(folder / "xdg"),
        }
        self._servers: dict[str, Server] = {}
        self.reference: dict[int, float] = {}
        self.seconds = 0.0
        self.calls = 0
        self._prepare()

    def server(self, name: str = "host", *before: str) -> Server:
        """A server that runs, made where there is none of that name, or it has ended."""
        there = self._servers.get(name)
        if there is None or there.process.poll() is not None:
            place = self.folder / f"{name}-{time.monotonic_ns()}"
            self._servers[name] = Server(place, self.environment, *before)
        return self._servers[name]

    def close(self) -> None:
        """End the servers."""
        for server in self._servers.values():
            server.close()

    @property
    def tried(self) -> Path:
        return self.folder / "try"

    @property
    def run(self) -> Path:
        return self.tried / "run"

    def _prepare(self) -> None:
        """The run that nothing happens to, and one that was killed after its second checkpoint."""
        text = (STDLIB / "this.py").read_text() + (STDLIB / "keyword.py").read_text()
        tried = self.tried
        tried.mkdir()
        (tried / "text.txt").write_text(text)
        options = {"folder": tried, "steps": STEPS, "save_every": SAVE_EVERY}
        (tried / "tiny.toml").write_text(CONFIG.format(**options))
        first = self.train()
        assert first.code == 0, first.err
        shutil.rmtree(self.run)
        shutil.copytree(tried, self.folder / "fresh", symlinks=True)
        begun = time.monotonic()
        ended = self.train()
        assert ended.code == 0, ended.err
        self.seconds, self.calls = time.monotonic() - begun, ended.calls
        self.reference = losses(self.run)
        shutil.copytree(tried, self.folder / "done", symlinks=True)
        (tried / "lora.toml").write_text(LORA.format(folder=tried))
        ended = self.command("train", str(tried / "lora.toml"), "--quiet", "--force")
        assert ended.code == 0, ended.err
        shutil.copytree(tried, self.folder / "adapted", symlinks=True)
        self.anew("done")
        shutil.rmtree(self.run / "final")
        shutil.copytree(tried, self.folder / "stopped", symlinks=True)

    def anew(self, state: str = "fresh") -> None:
        """The folder of the next try: before a run, after it, or after a kill within it."""
        shutil.rmtree(self.folder / "try")
        shutil.copytree(self.folder / state, self.folder / "try", symlinks=True)

    def command(
        self,
        *words: str,
        fault: Fault | None = None,
        meanwhile: Callable[[int], None] = lambda process: None,
        server: Server | None = None,
    ) -> Ended:
        """Run a command to its end; `meanwhile` is called with its process on another thread."""
        at = server or self.server()
        return at.run(words, fault or Fault(), self.tried, meanwhile)

    def train(
        self,
        *words: str,
        fault: Fault | None = None,
        meanwhile: Callable[[int], None] = lambda process: None,
        server: Server | None = None,
    ) -> Ended:
        """Train the tiny model."""
        command = ("train", str(self.tried / "tiny.toml"), "--quiet", "--force", *words)
        return self.command(*command, fault=fault, meanwhile=meanwhile, server=server)

    def ends_well(self, ended: Ended, codes: Sequence[int]) -> None:
        """What a command said and returned is what a user may be shown."""
        if ended.code not in codes:
            raise Failure(f"exit code {ended.code}: {ended.err[-500:]}")
        if "Traceback" in ended.err:
            raise Failure(f"a traceback: {ended.err[-800:]}")
        if ended.code == 2 and not ended.err.strip():
            raise Failure("exit code 2 without a word")

    def continued(self, saved: int) -> None:
        """Continue the run, of which step `saved` was saved; check every promise."""
        first = self.run / "final"
        words = ["--resume"] if any(self.run.glob("step-*")) or first.exists() else []
        if saved and not words:
            raise Failure(f"step {saved} was saved, and no checkpoint is there")
        if words:
            found = newest(self.run)
            if found < saved:
                raise Failure(f"step {saved} was saved, and the newest checkpoint is of {found}")
        ended = self.train(*words)
        self.ends_well(ended, [0])
        self.holds()

    def holds(self, damaged: Path | None = None) -> None:
        """The run is finished, whole but for a file that a try damaged, and as if nothing had
        happened."""
        from tinyllama.train.checkpoint import list_checkpoints, verify

        if losses(self.run) != self.reference:
            raise Failure(f"other losses: {losses(self.run)}")
        for folder in list_checkpoints(self.run):
            if damaged is None or folder not in damaged.parents:
                verify(folder)
        if newest(self.run) != STEPS:
            raise Failure("the last checkpoint is not of the last step")
        left = [p for p in self.run.rglob(".*") if p.name != ".lock"]
        if left:
            raise Failure(f"left behind: {left}")


def spread(seed: int, calls: int) -> int:
    """A number from 1 to `calls`: consecutive seeds give each once, from the whole range."""
    stride = next(n for n in (7919, 7907) if calls % n)
    return 1 + seed * stride % calls


def losses(run: Path) -> dict[int, float]:
    """Step -> loss."""
    from tinyllama.observe.metrics import read_metrics

    return {line["step"]: line["loss"] for line in read_metrics(run / "metrics.jsonl")}


def newest(run: Path) -> int:
    """The step of the newest whole checkpoint, 0 if there is none; under any name."""
    from tinyllama.errors import CheckpointError
    from tinyllama.train.checkpoint import list_checkpoints, read_state, verify

    steps = [0]
    # What could not be read when it was resumed is set aside, whole, and said.
    others = [p for name in (".*.next", ".*.old", "*.aside-*") for p in run.glob(name)]
    for folder in [*list_checkpoints(run), *others]:
        with contextlib.suppress(CheckpointError):
            verify(folder)
            steps.append(read_state(folder)["step"])
    return max(steps)


def contents(path: Path) -> dict[str, str]:
    """The digest of each file at or below a path, hidden ones too."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files
    }


@contextlib.contextmanager
def mounted(folder: Path, size: int) -> Iterator[None]:
    """A file system in memory of so many bytes. Raises Skipped where none can be mounted."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        raise Skipped("no file system can be mounted")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def grow(folder: Path, size: str) -> None:
    """Give a mounted file system more room."""
    subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)
