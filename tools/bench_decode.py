"""Measure reading a prompt and generating from it, beside llama.cpp on the same file and threads.

python tools/bench_decode.py MODEL.gguf --peer-python PEER       in the types of the file
python tools/bench_decode.py MODEL.gguf --types Q8_0 BF16 F32    and stored anew in these

PEER is a Python with llama-cpp-python (docs/speed.md says how to build it). Both processes stay
alive and take turns, run by run; the best run of each counts, since another program can only slow
one down. A file of another type is written to a temporary folder by the `gguf` library. Run
nothing else meanwhile; where that cannot be, `--threads 1 --cpu-seconds` counts the processor's
time instead of the clock's (threads that wait for each other spend it too).
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tinyllama.cli.arguments import exit_code, leave

PEER = """
import sys, time
from llama_cpp import Llama
path, clock, threads, prompt, new = *sys.argv[1:3], *map(int, sys.argv[3:])
now = getattr(time, clock)
model = Llama(path, n_ctx=prompt + new + 32, n_batch=512, n_threads=threads,
              n_threads_batch=threads, verbose=False)
for line in sys.stdin:
    model.reset()
    start = now()
    model.eval([5 + i * 37 % 1000 for i in range(prompt)])
    read = now()
    for i in range(new):
        model.eval([5 + i])
    print(prompt / (read - start), new / (now() - read), flush=True)
"""


def clock_of(options: argparse.Namespace) -> str:
    """The function of `time` that rates are measured with."""
    return "process_time" if options.cpu_seconds else "perf_counter"


def worker(options: argparse.Namespace) -> None:
    """Our side of the protocol: a line in, a line with both rates out."""
    from tinyllama.system import device

    device.select(threads=options.threads)
    from tinyllama.generate.generator import Generator, Sampling
    from tinyllama.model.build import load_model

    model = load_model(options.model)
    generator = Generator(model, options.prompt + options.new + 1)
    now = getattr(time, clock_of(options))
    for run, _ in enumerate(sys.stdin):
        # Another first token each time: the generator keeps what it has read.
        prompt = [5 + (run + i * 37) % 1000 for i in range(options.prompt)]
        start = now()
        tokens = generator.tokens(prompt, options.new + 1, Sampling(temperature=0))
        next(tokens)
        read = now()
        count = len(list(tokens))
        end = now()
        print(options.prompt / (read - start), count / (end - read), flush=True)


class Side:
    """One of the two processes."""

    def __init__(self, command: Sequence[str]) -> None:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
        )
        self.rates: list[tuple[float, float]] = []

    def run(self) -> None:
        """One prompt and its continuation."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write("run\n")
        self.process.stdin.flush()
        prompt, new = map(float, self.process.stdout.readline().split())
        self.rates.append((prompt, new))

    def best(self) -> tuple[float, float]:
        """The best rates of a prompt and of new tokens, without the first run, which compiles."""
        prompts, new = zip(*self.rates[1:], strict=True)
        return max(prompts), max(new)

    def close(self, *_: object) -> None:
        """End the process."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def stored_as(model: Path, kind: str, folder: Path) -> Path:
    """A copy of a model in which every matrix is of one type; its metadata stay."""
    import gguf

    path, reader = folder / f"{kind}.gguf", gguf.GGUFReader(model)
    writer = gguf.GGUFWriter(path, "llama")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            inner = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], inner)
    target = gguf.GGMLQuantizationType[kind]
    for tensor in reader.tensors:
        values, number = gguf.dequantize(tensor.data, tensor.tensor_type), target
        if len(tensor.shape) == 1:
            number = gguf.GGMLQuantizationType.F32
        writer.add_tensor(tensor.name, gguf.quantize(values, number), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def measure(options: argparse.Namespace, model: Path) -> Iterator[str]:
    """Both sides' rates on one file, in the cells of a row."""
    sizes = [str(options.threads), str(options.prompt), str(options.new)]
    ours = [sys.executable, __file__, str(model), "--worker", "--threads", sizes[0]]
    ours += ["--prompt", sizes[1], "--new", sizes[2], *["--cpu-seconds"] * options.cpu_seconds]
    theirs = [options.peer_python, "-c", PEER, str(model), clock_of(options), *sizes]
    with ExitStack() as sides:
        pair = [Side(ours)]
        if options.peer_python:
            pair.append(Side(theirs))
        for side in pair:
            sides.push(side.close)
        for _ in range(options.runs + 1):
            for side in pair:
                side.run()
        best = [side.best() for side in pair]
    for place in (1, 0):
        rates = [rate[place] for rate in best]
        yield from (f"{rate:.0f}" for rate in rates)
        if len(rates) == 2:
            yield f"{rates[0] / rates[1]:.2f}"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path, help="GGUF file")
    parser.add_argument("--peer-python", help="Python that has llama-cpp-python")
    parser.add_argument("--types", nargs="+", default=[], help="store the matrices in these first")
    parser.add_argument("--threads", type=int, default=2, help="of each side (default: 2)")
    parser.add_argument("--prompt", type=int, default=256, help="tokens read (default: 256)")
    parser.add_argument("--new", type=int, default=32, help="tokens generated (default: 32)")
    parser.add_argument("--runs", type=int, default=3, help="of each side, in turns (default: 3)")
    parser.add_argument("--cpu-seconds", action="store_true", help="count the processor's time")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Print a table in Markdown, tokens per second."""
    options = parse(arguments)
    if options.worker:
        worker(options)
        return
    columns: list[Any] = ["new tokens/s", "prompt tokens/s"]
    if options.peer_python:
        columns = [name for c in columns for name in (c, "llama.cpp", "ratio")]
    print(" | ".join(["weights", *columns]))
    print(" | ".join(["---"] * (1 + len(columns))))
    with tempfile.TemporaryDirectory() as folder:
        print(" | ".join(["as in the file", *measure(options, options.model)]), flush=True)
        for kind in options.types:
            path = stored_as(options.model, kind, Path(folder))
            print(" | ".join([kind, *measure(options, path)]), flush=True)
            path.unlink()


if __name__ == "__main__":
    leave(exit_code(lambda: main(sys.argv[1:]), "bench_decode"))
