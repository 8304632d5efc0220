"""The training loop: text in, checkpoints and metrics out.

    for each step:  loss, grads -> AdamW -> one line of metrics
    once in a while:  validate, save

Everything that decides the numbers is in the configuration, the position in the data, and the
tensors of a checkpoint, so a run that is resumed continues bit for bit.
"""

import math
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tinygrad import dtypes
from tqdm import tqdm

from tinyllama import lora, quantize, runs
from tinyllama.accounting import parameters
from tinyllama.checks import check_files, supported
from tinyllama.config import Config
from tinyllama.data import Batch, Batches, prepare
from tinyllama.errors import CheckpointError, ConfigError, TrainingError, naming
from tinyllama.evaluate import Evaluator
from tinyllama.files import held
from tinyllama.memory import memory_in_use_bytes
from tinyllama.metrics import MetricsLog, progress
from tinyllama.model import Llama
from tinyllama.optim import AdamW, learning_rate
from tinyllama.signals import stopping_on_signals
from tinyllama.step import TrainStep
from tinyllama.tokenizer import Tokenizer
from tinyllama.weights.hf_read import open_folder
from tinyllama.weights.peft import AdapterConfig


@dataclass(frozen=True)
class Outcome:
    """How a run ended: its last checkpoint, the step, whether the schedule was completed."""

    checkpoint: Path
    step: int
    finished: bool


class Trainer:
    """A run: everything it needs, made or restored; `run` trains to the end or to a signal."""

    def __init__(
        self,
        config: Config,
        *,
        resume: Path | None = None,
        budget_seconds: float | None = None,
        show: bool = True,
        planned: TrainStep | None = None,
    ) -> None:
        """`resume` is a checkpoint folder to continue; `budget_seconds` shortens the schedule;
        `planned` is the step that the estimate of this run was made with."""
        self.config = supported(config)
        self.show, self.budget_seconds = show, budget_seconds
        self.folder = Path(config.checkpointing.checkpoint_dir)
        check_files(config)  # before a tokenizer is made for nothing
        self.tokenizer = _tokenizer(config, resume, show)
        t, context = config.training, config.context_length
        cache = config.data.cache_dir
        train = prepare(config.data.train_path, self.tokenizer, cache, progress=show)
        self.batches = Batches(train, context, t.batch_size, t.seed)
        self.total_steps = self.batches.steps_per_epoch * t.num_epochs
        if t.max_steps is not None:
            self.total_steps = min(self.total_steps, t.max_steps)
        self.planned_steps = self.total_steps  # what a time budget shortens
        self.model = _model(self.config, resume)
        self.adapter = _adapter(self.config, self.model, resume)
        trained = lora.adapter_tensors(self.model) if self.adapter else self.model.state_dict()
        self.optimizer = AdamW(trained, t)
        dropping = lora.dropping(self.model, t.seed)
        self.train_step = TrainStep(self.model, self.optimizer, t.accumulation_steps, dropping)
        if planned is not None:
            self.train_step.take_over(planned)
        self.evaluator = None
        if config.data.val_path is not None:
            val = prepare(config.data.val_path, self.tokenizer, cache, progress=show)
            self.evaluator = Evaluator(self.model, val, context, t.micro_batch)
        self.step = runs.restore(resume, self.optimizer, self.batches) if resume else 0
        self.saved: Path | None = resume
        self._saved_step = self.step

    def run(self) -> Outcome:
        """Train until the schedule ends, or a signal asks to stop after the current step."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with held(self.folder):
                return self._run()
        except BlockingIOError:
            raise CheckpointError(
                f"{self.folder}: another process trains there: wait for it, or choose another "
                "folder with --set checkpointing.checkpoint_dir=..."
            ) from None
        except KeyboardInterrupt as interrupt:
            raise type(interrupt)(
                f"after step {self.step}, and {self._last_checkpoint()}"
            ) from None

    def _run(self) -> Outcome:
        runs.write_config(self.folder, self.config)
        begun = (self.step, time.monotonic())
        told = "\nstopping after this step, then saving; once more to stop at once\n"
        with (
            closing(MetricsLog(self.folder / "metrics.jsonl", self.step + 1)) as metrics,
            stopping_on_signals(told if self.show else "") as stopping,
            progress(self.total_steps, self.step, self.show) as bar,
        ):
            while self.step < self.total_steps and not stopping():
                self._one_step(metrics, bar, begun, stopping)
            finished = self.step >= self.total_steps
            name = "final" if finished else runs.step_name(self.step)
            if self.saved is None or (self.saved.name, self._saved_step) != (name, self.step):
                self.save(name)
        assert self.saved is not None
        return Outcome(self.saved, self.step, finished)

    def summary(self) -> str:
        """What is about to be trained, in one line."""
        t, context = self.config.training, self.config.context_length
        trained = sum(p.numel() for p in self.optimizer.parameters.values())
        frozen = parameters(self.config.model).total
        what = f"{trained:,} adapter parameters on {frozen:,} frozen" if self.adapter else None
        return (
            f"{what or f'{trained:,} parameters'}, {self.total_steps:,} steps of "
            f"{t.batch_size} x {context} tokens, {t.dtype}"
        )

    def _one_step(
        self,
        metrics: MetricsLog,
        bar: "tqdm[None]",
        begun: tuple[int, float],
        stopping: Callable[[], bool],
    ) -> None:
        t = self.config.training
        epoch, batch = self.batches.epoch + 1, self.batches.next()
        step = self.step + 1
        lr = learning_rate(step, self.total_steps, t.learning_rate, self.config.lr_schedule)
        clock = time.perf_counter()
        result = self.train_step(_micro_batches(batch, t.micro_batch), step, lr)
        seconds = time.perf_counter() - clock
        seen = {"loss": result.loss, "gradient norm": result.grad_norm, "learning rate": lr}
        self._check_finite(step, seen)
        self.step = step
        self._shorten(*begun)
        line: dict[str, Any] = {"step": step, "loss": result.loss, "lr": lr}
        line |= {"grad_norm": result.grad_norm, "tokens_per_second": result.tokens / seconds}
        line |= {"memory_bytes": memory_in_use_bytes(), "epoch": epoch}
        found = self._validate(step, epoch, stopping)
        if found is not None:
            line["val_loss"] = found
            self._check_finite(step, {"validation loss": line["val_loss"], "learning rate": lr})
        metrics.write(line)
        shown = {"loss": f"{result.loss:.4f}", "tok/s": f"{line['tokens_per_second']:.0f}"}
        if "val_loss" in line:
            shown["val"] = f"{line['val_loss']:.4f}"
        bar.total = self.total_steps
        bar.set_postfix(shown, refresh=False)
        bar.update()
        if step % self.config.checkpointing.save_every == 0 and step < self.total_steps:
            self.save(runs.step_name(step))

    def _validate(self, step: int, epoch: int, stopping: Callable[[], bool]) -> float | None:
        """The validation loss after `step` of `epoch`, if it is time for one and nothing stops."""
        every = self.config.training.eval_every
        due = self.batches.epoch + 1 != epoch if every is None else step % every == 0
        if self.evaluator is None or not (due or step == self.total_steps):
            return None
        found = self.evaluator.run(stopping=stopping)
        return None if found is None else found.loss

    def _check_finite(self, step: int, seen: dict[str, float]) -> None:
        """Raise TrainingError, which tells what was seen, if a number in it is NaN or infinite."""
        if all(map(math.isfinite, seen.values())):
            return
        numbers = ", ".join(f"{name} {value:.6g}" for name, value in seen.items())
        last = self._last_checkpoint()
        raise TrainingError(
            f"step {step}: {numbers}: the numbers are no longer finite, so training stops; {last}. "
            "A lower training.learning_rate or a longer lr_schedule.warmup_steps may help"
        )

    def _last_checkpoint(self) -> str:
        return f"the last good checkpoint is {self.saved}" if self.saved else "nothing was saved"

    def _shorten(self, first: int, started: float) -> None:
        """With a time budget, end the schedule at the step that the budget reaches: as many steps
        fit the time that is left as took the time since `started`, when `first` was done."""
        done = self.step - first
        if self.budget_seconds is None or done < 2:
            return
        elapsed = time.monotonic() - started
        left = max(0.0, self.budget_seconds - elapsed) / (elapsed / done)
        self.total_steps = max(self.step, min(self.planned_steps, self.step + int(left)))

    def save(self, name: str) -> Path:
        """Save the run as it stands under `name`."""
        keep = self.config.checkpointing.keep_last_n
        self._saved_step = self.step
        self.saved = runs.save(
            self.folder / name, self.model, self.optimizer, self.tokenizer,
            self._state(), keep, self.adapter,
        )  # fmt: skip
        return self.saved

    def _state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside tensors."""
        parts = self.config.training.micro_batch
        return {"step": self.step, "data": self.batches.state(), "micro_batch_size": parts}


def resume_folder(config: Config, asked: str, warn: Callable[[str], None]) -> Path:
    """The checkpoint `--resume` means: a folder by name, or "latest" in the run's folder.

    Settles first what a killed run may have left there.
    """
    root = Path(config.checkpointing.checkpoint_dir)
    runs.recover(root)
    return runs.resume_folder(root, asked, warn)


def with_base(config: Config) -> Config:
    """The configuration with the sizes of `model.base`, if there is one."""
    if config.model.base is None:
        return config
    with naming("model.base"):
        folder = open_folder(config.model.base)
    return config.with_base(folder.config, str(folder.path / "config.json"))


def with_micro_batch_of(checkpoint: Path, config: Config) -> Config:
    """The configuration with the micro-batch that `checkpoint` was trained with, if none is set.

    What fits may differ from day to day, and sums of other parts round differently.
    """
    t, saved = config.training, runs.micro_batch_size(checkpoint)
    if t.micro_batch_size is not None or saved is None or t.batch_size % saved:
        return config
    return replace(config, training=replace(t, micro_batch_size=saved))


def _tokenizer(config: Config, resume: Path | None, show: bool) -> Tokenizer:
    tokenizer = runs.find_tokenizer(config, resume, show)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size: got {config.model.vocab_size}, must be at least the tokenizer's "
            f"{tokenizer.vocab_size} ({config.tokenizer_source})"
        )
    return tokenizer


def _model(config: Config, resume: Path | None) -> Llama:
    t = config.training
    dtype = getattr(dtypes, t.dtype)
    source = config.model.base if config.lora else resume or config.model.base
    if source is None:
        model = Llama(config.model, dtype=dtype, seed=t.seed, background=True)
    else:
        if config.qlora is not None and config.qlora.quantize_base:
            model = quantize.load_quantized(source, config.qlora, dtype=dtype)
        else:
            model = Llama.from_pretrained(source, dtype=dtype)
        sizes = replace(model.config, base=config.model.base, max_seq_len=config.model.max_seq_len)
        # An adapter's folder holds no sizes: its base's must be the ones it was trained with.
        fixed = resume is not None or config.lora is not None
        if fixed and sizes != replace(config.model, num_kv_heads=config.model.kv_heads):
            raise ConfigError(f"[model] differs from {source}/config.json: {sizes} is saved there")
        model.config = config.model
    model.checkpoint_activations = t.checkpoint_activations
    return model


def _adapter(config: Config, model: Llama, resume: Path | None) -> AdapterConfig | None:
    if config.lora is None:
        return None
    assert config.model.base is not None
    return lora.start(model, config.lora, Path(config.model.base), config.training.seed, resume)


def _micro_batches(batch: Batch, size: int) -> list[Batch]:
    """The rows of a batch in parts of `size`."""
    starts = range(0, len(batch.tokens), size)
    return [Batch(*(part[i : i + size] for part in batch)) for i in starts]


if __name__ == "__main__":
    from tinyllama.cli import main

    main(["train", *sys.argv[1:]])
