"""Real runs under real faults, again and again: `make chaos`.

Each try trains a tiny model, does something to the run or to its files, and then continues it as a
user would. After each:

    nothing that was saved is lost, and every checkpoint holds its sums
    every loss is, bit for bit, that of a run that nothing happened to
    whatever ended a run was said without a traceback, and nothing half-written stays

A try is made again with `--only KIND --seed SEED --tries 1`, with the seed that it printed.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
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


@dataclass
class Ended:
    """How a command ended: its exit code (negative: a signal), its words, the faults it met."""

    code: int
    out: str
    err: str
    saved: list[int]
    faults: list[int]


@dataclass
class Count:
    """Of one kind of fault: tries, faults that were really made, and what failed."""

    tries: int = 0
    faults: int = 0
    failures: list[str] = field(default_factory=list)
    skipped: str = ""


class Failure(Exception):
    """A promise that did not hold."""


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
        self.server = self._serve()
        self.reference: dict[int, float] = {}
        self.seconds = 0.0
        self.calls = 0
        self._prepare()

    def _serve(self) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, str(HERE / "worker.py")], env=self.environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def close(self) -> None:
        """End the server."""
        with self.server:
            assert self.server.stdin is not None
            self.server.stdin.close()

    @property
    def run(self) -> Path:
        return self.folder / "try" / "run"

    def _prepare(self) -> None:
        """The run that nothing happens to, and one that was killed after its second checkpoint."""
        text = (STDLIB / "this.py").read_text() + (STDLIB / "keyword.py").read_text()
        tried = self.folder / "try"
        tried.mkdir()
        (tried / "text.txt").write_text(text)
        options = {"folder": tried, "steps": STEPS, "save_every": SAVE_EVERY}
        (tried / "tiny.toml").write_text(CONFIG.format(**options))
        first = self.train()
        assert first.code == 0, first.err
        shutil.rmtree(self.run)
        shutil.copytree(tried, self.folder / "fresh", symlinks=True)
        begun = time.monotonic()
        ended = self.train(fault=(str(tried), 0, 0.0, 0))
        assert ended.code == 0, ended.err
        self.seconds, self.calls = time.monotonic() - begun, ended.faults[0]
        self.reference = losses(self.run)
        shutil.copytree(tried, self.folder / "done", symlinks=True)
        shutil.rmtree(self.run / "final")
        shutil.copytree(tried, self.folder / "stopped", symlinks=True)

    def anew(self, state: str = "fresh") -> None:
        """The folder of the next try: before a run, after it, or after a kill within it."""
        shutil.rmtree(self.folder / "try")
        shutil.copytree(self.folder / state, self.folder / "try", symlinks=True)

    def command(
        self,
        *words: str,
        fault: tuple[str, int, float, int] | None = None,
        meanwhile: Callable[[int], None] | None = None,
    ) -> Ended:
        """Run a command to its end; `meanwhile` is called with its process on another thread."""
        files = {name: str(self.folder / name) for name in ("out", "err", "saves")}
        Path(files["saves"] + ".faults").unlink(missing_ok=True)
        job = {"words": words, "fault": fault, **files}
        assert self.server.stdin is not None and self.server.stdout is not None
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        process = int(self.server.stdout.readline().split()[1])
        acting = threading.Thread(target=meanwhile or (lambda process: None), args=(process,))
        acting.start()
        code = int(self.server.stdout.readline().split()[1])
        acting.join()
        faults = Path(files["saves"] + ".faults")
        return Ended(
            code,
            Path(files["out"]).read_text(),
            Path(files["err"]).read_text(),
            [int(line) for line in Path(files["saves"]).read_text().split()],
            json.loads(faults.read_text()) if faults.exists() else [0, 0],
        )

    def train(self, *words: str, **options: object) -> Ended:
        """Train the tiny model."""
        config = str(self.folder / "try" / "tiny.toml")
        return self.command("train", config, "--quiet", "--force", *words, **options)  # type: ignore[arg-type]

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


# ---- kinds of faults: each makes one try and returns how many faults were really made


def killed(lab: Lab, seed: int) -> int:
    """SIGKILL at a random moment."""
    return _signalled(lab, seed, signal.SIGKILL, [-signal.SIGKILL])


def terminated(lab: Lab, seed: int) -> int:
    """SIGTERM or SIGINT at a random moment, perhaps twice."""
    chance = random.Random(seed)
    if chance.random() < 0.5:
        return _signalled(lab, seed, signal.SIGTERM, [143, -signal.SIGTERM], chance.randint(1, 2))
    return _signalled(lab, seed, signal.SIGINT, [130, -signal.SIGINT], chance.randint(1, 2))


def _signalled(
    lab: Lab, seed: int, number: signal.Signals, codes: list[int], times: int = 1
) -> int:
    chance = random.Random(seed)
    lab.anew()
    sent: list[int] = []

    def send(process: int) -> None:
        for _ in range(times):
            time.sleep(chance.uniform(0, lab.seconds))
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)
                sent.append(number)

    ended = lab.train(meanwhile=send)
    # Python itself, before our handlers stand, shows its own traceback for SIGINT.
    early = ended.code in (-signal.SIGINT, 99) and not ended.saved
    if not early:
        lab.ends_well(ended, [0, *codes])
    if ended.code == 0:
        lab.holds()
    else:
        lab.continued(max(ended.saved, default=0))
    return len(sent)


def paused(lab: Lab, seed: int) -> int:
    """SIGSTOP and SIGCONT, five times, at random."""
    chance, made = random.Random(seed), 0
    lab.anew()

    def pause(process: int) -> None:
        nonlocal made
        for _ in range(5):
            time.sleep(chance.uniform(0, lab.seconds / 4))
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGSTOP)
                time.sleep(chance.uniform(0, 0.05))
                os.kill(process, signal.SIGCONT)
                made += 1

    lab.ends_well(lab.train(meanwhile=pause), [0])
    lab.holds()
    return made


def dies_at_a_call(lab: Lab, seed: int) -> int:
    """SIGKILL at file call number `seed` of a run: every one in turn."""
    lab.anew()
    ended = lab.train(fault=(str(lab.folder / "try"), 0, 0.0, 1 + seed % lab.calls))
    lab.ends_well(ended, [0, -signal.SIGKILL])
    if ended.code == 0:  # the number of calls differs a little from run to run
        lab.holds()
        return 0
    lab.continued(max(ended.saved, default=0))
    return 1


def dies_in_a_resume(lab: Lab, seed: int) -> int:
    """SIGKILL at file call number `seed` of a run that is resumed."""
    lab.anew("stopped")
    calls = max(1, lab.calls // 2)
    fault = (str(lab.folder / "try"), 0, 0.0, 1 + seed % calls)
    ended = lab.train("--resume", fault=fault)
    lab.ends_well(ended, [0, -signal.SIGKILL])
    lab.continued(max([4, *ended.saved]))
    return int(ended.code != 0)


def calls_fail(lab: Lab, seed: int) -> int:
    """File calls that fail at random: no space, no permission, I/O errors, short writes."""
    chance = random.Random(seed)
    lab.anew("fresh" if chance.random() < 0.7 else "stopped")
    begun = (lab.run).exists()
    rate = chance.choice([0.5, 1, 2, 5, 20]) / lab.calls
    fault = (str(lab.folder / "try"), seed, rate, 0)
    ended = lab.train(*(["--resume"] if begun else []), fault=fault)
    lab.ends_well(ended, [0, 2])
    if ended.code == 0 and not any(w in ended.err for w in ("removed", "damaged")):
        if losses(lab.run) != lab.reference:
            raise Failure(f"other losses: {losses(lab.run)}")
    if ended.code != 0:
        lab.continued(max([4 if begun else 0, *ended.saved]))
    return ended.faults[1]


def disk_fills(lab: Lab, seed: int) -> int:
    """A file system that fills, at another byte each time."""
    chance = random.Random(seed)
    lab.anew()
    lab.run.mkdir()
    size = chance.randrange(4 << 10, 3 << 20)
    with mounted(lab.run, size):
        ended = lab.train()
        lab.ends_well(ended, [0, 2])
        saved = max(ended.saved, default=0)
        if ended.code == 2 and "space" not in ended.err.lower():
            raise Failure(f"does not say that the disk is full: {ended.err}")
        if newest(lab.run) < saved:
            raise Failure(f"step {saved} was saved and is lost")
        subprocess.run(["mount", "-o", "remount,size=64m", str(lab.run)], check=True)
        if ended.code == 2:
            lab.continued(saved)
        else:
            lab.holds()
        return int(ended.code == 2)


@contextlib.contextmanager
def mounted(folder: Path, size: int) -> Iterator[None]:
    """A file system in memory of so many bytes."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def bits_flip(lab: Lab, seed: int) -> int:
    """A flipped bit, a cut or zeros in one file of any kind, before a run begins or is resumed."""
    chance = random.Random(seed)
    is_resumed = chance.random() < 0.7
    lab.anew("stopped" if is_resumed else "fresh")
    tried, given = lab.folder / "try", ("text.txt", "tiny.toml", "config.toml")
    files = [
        path
        for path in sorted(tried.rglob("*"))
        if path.is_file() and path.stat().st_size and path.name not in given
    ]
    file = chance.choice(files)
    damage(file, chance)
    name = str(file.relative_to(tried))
    ended = lab.train(*(["--resume"] if is_resumed else []))
    lab.ends_well(ended, [0])
    if name == "run/metrics.jsonl":
        lasting = {s: v for s, v in losses(lab.run).items() if s in lab.reference}
        wrong = {s for s, v in lasting.items() if v != lab.reference[s] and s > 4}
        if wrong or max(lasting) != STEPS:
            raise Failure(f"{name}: other losses: {lasting}")
        return 1
    lab.holds(damaged=file)
    # Kernels are compiled again without a word. An older checkpoint is not read, nor, by a run
    # that is resumed, the tokenizer that it was begun with.
    silent = name.startswith(("kernels", "run/step-00000002"))
    silent = silent or (is_resumed and name.startswith("cache/tokenizer-"))
    if not silent and not ended.err.strip():
        raise Failure(f"{name}: nothing is said")
    return 1


def bits_flip_before_loading(lab: Lab, seed: int) -> int:
    """A flipped bit in a file of a model that is evaluated or generates."""
    chance = random.Random(seed)
    lab.anew("done")
    final = lab.run / "final"
    names = ["model.safetensors", "config.json", "tokenizer.model", "manifest.json"]
    name = chance.choice(names)
    damage(final / name, chance)
    if chance.random() < 0.5:
        ended = lab.command("generate", "--model", str(final), "--max-new-tokens", "2")
    else:
        words = ["--data", str(lab.folder / "try" / "text.txt")]
        words += ["--cache-dir", str(lab.folder / "try" / "cache")]
        ended = lab.command("evaluate", "--model", str(final), *words)
    lab.ends_well(ended, [2])
    if ended.out:
        raise Failure(f"{name}: a result was printed: {ended.out}")
    return 1


def damage(file: Path, chance: random.Random) -> None:
    """One flipped bit, or a cut, or a block of zeros."""
    data = bytearray(file.read_bytes())
    kind = chance.random()
    if kind < 0.8:
        bit = chance.randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
    elif kind < 0.9:
        data = data[: chance.randrange(len(data))]
    else:
        start = chance.randrange(len(data))
        length = min(len(data) - start, 512)
        zeros = bytes(length)
        data[start : start + length] = zeros if data[start : start + length] != zeros else b"x"
    file.write_bytes(data)


def readers_hold(lab: Lab, seed: int) -> int:
    """A reader that holds every file of old checkpoints open while they are pruned."""
    lab.anew("stopped")
    with contextlib.ExitStack() as held:
        for path in sorted(lab.run.rglob("*")):
            if path.is_file():
                held.enter_context(open(path, "rb"))
        lab.ends_well(lab.train("--resume"), [0])
        lab.holds()
    return 1


def immutable(lab: Lab, seed: int) -> int:
    """An old checkpoint with a file that cannot be removed."""
    lab.anew("stopped")
    old = lab.run / "step-00000002"
    held = old / random.Random(seed).choice(["model.safetensors", "config.json", "manifest.json"])
    done = subprocess.run(["chattr", "+i", held], capture_output=True)
    if done.returncode:
        raise Skipped("this file system has no immutable files")
    try:
        ended = lab.train("--resume", "--set", "checkpointing.keep_last_n=1")
        lab.ends_well(ended, [0])
        if ended.err.count("cannot be removed and stays") != 1:
            raise Failure(f"not said once: {ended.err}")
    finally:
        found = next(lab.run.rglob(held.name), held)
        for path in lab.run.rglob(held.name):
            found = path
            subprocess.run(["chattr", "-i", found], capture_output=True)
    return 1


class Skipped(Exception):
    """A fault that this machine cannot make."""


KINDS: dict[str, tuple[Callable[[Lab, int], int], float]] = {
    "killed": (killed, 1.0),
    "terminated": (terminated, 0.5),
    "paused": (paused, 0.2),
    "dies_at_a_call": (dies_at_a_call, 2.0),
    "dies_in_a_resume": (dies_in_a_resume, 1.0),
    "calls_fail": (calls_fail, 2.0),
    "disk_fills": (disk_fills, 0.5),
    "bits_flip": (bits_flip, 2.0),
    "bits_flip_before_loading": (bits_flip_before_loading, 1.0),
    "readers_hold": (readers_hold, 0.1),
    "immutable": (immutable, 0.1),
}


def chaos(tries: int, seed: int, only: Sequence[str], seconds: float) -> dict[str, Count]:
    """So many tries of each kind, times its weight, in turn; fewer where the time is over."""
    sys.path.insert(0, str(ROOT))
    counts = {kind: Count() for kind in KINDS if not only or kind in only}
    ends = time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        lab = Lab(Path(folder).resolve())
        while time.monotonic() < ends:
            wanted = {kind: tries * (1.0 if only else KINDS[kind][1]) for kind in counts}
            open_ = [
                kind for kind, count in counts.items()
                if count.tries < wanted[kind] and not count.skipped
            ]  # fmt: skip
            if not open_:
                break
            kind = min(open_, key=lambda kind: counts[kind].tries / wanted[kind])
            attempt(lab, kind, KINDS[kind][0], counts[kind], seed + counts[kind].tries)
        lab.close()
    return counts


def attempt(lab: Lab, kind: str, make: Callable[[Lab, int], int], count: Count, seed: int) -> None:
    """One try; what fails is printed with what makes it happen again."""
    if count.skipped:
        return
    try:
        count.faults += make(lab, seed)
    except Skipped as why:
        count.skipped = str(why)
        return
    except Exception as failure:
        why = f"{kind} --seed {seed}: {type(failure).__name__}: {failure}"
        print(why, flush=True)
        count.failures.append(why)
        if lab.server.poll() is not None:
            lab.server = lab._serve()
    count.tries += 1


def table(counts: dict[str, Count], seed: int) -> str:
    """The result as Markdown."""
    lines = ["| fault | tries | faults made | failures |", "|---|---:|---:|---:|"]
    for kind, count in counts.items():
        what = (KINDS[kind][0].__doc__ or kind).splitlines()[0].rstrip(".")
        lines.append(f"| {what} | {count.tries} | {count.faults} | {len(count.failures)} |")
    every = list(counts.values())
    tries, faults = sum(c.tries for c in every), sum(c.faults for c in every)
    failures = sum(len(c.failures) for c in every)
    lines.append(f"| **together** | {tries} | {faults} | {failures} |")
    lines += [f"\nSkipped: {k}: {c.skipped}" for k, c in counts.items() if c.skipped]
    return "\n".join([*lines, "", f"Seeds from {seed} on, {time.strftime('%Y-%m-%d')}."])


def main() -> int:
    """Try, print the table, and return 1 if anything failed."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--tries", type=int, default=100, help="of each kind, times its weight")
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--only", action="append", default=[], choices=list(KINDS))
    options.add_argument("--seconds", type=float, default=7200, help="end after so long")
    options.add_argument("--out", type=Path, help="write the table into this file's marked part")
    given = options.parse_args()
    counts = chaos(given.tries, given.seed, given.only, given.seconds)
    text = table(counts, given.seed)
    print(text)
    if given.out is not None:
        before, rest = given.out.read_text().split("<!-- begin chaos -->\n", 1)
        _, after = rest.split("<!-- end chaos -->", 1)
        new = f"{before}<!-- begin chaos -->\n{text}\n<!-- end chaos -->{after}"
        given.out.write_text(new)
    return int(any(count.failures for count in counts.values()))


if __name__ == "__main__":
    sys.exit(main())
