"""The training loop: text in, checkpoints and metrics out.

    for each step:  loss, grads -> AdamW -> one line of metrics
    once in a while:  validate, save

Everything that decides the numbers is in the configuration, the position in the data, and the
tensors of a checkpoint, so a run that is resumed continues bit for bit.
"""

import math
import os
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tinyllama.config import Config
from tinyllama.data.layout import Rows, trimmed
from tinyllama.errors import CheckpointError, TrainingError
from tinyllama.formats.models import open_model
from tinyllama.formats.peft import AdapterFolder
from tinyllama.model.build import build
from tinyllama.model.counts import model_flops, parameters
from tinyllama.model.lora import dropping, read_adapters
from tinyllama.model.noise import noising
from tinyllama.observe.ceiling import known_gflops
from tinyllama.observe.metrics import MetricsLog
from tinyllama.observe.progress import Progress
from tinyllama.observe.samples import forget_after
from tinyllama.observe.trace import Tracing
from tinyllama.observe.trackers import Trackers
from tinyllama.runtime import precompile
from tinyllama.system import lacking
from tinyllama.system.files import free_name, make_folder
from tinyllama.system.memory import memory_in_use_bytes
from tinyllama.system.notices import to_stderr
from tinyllama.system.signals import stopping_on_signals
from tinyllama.system.waiting import Waiting
from tinyllama.train import run_folder, saving
from tinyllama.train.best import better
from tinyllama.train.checkpoint import BEST, verify
from tinyllama.train.evaluate import Evaluation, PairEvaluation
from tinyllama.train.objective import find_material, rows_per_example
from tinyllama.train.optimizer import AdamW
from tinyllama.train.preferences import loss_of
from tinyllama.train.prepare import (
    check_files,
    differences,
    find_tokenizer,
    made_with,
    supported,
    trained_and_validated,
    unused_rows,
    without_effect,
)
from tinyllama.train.samples import Samples
from tinyllama.train.schedule import Place, learning_rate, with_warmup_steps
from tinyllama.train.step import StepResult, TrainStep
from tinyllama.train.watching import MOST_ROLLBACKS, Moves, Watching, greatest, update_ratios


@dataclass(frozen=True)
class Outcome:
    """How a run ended: its last checkpoint, its step, whether the schedule was completed.

    `exit_code` is 130 or 143 after a signal. The losses, in nats per token, are those of the last
    step; None where this process made no step, and where nothing was validated after it. `early`
    says why the run ended before its schedule, if training.early_stopping ended it.
    """

    checkpoint: Path
    step: int
    finished: bool
    exit_code: int = 0
    loss: float | None = None
    val_loss: float | None = None
    early: str | None = None


class Trainer:
    """A training run. Making it builds or restores everything; `run` trains until the schedule
    ends or a signal arrives."""

    def __init__(
        self,
        config: Config,
        *,
        resume: Path | None = None,
        budget_seconds: float | None = None,
        show: bool = True,
        planned: TrainStep | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        """`resume` is a checkpoint folder to continue; `budget_seconds` shortens the schedule;
        `planned` is the step that the estimate of this run was made with; `tracing` hears what
        the run does (observe/trace.py)."""
        self.tracing = tracing or Tracing()
        self.config = supported(config)
        self.show, self.budget_seconds = show, budget_seconds
        self.folder = Path(config.checkpointing.checkpoint_dir)
        check_files(config)  # before a tokenizer is trained in vain
        self.tokenizer = find_tokenizer(config, resume, show)
        t, self.material = config.training, find_material(config, self.tokenizer, show)
        self.batches = self.material.batches
        self.model, trained, adapter = build(self.config, resume)
        if adapter is not None:
            adapter = replace(adapter, tokenizer_digest=self.tokenizer.vocabulary_digest)
        self.adapter = adapter
        # The estimate has decided whether there is memory for copies of weights.
        copied = [] if planned is None else list(planned.optimizer.copies)
        self.optimizer = AdamW(trained, t, copied=copied)
        around = noising(self.model.noise, t.seed, dropping(self.model, t.seed))
        self.train_step = TrainStep(
            self.model, self.optimizer, t.accumulation_steps, around, loss_of(config),
            guarded=config.observe.guards_updates,
        )  # fmt: skip
        if planned is not None:
            self.train_step.take_over(planned)
        self.evaluator = self.material.evaluator(config, self.model)
        self.step = saving.restore(resume, self.optimizer, self.batches) if resume else 0
        state = run_folder.read_state(resume) if resume else {}
        place = self._place()
        self.total_steps = self.planned_steps = place.total_steps(t.batch_size)
        self.schedule = with_warmup_steps(
            config.lr_schedule, self.total_steps, state.get("warmup_steps")
        )
        self.anchor = run_folder.schedule_anchor(state)
        if (was := run_folder.batch_size(state)) not in (None, t.batch_size):
            self.anchor = place.anchor(was, self.schedule, self.anchor)
        self.best = run_folder.best(state)
        pieces, watched = self.tokenizer.pieces, state.get("watching") or {}
        self.watching = Watching(config, self.batches, pieces, watched)
        self.moves = Moves(trained, begun=self.step > 0)
        self._waiting = Waiting()
        self.samples = Samples(config, self.model, self.tokenizer)
        self._rolled_back: dict[str, Any] | None = None  # for the next line of metrics
        # The metrics of a step whose validation was interrupted by a signal.
        self._unvalidated: dict[str, Any] | None = state.get("unvalidated")
        self._last_line: dict[str, Any] = {}  # of metrics
        self._traced_epoch = 0
        self._metrics: MetricsLog | None = None  # while the run goes on
        self._tracked: Trackers | None = None
        kept_as = "bfloat16" if t.dtype == "bfloat16" else "float32"
        self._ceiling = known_gflops(kept_as) if show else None
        if state.get("was_last") and budget_seconds is not None:
            self.total_steps = self.step  # the budget was used up there
        self._resumed = self.saved = resume
        self._saved_step = self.step
        self._followed: Path | None = None  # the newest checkpoint whose next step was finite

    def run(self) -> Outcome:
        """Train until the schedule ends; a signal stops the run after the current step."""
        make_folder(self.folder)
        try:
            with ExitStack() as self._holding:
                self._hold_folder()
                return self._run()
        except KeyboardInterrupt as interrupt:
            raise type(interrupt)(self._so_far()) from None
        except MemoryError as error:
            raise run_folder.out_of_memory(error, self.step, self.saved) from error

    def _run(self) -> Outcome:
        self._take_folder()
        begun = (self.step, time.monotonic())
        message = "\nstopping after this step, then saving; once more to stop at once\n"
        with (
            stopping_on_signals(message if self.show else "", self._so_far) as stopping,
            Progress(self.step, self.show) as progress,
            self._open_metrics(stopping) as metrics,
            closing(self._trackers(progress)) as self._tracked,
        ):
            precompile.show_waiting(progress.compiling)
            self.watching.notice = progress.notice
            self._validate_first(metrics, progress, stopping)
            while not self._is_over() and not stopping():
                self._traced_step(metrics, progress, begun, stopping)
            if stopping():
                self.tracing.event("signal", **{"tinyllama.exit_code": stopping()})
            finished = self._is_over() and self._unvalidated is None
            folder = self.folder / ("final" if finished else run_folder.step_name(self.step))
            is_there = self.saved is not None and self.saved.resolve() == folder.resolve()
            if not is_there or self._saved_step != self.step:
                self.save(folder.name)
        loss, val_loss = (self._last_line.get(name) for name in ("loss", "val_loss"))
        early = self.best.why() if self.best and self._stops_early() else None
        code = 0 if finished else stopping()
        return Outcome(folder, self.step, finished, code, loss, val_loss, early)

    def _is_over(self) -> bool:
        return self.step >= self.total_steps or self._stops_early()

    def _stops_early(self) -> bool:
        """Whether the validation loss has not become lower for as long as early_stopping says."""
        patience = self.config.training.early_stopping
        return patience is not None and self.best is not None and self.best.since >= patience

    def _hold_folder(self) -> None:
        """Keep other processes from training in the run's folder until the run ends."""
        self._holding.enter_context(run_folder.held_alone(self.folder))
        self._held = self.folder.stat()

    def _so_far(self) -> str:
        return run_folder.so_far(self.step, self.saved)

    def _take_folder(self) -> None:
        """Prepare the run's folder: checkpoints after the step that is resumed get another name.
        Raises CheckpointError where a new run finds the checkpoints of another run."""
        if self._resumed is None:
            run_folder.check_holds_none(self.folder)
        else:
            for old, new in run_folder.go_back(self.folder, self._resumed, self.step):
                to_stderr(f"{old} is of a later step: renamed to {new.name}")
        run_folder.write_config(self.folder, self.config)
        run_folder.write_machine(self.folder)
        forget_after(self.folder, self.step)

    @contextmanager
    def _open_metrics(self, stopping: Callable[[], int]) -> Iterator[MetricsLog]:
        """metrics.jsonl, open for the next step. A validation that was interrupted is run first,
        and the line of its step is written again."""
        line, first = self._unvalidated, self.step + 1
        if line is not None:
            line, first = self._validate(line, stopping), self.step
        path, resumed = self.folder / run_folder.METRICS, self._resumed
        is_ours = resumed is not None and resumed.resolve().parent == self.folder.resolve()
        with closing(MetricsLog(path, first, is_expected=is_ours)) as metrics:
            self._metrics = metrics
            if line is not None:
                self._write(metrics, line)
                self._save_best()
            yield metrics

    def _write(self, metrics: MetricsLog, line: dict[str, Any]) -> None:
        if metrics.is_gone():
            self._find_folder_again(metrics)
        metrics.write(line)
        if self._tracked is not None:
            self._tracked.log(line)
        self._last_line = line

    def _trackers(self, progress: Progress) -> Trackers:
        values = {k: v for k, v in self.config.values().items() if v is not None}
        return Trackers(self.config.observe.trackers, self.folder, values, progress.notice)

    def _find_folder_again(self, metrics: MetricsLog) -> None:
        """Go on where somebody removed metrics.jsonl, or the run's folder, while training."""
        if not self.folder.is_dir() or not os.path.samestat(self.folder.stat(), self._held):
            make_folder(self.folder)
            was = self.folder
            try:
                self._hold_folder()
            except CheckpointError:  # another run trains there now
                self.folder = free_name(was)
                make_folder(self.folder)
                self._hold_folder()
            run_folder.write_config(self.folder, self.config)
            self.saved = self.saved if self.saved and self.saved.is_dir() else None
            to_stderr(
                f"{was} was removed while training: the run goes on and saves in {self.folder}, "
                "and what is lost is what was there; to save at once and stop, press Ctrl-C"
            )
        else:
            to_stderr(f"{metrics.path} was removed while training: begun anew")
        metrics.path = self.folder / run_folder.METRICS
        metrics.reopen()

    def _validate_first(
        self, metrics: MetricsLog, progress: Progress, stopping: Callable[[], int]
    ) -> None:
        """With training.eval_first, validate the weights that the run begins with, as step 0."""
        if self.step or self.evaluator is None or not self.config.training.eval_first:
            return
        result = self.evaluator.run(stopping=stopping)
        if result is not None:
            self._check_finite(0, {"validation loss": result.loss})
            metrics.write({"step": 0} | _validated(result))
            progress.before_first_step(result.loss)

    def _place(self) -> Place:
        """Where the run stands in its data, before the next step."""
        t, at = self.config.training, self.batches.state()
        epoch, window = int(at["epoch"]), int(at["window"])
        return Place(self.step, epoch, window, self.batches.n_windows, t.num_epochs, t.max_steps)

    def summary(self) -> str:
        """What is about to be trained, in one line."""
        t, context = self.config.training, self.config.context_length
        trained = sum(p.numel() for p in self.optimizer.parameters.values())
        frozen = parameters(self.config.model).total
        pairs = "2 x " if rows_per_example(self.config) == 2 else ""
        what = f"{trained:,} adapter parameters on {frozen:,} frozen" if self.adapter else None
        return (
            f"{what or f'{trained:,} parameters'}, {self.total_steps:,} steps of "
            f"{t.batch_size} x {pairs}{context} tokens, {t.dtype}"
        )

    def notices(self) -> list[str]:
        """One line for each thing that may be a mistake: options that differ from the resumed
        run's, sizes without effect, text that is both trained and validated on."""
        other = differences(self.config, self._resumed) if self._resumed else None
        lines = without_effect(self.config, self.batches.n_windows, self.total_steps)
        lines += trained_and_validated(self.config)
        lines += self.material.notices
        unused = unused_rows(self.config.model.vocab_size, self.tokenizer)
        return [line for line in (other, lacking.notice(), unused, *lines) if line]

    def _traced_step(
        self,
        metrics: MetricsLog,
        progress: Progress,
        begun: tuple[int, float],
        stopping: Callable[[], int],
    ) -> None:
        """One step, as a span of its epoch."""
        epoch = self.batches.epoch + 1
        if epoch != self._traced_epoch:
            self._traced_epoch = epoch
            self.tracing.epoch(epoch)
        with self.tracing.span("step", **{"tinyllama.step": self.step + 1}):
            self._one_step(metrics, progress, begun, stopping)

    def _one_step(
        self,
        metrics: MetricsLog,
        progress: Progress,
        begun: tuple[int, float],
        stopping: Callable[[], int],
    ) -> None:
        t = self.config.training
        began, at = time.perf_counter(), self.batches.state()
        step, epoch = self.step + 1, self.batches.epoch + 1
        left_out = self.watching.left_out
        with self.tracing.span("data"):
            batch = self.batches.next()
        self.watching.batch(batch)
        lr = learning_rate(step, self.total_steps, t.learning_rate, self.schedule, self.anchor)
        parts = _micro_batches(batch, t.micro_batch * rows_per_example(self.config))
        if not self.config.data.pack:
            parts = [trimmed(part) for part in parts]
        self._waiting.take()
        clock = time.perf_counter()
        guard = (self.watching.limits(), left_out) if self.config.observe.guards_updates else ()
        result = self.train_step(parts, step, lr, *guard)
        seconds = time.perf_counter() - clock
        self.tracing.passes(step, clock, clock + seconds)
        if result.applied:
            seen = {"loss": result.loss, "gradient norm": result.grad_norm, "learning rate": lr}
            self._check_finite(step, seen)
        line: dict[str, Any] = {"step": step} | _finite(loss=result.loss)
        line |= _finite(**result.measures) | {"lr": lr}
        line |= _finite(grad_norm=result.grad_norm)
        line |= {"tokens_per_second": result.tokens / seconds}
        if not (self.batches.is_text and self.config.data.pack):  # each step trains other numbers
            line |= {"trained_tokens": result.tokens}
        line |= {"memory_bytes": memory_in_use_bytes(), "epoch": epoch}
        line |= self._watched(line, result, seconds, clock - began)
        if self._acts(line, metrics, at):
            return
        self.step, self._followed = step, self.saved
        self._shorten(*begun)
        validates = self._validation_is_due(step, epoch)
        try:
            if validates:
                line = self._validate(line, stopping)
        finally:
            self._write(metrics, line)
            self.tracing.metrics(line)
        self._save_best()
        if self.samples.are_due(step, validates):
            self.samples.write(self.folder, step)
        speed, val_loss = line["tokens_per_second"], line.get("val_loss")
        progress.after_step(
            step, self.total_steps, result.loss, speed, val_loss,
            memory_bytes=line["memory_bytes"], flops_share=self._flops_share(parts, seconds),
        )  # fmt: skip
        if step % self.config.checkpointing.save_every == 0 and step < self.total_steps:
            self.save(run_folder.step_name(step))

    def _flops_share(self, parts: Sequence[Rows], seconds: float) -> float | None:
        """The share of the device's measured speed that a step on these micro-batches reached; None
        where nobody measured it (`tinyllama profile` does)."""
        if self._ceiling is None:
            return None
        model, lora = self.config.model, self.config.lora
        sizes = [(part.tokens.size, part.tokens.shape[1]) for part in parts]
        flops = sum(model_flops(model, tokens, length, lora) for tokens, length in sizes)
        return flops / seconds / (self._ceiling * 1e9)

    def _watched(
        self, line: dict[str, Any], result: StepResult, seconds: float, data_seconds: float
    ) -> dict[str, Any]:
        """What a step's line says besides its measurements: anomalies, and the layers' updates."""
        step, every = line["step"], self.config.observe.update_ratio_every
        found = self.watching.numbers(step, result)
        if result.applied and (moved := self.moves.ratio()) is not None:
            found += self.watching.watch.update(step, moved)
        own = max(0.0, seconds - self._waiting.take())  # without what other programs took
        slow = self.watching.machine.step(step, own, data_seconds, line["memory_bytes"])
        more: dict[str, Any] = {}
        if (found or (every and step % every == 0)) and result.applied:
            ratios = update_ratios(self.optimizer, step - self.watching.left_out, line["lr"])
            slow += self.watching.machine.layers(step, ratios)
            more["update_ratios"] = ratios
        layer = greatest(more.get("update_ratios", {}))
        if entries := self.watching.record([*found, *slow], self.watching.action, layer):
            more["anomalies"] = entries
            for entry in entries:
                known = {f"tinyllama.{k}": v for k, v in entry.items() if v is not None}
                self.tracing.event("anomaly", **known)
        if self._rolled_back is not None:
            more["rolled_back"], self._rolled_back = self._rolled_back, None
        return more

    def _acts(self, line: dict[str, Any], metrics: MetricsLog, at: dict[str, Any]) -> bool:
        """Go back or stop where an anomaly of this step leads to that; `at` is the position in the
        data before the step."""
        wanted = {entry["action"] for entry in line.get("anomalies", ())}
        if "rollback" in wanted:
            return self._roll_back(line, metrics)
        if "stop" in wanted:
            self._stop_before(line, metrics, at)
        return False

    def _roll_back(self, line: dict[str, Any], metrics: MetricsLog) -> bool:
        """Take weights, moments and step from the last checkpoint, and go on with the data that
        follows; False where there is no checkpoint yet, so that the update is only left out."""
        folder, step = self.saved, self._saved_step
        if folder is None or not self._holds(folder):
            return False
        times = self.watching.rollbacks.get(str(step), 0) + 1
        if times > MOST_ROLLBACKS:
            raise TrainingError(
                f"step {line['step']}: an anomaly again after going back to {folder} "
                f"{MOST_ROLLBACKS} times, so training stops: it is not the text; a lower "
                "training.learning_rate may help"
            )
        position = self.batches.state()
        self._write(metrics, line)
        if self.adapter is None:
            self.model.read_weights(open_model(folder))
        else:
            read_adapters(self.model, AdapterFolder(folder))
        saving.restore(folder, self.optimizer, self.batches)
        self.train_step.weights_were_written = True
        self.batches.restore(position)
        state = run_folder.read_state(folder)
        self.watching.rollbacks[str(step)] = times
        self.watching.restore(state.get("watching") or {})
        self.moves.look()
        self.step = step
        if self.budget_seconds is None:
            self.planned_steps = self._place().total_steps(self.config.training.batch_size)
            self.total_steps = self.planned_steps
        metrics.go_back(step + 1)
        forget_after(self.folder, step)
        why = [entry for entry in line["anomalies"] if entry["action"] == "rollback"]
        self._rolled_back = {"from": line["step"], "to": step, "anomalies": why}
        return True

    def _holds(self, folder: Path) -> bool:
        """Whether a checkpoint is as it was saved; where it is not, a notice says so."""
        try:
            verify(folder)
        except CheckpointError as error:
            self.watching.notice(f"{folder}: the run does not go back to it\n{error}")
            return False
        return True

    def _stop_before(self, line: dict[str, Any], metrics: MetricsLog, at: dict[str, Any]) -> None:
        """End the run at an anomaly, with a checkpoint of what came before it."""
        self._write(metrics, line)
        first = next(entry for entry in line["anomalies"] if entry["action"] == "stop")
        if first["series"] == "update":  # it was made
            saved = self.saved
        else:
            if first["kind"] == "divergence":
                self.step = line["step"]
            else:
                self.watching.left_out -= 1
                self.batches.restore(at)
            saved = self.save(run_folder.step_name(self.step)) if self.step else None
        shown = f"{saved} holds what came before" if saved else "nothing was trained before"
        raise TrainingError(
            f"step {line['step']}: {first['series']} {_rounded(first['value'])}, the usual is "
            f"{_rounded(first['usual'])}, so training stops as observe.on_anomaly says; {shown}. "
            'To go on without that data: --resume --set observe.on_anomaly="skip"'
        )

    def _validation_is_due(self, step: int, epoch: int) -> bool:
        """Whether the model is validated after `step`, which belonged to `epoch`."""
        every = self.config.training.eval_every
        due = self.batches.epoch + 1 != epoch if every is None else step % every == 0
        return due or step == self.total_steps

    def _validate(self, line: dict[str, Any], stopping: Callable[[], int]) -> dict[str, Any]:
        """The metrics of a step with its validation loss, if there is validation text.

        If a signal interrupts it, the resumed run validates before its first step.
        """
        if self.evaluator is None:
            self._unvalidated = None
            return line
        with self.tracing.span("validate"):
            result = self.evaluator.run(stopping=stopping)
        self._unvalidated = line if result is None else None
        if result is None:
            return line
        self._check_finite(
            line["step"], {"validation loss": result.loss, "learning rate": line["lr"]}
        )
        if self.config.training.early_stopping or self.config.checkpointing.keep_best:
            self.best = better(self.best, line["step"], result.loss)
        return line | _validated(result)

    def _save_best(self) -> None:
        """Save the weights that were just validated as the best, if they are."""
        best = self.best
        if best is not None and (best.step, best.since) == (self.step, 0):
            self.save(BEST)

    def _check_finite(self, step: int, seen: dict[str, float]) -> None:
        """Raise TrainingError, with the numbers in it, if one of them is NaN or infinite."""
        if all(map(math.isfinite, seen.values())):
            return
        numbers = ", ".join(f"{name} {value:.6g}" for name, value in seen.items())
        raise self._broken(step, f"{numbers}: the numbers are no longer finite")

    def _broken(self, step: int, what: str) -> TrainingError:
        """The error that ends a run at a step: what went wrong, and what to try."""
        advice = "A lower training.learning_rate or a longer lr_schedule.warmup_steps may help"
        if self.step == 0:
            advice = "No weight was trained before: look at model.base, the text and training.dtype"
        return TrainingError(
            f"step {step}: {what}, so training stops; {self._last_good()}. {advice}"
        )

    def _last_good(self) -> str:
        """Which checkpoint to go back to: not one whose next step was not finite."""
        if self.saved is None:
            return "nothing was saved"
        good = self._followed
        if good is None or not good.is_dir():
            good = run_folder.older_than(self.saved, self._saved_step)
        if good is None:
            return f"{self.saved} holds the weights that led to them, and there is no earlier one"
        way = f"--resume {shlex.quote(str(good))}"
        if good.resolve().parent != self.folder.resolve():
            way += " with another checkpointing.checkpoint_dir"
        return f"the last good checkpoint is {good} ({way} goes back to it)"

    def _shorten(self, first: int, started: float) -> None:
        """With a time budget, end the schedule at the step that the budget reaches, at the speed
        of the steps since `first`, which ended at `started`."""
        done = self.step - first
        if self.budget_seconds is None or done < 2:
            return
        elapsed = time.monotonic() - started
        left = max(0.0, self.budget_seconds - elapsed) / (elapsed / done)
        self.total_steps = max(self.step, min(self.planned_steps, self.step + int(left)))

    def save(self, name: str) -> Path:
        """Save the run as it stands under `name`. TrainingError if its weights are not finite."""
        with self.tracing.span("save"):
            folder = self._save(name)
            self.tracing.event("checkpoint", **{"tinyllama.folder": str(folder)})
        return folder

    def _save(self, name: str) -> Path:
        if broken := saving.not_finite(self.optimizer.parameters):
            raise self._broken(self.step, f"{broken}: the weights are no longer finite")
        if self._metrics is not None:
            if self._metrics.is_gone():
                self._find_folder_again(self._metrics)
            self._metrics.sync()
        folder, keep = self.folder / name, self.config.checkpointing.keep_last_n
        try:
            saving.save(
                folder, self.model, self.optimizer, self.tokenizer,
                self._state(), keep, self.adapter,
            )  # fmt: skip
        except KeyboardInterrupt:  # the checkpoint may be complete already
            if (
                run_folder.looks_whole(folder)
                and run_folder.read_state(folder)["step"] == self.step
            ):
                self.saved, self._saved_step = folder, self.step
            raise
        self.saved, self._saved_step = folder, self.step
        return folder

    def _state(self) -> dict[str, Any]:
        """What training_state.json holds."""
        parts = self.config.training.micro_batch
        state = {"step": self.step, "data": self.batches.state(), "micro_batch_size": parts}
        state |= {"made_with": made_with(self.config), "watching": self.watching.state()}
        if self.config.lr_schedule.warmup_ratio:
            state["warmup_steps"] = self.schedule.warmup_steps
        if self.best is not None:
            state["best"] = asdict(self.best)
        if self.anchor is not None:
            state["schedule_anchor"] = asdict(self.anchor)
        if self._unvalidated is None:
            return state
        was_last = self.step >= self.total_steps
        return state | {"unvalidated": self._unvalidated, "was_last": was_last}


def _rounded(value: float | None) -> str:
    """A value of an anomaly for people."""
    return "not finite" if value is None else f"{value:.4g}"


def _finite(**values: float) -> dict[str, float]:
    """The values that are finite: JSON has no place for the others."""
    return {name: value for name, value in values.items() if math.isfinite(value)}


def _validated(result: Evaluation | PairEvaluation) -> dict[str, float]:
    """What metrics say of a validation."""
    measures = result.measures if isinstance(result, PairEvaluation) else {}
    return {"val_loss": result.loss} | {f"val_{name}": v for name, v in measures.items()}


def _micro_batches(batch: Rows, size: int) -> list[Rows]:
    """The rows of a batch in parts of `size`."""
    make: Callable[..., Rows] = type(batch)
    starts = range(0, len(batch.tokens), size)
    return [make(*(part[i : i + size] for part in batch)) for i in starts]
