"""Faults of the machine: too little memory or processor, clocks that jump, files that shrink under
a reader, and two hosts that share a folder.

Each function makes one try, and returns how many faults were really made.
"""

import contextlib
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from broken_disk import on_a_broken_disk
from lab import STEPS, Ended, Failure, Fault, Lab, Server, Skipped, losses, newest


def memory_runs_out(lab: Lab, seed: int) -> int:
    """A control group with too little memory: the kernel kills, or an allocation fails."""
    chance = random.Random(seed)
    lab.anew()
    limit = chance.randrange(2 << 20, 96 << 20)
    files = {"memory.limit_in_bytes": str(limit), "memory.max": str(limit)}
    with control_group("memory", files) as group:
        ended = lab.train(fault=Fault(groups=[str(group)]))
    lab.ends_well(ended, [0, 2, -signal.SIGKILL])
    if ended.code == 0:
        lab.holds()
        return 0
    lab.continued(max(ended.saved, default=0))
    return 1


def processor_is_lent(lab: Lab, seed: int) -> int:
    """A control group that gets 10 to 50 % of a processor, in slices."""
    lab.anew()
    quota = random.Random(seed).randrange(10_000, 50_000)
    files = {"cpu.cfs_quota_us": str(quota), "cpu.max": f"{quota} 100000"}
    with control_group("cpu", files) as group:
        lab.ends_well(lab.train(fault=Fault(groups=[str(group)])), [0])
        counts = dict(line.split() for line in (group / "cpu.stat").read_text().splitlines())
    lab.holds()
    return int(counts["nr_throttled"] != "0")


@contextlib.contextmanager
def control_group(controller: str, files: dict[str, str]) -> Iterator[Path]:
    """A control group below our own one, of version 1 or 2; of `files`, those that it has are
    written. Raises Skipped where none can be made."""
    group = _own_group(controller) / f"tinyllama-chaos-{os.getpid()}-{time.monotonic_ns()}"
    try:
        group.mkdir()
    except OSError as error:
        raise Skipped(f"no control group for {controller} can be made: {error}") from None
    try:
        there = [name for name in files if (group / name).exists()]
        if not there:
            raise Skipped(f"the control groups here do not limit {controller}")
        for name in there:
            (group / name).write_text(files[name])
        yield group
    finally:
        group.rmdir()


def _own_group(controller: str) -> Path:
    """The control group of this process that limits memory or processors."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        raise Skipped("this system has no control groups") from None
    for _, names, path in (line.split(":", 2) for line in lines):
        if controller in names.split(","):
            return Path(f"/sys/fs/cgroup/{controller}{path}")
    return Path(f"/sys/fs/cgroup{lines[-1].split(':', 2)[2]}")


def clock_jumps(lab: Lab, seed: int) -> int:
    """The clock jumps by an hour, a day, a year, to 1990 or past 2038, while a run goes on."""
    chance = random.Random(seed)
    is_resumed = chance.random() < 0.5
    lab.anew("stopped" if is_resumed else "fresh")
    fault = Fault(seed, jump_rate=chance.choice([0.02, 0.1, 0.5]))
    ended = lab.train(*(["--resume"] if is_resumed else []), fault=fault)
    lab.ends_well(ended, [0])
    lab.holds()
    return int(ended.jumps > 0)


def mapped_file_shrinks(lab: Lab, seed: int) -> int:
    """A mapped file, of tokens or weights, that cannot be read any more (SIGBUS)."""
    chance = random.Random(seed)
    is_resumed = chance.random() < 0.5
    lab.anew("stopped" if is_resumed else "fresh")
    pattern = "run/step-00000004/*.safetensors" if chance.random() < 0.3 else "cache/*/tokens.bin"
    when = chance.uniform(0.1, 1.0) * lab.seconds

    def shrink(process: int) -> None:
        time.sleep(when)
        for file in lab.tried.glob(pattern):
            with contextlib.suppress(FileNotFoundError):
                os.truncate(file, 0)

    ended = lab.train(*(["--resume"] if is_resumed else []), meanwhile=shrink)
    lab.ends_well(ended, [0, 2])
    if ended.code == 0:
        # What shrank after it was read may be an older checkpoint; the run is whole all the same.
        if losses(lab.run) != lab.reference or newest(lab.run) != STEPS:
            raise Failure(f"not the run that it should be: {losses(lab.run)}")
        return 0
    if len(ended.err.strip().splitlines()) > 2:
        raise Failure(f"more than a line: {ended.err}")
    _continued_without(lab, pattern, max([0, *ended.saved]))
    return 1


def disk_cannot_be_read(lab: Lab, seed: int) -> int:
    """A disk that answers EIO, from the start or from a moment on: mapped tokens or weights."""
    chance = random.Random(seed)
    words, file = chance.choice([
        (["train", str(lab.tried / "tiny.toml"), "--quiet", "--force"], "cache/*/tokens.bin"),
        (["evaluate", "--model", str(lab.run / "final"), "--data", str(lab.tried / "text.txt"),
          "--cache-dir", str(lab.tried / "cache")], "run/final/model.safetensors"),
        (["merge", "--base", str(lab.run / "final"), "--adapter", str(lab.tried / "lora/final"),
          "--out", str(lab.tried / "out")], "run/final/model.safetensors"),
    ])  # fmt: skip
    lab.anew("fresh" if words[0] == "train" else "adapted")
    when = max(0, chance.uniform(-0.5, 0.5)) * lab.seconds

    def fail(process: int) -> None:
        time.sleep(when)
        disk.breaks()

    with on_a_broken_disk(next(lab.tried.glob(file))) as disk:
        ended = lab.command(*words, meanwhile=fail)
    lab.ends_well(ended, [0, 2])
    said = [line for line in ended.err.splitlines() if line and "window/s" not in line]
    if ended.code and len(said) > 2:  # the backend, and the reason
        raise Failure(f"more than a line: {ended.err}")
    if words[0] == "train" and ended.code:
        lab.continued(max([0, *ended.saved]))
    elif words[0] == "train":
        lab.holds()
    elif ended.code and (ended.out or (lab.tried / "out").exists()):
        raise Failure(f"a result, and exit code 2: {ended.out}")
    return int(disk.failed > 0)


def _continued_without(lab: Lab, pattern: str, saved: int) -> None:
    """Continue a run one of whose checkpoints is known to be damaged."""
    if pattern.startswith("cache"):
        lab.continued(saved)
        return
    words = ["--resume"] if any(lab.run.glob("step-*")) else []
    lab.ends_well(lab.train(*words), [0])
    if losses(lab.run) != lab.reference or newest(lab.run) != STEPS:
        raise Failure(f"not the run that it should be: {losses(lab.run)}")


def two_hosts_in_one_run(lab: Lab, seed: int) -> int:
    """A second host, of another boot and other process numbers, trains in the folder of a run."""
    chance = random.Random(seed)
    lab.anew()
    guest, is_killed = _guest(lab), chance.random() < 0.5
    wait, kill = chance.uniform(0, lab.seconds), chance.uniform(0, lab.seconds)
    ends: list[Ended] = []

    def second() -> None:
        time.sleep(wait)
        ends.append(lab.train(server=guest))

    def end(process: int) -> None:
        if is_killed:
            time.sleep(kill)
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    other = threading.Thread(target=second)
    other.start()
    first = lab.train(meanwhile=end)
    other.join()
    lab.ends_well(first, [0, 2, -signal.SIGKILL])
    lab.ends_well(ends[0], [0, 2])
    if 0 in (first.code, ends[0].code):
        lab.holds()
    else:
        saved = max([0, *first.saved, *ends[0].saved])
        words = ["--resume"] if newest(lab.run) else []
        if newest(lab.run) < saved:
            raise Failure(f"step {saved} was saved and is lost")
        lab.ends_well(lab.train(*words, server=guest), [0])
        lab.holds()
    return 1


def two_hosts_share_caches(lab: Lab, seed: int) -> int:
    """Two hosts make the tokens, the tokenizer and the kernels in the same folders at once."""
    chance = random.Random(seed)
    lab.anew()
    guest = _guest(lab)
    shutil.rmtree(lab.tried / "cache")
    if chance.random() < 0.2:
        shutil.rmtree(lab.tried / "kernels")
    own = lab.tried / "run-of-the-guest"
    ends: list[Ended] = []

    def second() -> None:
        time.sleep(chance.uniform(0, 0.2))
        ends.append(lab.train("--set", f"checkpointing.checkpoint_dir={own}", server=guest))

    other = threading.Thread(target=second)
    other.start()
    lab.ends_well(lab.train(), [0])
    other.join()
    lab.ends_well(ends[0], [0])
    lab.holds()
    if losses(own) != lab.reference:
        raise Failure(f"other losses on the second host: {losses(own)}")
    if left := list((lab.tried / "cache").glob(".*.partial-*")):
        raise Failure(f"left behind: {left}")
    return 1


def _guest(lab: Lab) -> Server:
    """A server as on another host: its name, boot id, process numbers are others."""
    boot = lab.folder / "boot_id"
    boot.write_text("8a5c4b7e-0000-4000-8000-000000000001\n")
    script = 'hostname guest && mount --bind "$0" /proc/sys/kernel/random/boot_id && exec "$@"'
    namespaces = ("unshare", "--uts", "--pid", "--mount", "--fork", "--mount-proc")
    if shutil.which("unshare") is None or os.geteuid() != 0:
        raise Skipped("no namespaces can be made")
    return lab.server("guest", *namespaces, "sh", "-c", script, str(boot))
