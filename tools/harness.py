"""Compare models of ours with transformers' in lm-evaluation-harness, on a local task.

python tools/harness.py tasks DIR                          writes the tasks
python tools/harness.py compare --out FILE.md              runs them on both (make lm-eval)

The tasks are made of the docstrings of Python's standard library (tools/docstrings.py), of files
that are held out there:

    stdlib_docs         which of four docstrings of one file belongs to a signature
    stdlib_docs_text    perplexity of the docstrings of a file
    stdlib_docs_write   the first line of a docstring, written from the signature
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import sysconfig
import time
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import demo
import demo_corpus
import smollm2
from docstrings import rows

from tinyllama.cli.arguments import exit_code, leave
from tinyllama.errors import ConfigError
from tinyllama.system.files import atomic_write, make_folder

CHOICES = 4
COMMON = """\
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
test_split: test
"""
YAML = {
    "stdlib_docs": """\
task: stdlib_docs
output_type: multiple_choice
doc_to_text: "{{signature}}"
doc_to_target: "{{answer}}"
doc_to_choice: "{{choices}}"
target_delimiter: ""
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
""",
    "stdlib_docs_text": """\
task: stdlib_docs_text
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: word_perplexity}
  - {metric: bits_per_byte}
""",
    "stdlib_docs_write": """\
task: stdlib_docs_write
output_type: generate_until
doc_to_text: "{{signature}}    \\"\\"\\""
doc_to_target: "{{first}}"
generation_kwargs: {until: ["\\"\\"\\""], max_gen_toks: 24, do_sample: false}
metric_list:
  - {metric: chrf, aggregation: chrf, higher_is_better: true}
""",
}
METRICS = {
    "stdlib_docs": ("acc,none", "acc_norm,none"),
    "stdlib_docs_text": ("word_perplexity,none", "bits_per_byte,none"),
    "stdlib_docs_write": ("chrf,none",),
}
LENGTH = 2048  # of the context, so that some files take several windows
MOST_RELATIVE = 1e-2  # that log-likelihoods may differ by


def documented(library: Path) -> Iterator[list[tuple[str, str]]]:
    """(signature, docstring) of each function of a held-out file, for each file that has enough of
    them, no docstring twice."""
    for name in demo_corpus.find_names(library):
        if not demo_corpus.is_held_out(name):
            continue
        try:
            with tokenize.open(library / name) as file:
                texts = [row["text"] for row in rows(file.read())]
        except (SyntaxError, UnicodeError):  # files that show what is refused
            continue
        parts = [text.partition(":\n    ") for text in texts]
        found = {doc: sign + ":\n" for sign, _, doc in parts}
        if len(found) >= CHOICES:
            yield [(sign, f"    {doc}") for doc, sign in found.items()]


def _order(*words: str) -> str:
    return hashlib.sha256("\0".join(words).encode()).hexdigest()


def question(functions: Sequence[tuple[str, str]], number: int) -> dict[str, Any]:
    """The function of this number, with the docstrings of three others, in an order by hash."""
    signature, right = functions[number]
    others = sorted((doc for _, doc in functions if doc != right), key=lambda d: _order(right, d))
    choices = sorted([right, *others[: CHOICES - 1]], key=lambda doc: _order(signature, doc))
    first = right.strip().removeprefix('"""').removesuffix('"""').partition("\n")[0]
    return {
        "signature": signature,
        "choices": choices,
        "answer": choices.index(right),
        "first": first.strip(),
    }


def write_tasks(library: Path, folder: Path, limits: tuple[int, int, int]) -> None:
    """Write a .yaml and a .jsonl file for each task, of so many rows."""
    files = list(documented(library))
    questions = [question(functions, n) for functions in files for n in range(len(functions))]
    questions.sort(key=lambda row: _order(row["signature"]))
    texts = [{"text": "\n".join(sign + doc for sign, doc in functions)} for functions in files]
    texts.sort(key=lambda row: _order(row["text"]))
    make_folder(folder)
    for task, found, most in zip(YAML, (questions, texts, questions), limits, strict=True):
        file = folder.resolve() / f"{task}.jsonl"
        atomic_write(file, "".join(f"{json.dumps(row)}\n" for row in found[:most]).encode())
        text = COMMON.format(rows=file) + YAML[task] + "metadata: {version: 1.0}\n"
        atomic_write(folder / f"{task}.yaml", text.encode())
        print(f"{file}: {min(most, len(found))} rows", flush=True)


def evaluated(words: Sequence[str], tasks: Path, out: Path, *more: str) -> dict[str, Any]:
    """What lm_eval reports: results, samples by task, and the seconds it took."""
    command = [sys.executable, "-m", *words, "--tasks", ",".join(YAML)]
    command += ["--include_path", str(tasks), "--output_path", str(out), "--log_samples", *more]
    # Two threads of PyTorch wait for each other in a loop where others use the machine.
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1",
                 "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # fmt: skip
    begun = time.monotonic()
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"{' '.join(command)}: {done.stderr[-2000:]}")
    (results,) = out.rglob("results_*.json")
    found: dict[str, Any] = {"results": json.loads(results.read_text())["results"]}
    found["seconds"] = time.monotonic() - begun
    for task in YAML:
        (samples,) = out.rglob(f"samples_{task}_2*.jsonl")
        lines = [json.loads(line) for line in samples.read_text().splitlines()]
        found[task] = sorted(lines, key=lambda line: int(line["doc_id"]))
    return found


def logprobs(run: dict[str, Any]) -> list[float]:
    """Every log-likelihood of a run, in the order of its rows."""
    found = []
    for task in ("stdlib_docs", "stdlib_docs_text"):
        for line in run[task]:
            answers = line["filtered_resps"]
            found += [float(a[0] if isinstance(a, list) else a) for a in answers]
    return found


def compared(ours: dict[str, Any], theirs: dict[str, Any], title: str) -> tuple[list[str], bool]:
    """Rows of the table, and whether both are the same."""
    lines, same = [], True
    for task, metrics in METRICS.items():
        for metric in metrics:
            pair = [float(run["results"][task][metric]) for run in (theirs, ours)]
            name = metric.partition(",")[0]
            lines.append(
                f"| {title} | {task} | {len(ours[task])} | {name} | {pair[0]:.5g} | {pair[1]:.5g} |"
            )
            same &= name not in ("acc", "acc_norm") or pair[0] == pair[1]
    pairs = list(zip(logprobs(ours), logprobs(theirs), strict=True))
    worst = max(abs(a - b) / abs(b) for a, b in pairs)
    texts = [
        (a["filtered_resps"], b["filtered_resps"])
        for a, b in zip(ours["stdlib_docs_write"], theirs["stdlib_docs_write"], strict=True)
    ]
    equal = sum(a == b for a, b in texts)
    start = f"| {title} |"
    lines.append(f"{start} log-likelihoods | {len(pairs)} | relative difference | | {worst:.1e} |")
    lines.append(f"{start} answers | {len(texts)} | the same text | | {equal} |")
    return lines, same and worst <= MOST_RELATIVE


HEAD = """# In lm-evaluation-harness

```sh
pip install 'tinyllama-trainer[lm-eval]'
python -m tinyllama.lm_eval run --model tinyllama --model_args pretrained=MODEL --tasks arc_easy
```

All but the model is the command line of
[lm_eval](https://github.com/EleutherAI/lm-evaluation-harness) itself. MODEL is what
`tinyllama chat` takes; `base=`, `template=`, `max_length=` and `threads=` are other `model_args`.
Log-likelihoods, rolling log-likelihoods and `generate_until` work, and so do
`--apply_chat_template` and `--fewshot_as_multiturn`. lm_eval brings 65 packages, but no PyTorch.

## Beside transformers

Written by `make lm-eval` on {date}, with lm_eval {version}: {model} as lm_eval's own model `hf`
reads it (transformers, float32), and as `tinyllama` does. The tasks are made of the docstrings of
Python's standard library (`python tools/harness.py tasks DIR` writes them, `dataset_path: json`):
which of four docstrings of a file belongs to a signature, the perplexity of a file's docstrings,
and a docstring written from a signature.

| prompts | task | rows | figure | hf | tinyllama |
|---|---|--:|---|--:|--:|
{rows}

{verdict}
"""


def compare(model: Path, out: Path, limits: tuple[int, int, int]) -> int:
    """Run all tasks on both, and write the table; 1 where they differ."""
    from importlib.metadata import version

    with TemporaryDirectory() as name:
        folder = Path(name)
        write_tasks(Path(sysconfig.get_path("stdlib")), folder / "tasks", limits)
        ours = f"pretrained={model},max_length={LENGTH}"
        hf = f"pretrained={model.parent},gguf_file={model.name},dtype=float32,max_length={LENGTH}"
        lines: list[str] = []
        good = True
        for title, *more in (["plain"], ["chat template", "--apply_chat_template"]):
            runs = {}
            for kind, words, given in (
                ("tinyllama", ("tinyllama.lm_eval", "run"), ours),
                ("hf", ("lm_eval", "run"), hf),
            ):
                words = (*words, "--model", kind, "--model_args", given)
                if kind == "hf":
                    words = (*words, "--device", "cpu")
                runs[kind] = evaluated(words, folder / "tasks", folder / f"{kind}-{title}", *more)
                print(f"{kind}, {title}: {runs[kind]['seconds']:.0f} s", flush=True)
            found, same = compared(runs["tinyllama"], runs["hf"], title)
            lines += found
            good &= same
            print("\n".join(found), flush=True)
    text = HEAD.format(
        date=time.strftime("%Y-%m-%d"),
        version=version("lm_eval"),
        model=model.name,
        rows="\n".join(lines),
        verdict="Accuracies are equal, and log-likelihoods within 1e-2."
        if good
        else "They differ.",
    )
    atomic_write(out, text.encode())
    return 0 if good else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, 1 where models differ, or 2 where a file cannot be used."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--limits", type=int, nargs=3, default=(60, 3, 8), metavar="ROWS")
    parts = parser.add_subparsers(dest="part", required=True)
    tasks = parts.add_parser("tasks", help="write the tasks")
    tasks.add_argument("folder", type=Path)
    both = parts.add_parser("compare", help="run the tasks on both")
    both.add_argument("--gguf", type=Path, help="a GGUF file (default: SmolLM2's, downloaded)")
    both.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    limits = tuple(options.limits)
    if options.part == "compare":
        model = options.gguf
        if model is None:
            os.chdir(demo.ROOT)
            smollm2.fetch(smollm2.BASE)
            model = smollm2.BASE
        return compare(model.resolve(), options.out, limits)
    write_tasks(Path(sysconfig.get_path("stdlib")), options.folder, limits)
    return 0


if __name__ == "__main__":
    leave(exit_code(main, "harness"))
