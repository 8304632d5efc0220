"""What training.objective decides besides the loss: the batches, and what they hold more.

    sft       windows of text
    dpo       pairs, and their log-probabilities under the base; with adapters the model computes
              those itself, from the frozen base
    orpo      pairs, and how much each token counts
    distill   windows of text, and the teacher's most likely tokens at each of theirs

The base and the teacher are run once, before the trained model is in memory; what they say is kept
in data.cache_dir, with sums (data/kept.py).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tinygrad import Tensor, dtypes

from tinyllama.config import Config
from tinyllama.data.batches import Batches, Layout, Rows, TokenDataset, text_layout
from tinyllama.data.conversations import Form
from tinyllama.data.corpus import Part
from tinyllama.data.kept import Kept, Kind, Writer, kept, key_of
from tinyllama.data.pairs import PairDataset, ReferencedBatch, prepare_pairs
from tinyllama.errors import ConfigError, naming
from tinyllama.formats.models import open_model
from tinyllama.formats.peft import fingerprint
from tinyllama.model.build import build, load_model, tokenizer_folder
from tinyllama.model.llama import Llama
from tinyllama.runtime.capture import captured
from tinyllama.runtime.storage import Inputs
from tinyllama.system.progress_bar import progress_bar
from tinyllama.tokenizers.opening import open_tokenizer
from tinyllama.tokenizers.tokenizer import Tokenizer
from tinyllama.train.evaluate import Evaluator, PairEvaluator
from tinyllama.train.gradients import StagedLoss
from tinyllama.train.losses import CrossEntropy, Loss
from tinyllama.train.manifest import verify_loaded
from tinyllama.train.preferences import PAIR_OBJECTIVES, loss_of
from tinyllama.train.prepare import texts

Int64 = npt.NDArray[np.int64]


class TeacherBatch(NamedTuple):
    """Text with the teacher's most likely tokens."""

    tokens: npt.NDArray[np.int32]  # (B, T)
    targets: npt.NDArray[np.int32]  # (B, T)
    starts: npt.NDArray[np.int32]  # (B, T)
    ids: npt.NDArray[np.int32]  # (B, T, K)
    logits: npt.NDArray[np.float32]  # (B, T, K)


@dataclass(frozen=True)
class Material:
    """What a run trains and validates on; `notices` are lines about what was left out."""

    batches: Batches
    validation: TokenDataset | Layout | None
    notices: tuple[str, ...] = ()

    def evaluator(self, config: Config, model: Llama) -> Evaluator | PairEvaluator | None:
        """What validates a model on it."""
        part = config.training.micro_batch
        if self.validation is None:
            return None
        if isinstance(self.validation, TokenDataset):
            return Evaluator(model, self.validation, config.context_length, part)
        return PairEvaluator(model, validation_loss(config), self.validation, part)


def rows_per_example(config: Config) -> int:
    """Rows of a batch for each of training.batch_size."""
    return 2 if config.training.objective in PAIR_OBJECTIVES else 1


def validation_loss(config: Config) -> Loss:
    """What validation measures: of text the plain cross entropy, whatever is trained."""
    is_pairs = config.training.objective in PAIR_OBJECTIVES
    return loss_of(config) if is_pairs else CrossEntropy()


def blank_batch(config: Config, length: int | None = None) -> list[Tensor]:
    """The tensors of a micro-batch, without memory: for planning a run. `length`: of its rows, if
    not the context's."""
    t, objective = config.training, config.training.objective
    rows, T = t.micro_batch * rows_per_example(config), length or config.context_length
    batch = [Tensor.empty(rows, T, dtype=dtypes.int32) for _ in range(3)]
    if objective == "orpo":
        return [*batch, Tensor.empty(rows, T), Tensor.empty(rows, T)]
    if objective == "dpo" and config.lora is None:
        return [*batch, Tensor.empty(rows)]
    if objective == "distill":
        shape = (rows, T, _kept_tokens(config))
        return [*batch, Tensor.empty(*shape, dtype=dtypes.int32), Tensor.empty(*shape)]
    return batch


def find_material(config: Config, tokenizer: Tokenizer, show: bool) -> Material:
    """Read, or compute, all that a run trains and validates on.

    Raises DataError for what cannot be read, ConfigError for a teacher of another vocabulary.
    """
    if config.training.objective in PAIR_OBJECTIVES:
        return _pair_material(config, tokenizer, show)
    t, pack, T = config.training, config.data.pack, config.context_length
    train, val = texts(config, tokenizer, show)
    layout = text_layout(train, T, pack)
    notices = tuple(layout.notices())
    if t.objective == "distill":
        layout = WithTeacher(layout, _teacher(config, train, layout, tokenizer, show))
    if t.objective != "distill":
        return Material(Batches(train, T, t.batch_size, t.seed, pack=pack), val, notices)
    return Material(Batches(train, T, t.batch_size, t.seed, pack=pack, layout=layout), val, notices)


# ---- pairs


def _pair_material(config: Config, tokenizer: Tokenizer, show: bool) -> Material:
    t, data, T = config.training, config.data, config.context_length

    def read(paths: Any, part: Part | None = None) -> PairDataset:
        form = Form(data.template, "last" if data.train_on == "last" else None)  # never a prompt
        return prepare_pairs(
            paths, tokenizer, data.cache_dir, T, form=form, part=part, progress=show
        )

    share = data.val_fraction
    train = read(data.train_path, None if share is None else Part(share, rest=True))
    layout = _pair_layout(config, train, show)
    batches = Batches(train, T, t.batch_size, t.seed, pack=data.pack, layout=layout)
    if share is not None:
        val = read(data.train_path, Part(share, rest=False))
    elif data.val_path is not None:
        val = read(data.val_path)
    else:
        return Material(batches, None, tuple(train.notices()))
    notices = (*train.notices(), *val.notices())
    return Material(batches, _pair_layout(config, val, show), notices)


def _pair_layout(config: Config, pairs: PairDataset, show: bool) -> Layout:
    if config.training.objective == "orpo":
        return WithOdds(pairs)
    return pairs if config.lora else WithReference(pairs, _reference(config, pairs, show))


@dataclass(frozen=True)
class WithOdds:
    """Pairs for ORPO: a Layout."""

    pairs: PairDataset

    @property
    def n_rows(self) -> int:
        """See Layout."""
        return self.pairs.n_rows

    def batch(self, rows: Int64, batch_size: int) -> Rows:
        """See Layout."""
        return self.pairs.odds_batch(rows, batch_size)

    def documents(self, rows: Int64) -> Int64:
        """See Layout."""
        return self.pairs.documents(rows)

    def notices(self) -> list[str]:
        """See Layout."""
        return self.pairs.notices()


@dataclass(frozen=True)
class WithReference:
    """Pairs, and the log-probabilities of their answers under the base: a Layout."""

    pairs: PairDataset
    reference: Kept

    @property
    def n_rows(self) -> int:
        """See Layout."""
        return self.pairs.n_rows

    def batch(self, rows: Int64, batch_size: int) -> Rows:
        """See Layout."""
        known = np.zeros(2 * batch_size, np.float32)
        known[: 2 * len(rows)] = self.reference.arrays["reference"][rows].reshape(-1)
        return ReferencedBatch(*self.pairs.batch(rows, batch_size), known)

    def documents(self, rows: Int64) -> Int64:
        """See Layout."""
        return self.pairs.documents(rows)

    def notices(self) -> list[str]:
        """See Layout."""
        return self.pairs.notices()


def _reference(config: Config, pairs: PairDataset, show: bool) -> Kept:
    """The log-probabilities (pairs, 2) of answers under the base, float32."""
    t, base = config.training, config.model.base
    assert base is not None
    with naming("model.base"):
        print_of_base = fingerprint(open_model(base))
    sizes = repr(replace(config.model, base=None))
    key = key_of("reference", pairs.path.name, pairs.context_length, print_of_base, sizes, t.dtype)
    kinds = {"reference": Kind("float32", 2)}

    def make(write: Writer) -> dict[str, int]:
        plain = replace(t, objective="sft", neftune_alpha=0.0)
        staged = StagedLoss(build(replace(config, lora=None, qlora=None, training=plain)).model)
        run, inputs, part = captured(staged.log_probabilities), Inputs(), t.micro_batch
        count = pairs.n_rows
        for first in _progress(range(0, count, part), "Reference", show):
            numbers = np.arange(first, min(first + part, count))
            found = run(*inputs(*pairs.batch(numbers, part))).numpy()
            write("reference", found[: 2 * len(numbers)])
        return {}

    return kept(Path(config.data.cache_dir), key, kinds, make)


# ---- a teacher


@dataclass(frozen=True)
class WithTeacher:
    """Rows of text with the teacher's most likely tokens: a Layout."""

    text: Layout
    teacher: Kept

    @property
    def n_rows(self) -> int:
        """See Layout."""
        return self.text.n_rows

    def batch(self, rows: Int64, batch_size: int) -> Rows:
        """See Layout."""
        batch, arrays = self.text.batch(rows, batch_size), self.teacher.arrays
        ids, logits = (_of_rows(arrays[name], rows, batch) for name in ("ids", "logits"))
        tokens, targets, starts = batch
        return TeacherBatch(
            tokens, targets, starts, ids.astype(np.int32), logits.astype(np.float32)
        )

    def documents(self, rows: Int64) -> Int64:
        """See Layout."""
        return self.text.documents(rows)

    def notices(self) -> list[str]:
        """See Layout."""
        return self.text.notices()


def _of_rows(array: npt.NDArray[Any], rows: Int64, batch: Rows) -> npt.NDArray[Any]:
    """What belongs to rows of `array`, one line per token: (B, T, K). In rows that only fill the
    batch the ids are 0 to K - 1, since they must differ."""
    (B, T), K = batch.tokens.shape, array.shape[1]
    found = np.empty((B, T, K), array.dtype)
    found[:] = np.arange(K)
    for place, row in zip(found, rows, strict=False):
        place[:] = array[row * T : (row + 1) * T]
    return found


def _kept_tokens(config: Config) -> int:
    return min(config.distillation.top_k, config.model.vocab_size)


def _teacher(
    config: Config, text: TokenDataset, layout: Layout, tokenizer: Tokenizer, show: bool
) -> Kept:
    """Ids and logits (tokens, K) of the teacher's most likely tokens, in every row."""
    path, T, rows = config.distillation.teacher, config.context_length, config.model.vocab_size
    assert path is not None
    with naming("distillation.teacher"):
        source = open_model(path)
        verify_loaded(source.path)
        own = open_tokenizer(tokenizer_folder(source.path))
        print_of_teacher = fingerprint(source)
    if own.vocabulary_digest != tokenizer.vocabulary_digest:
        raise ConfigError(
            f"{config.where('distillation.teacher')}: got {path}, must be a model of the same "
            "vocabulary: its tokenizer has other pieces or ids than the run's"
        )
    K = min(_kept_tokens(config), source.config.vocab_size)
    if K < _kept_tokens(config):
        raise ConfigError(
            f"{config.where('distillation.top_k')}: got {config.distillation.top_k}, must be at "
            f"most the teacher's {source.config.vocab_size} tokens"
        )
    if T > source.config.max_seq_len:
        raise ConfigError(
            f"{config.where('data.context_length')}: got {T}, must be at most the teacher's "
            f"{source.config.max_seq_len} tokens (max_position_embeddings of {path})"
        )
    key = key_of("teacher", text.path.name, T, config.data.pack, K, rows, print_of_teacher)
    id_type = "uint16" if rows <= 1 << 16 else "uint32"
    kinds = {"ids": Kind(id_type, K, rows), "logits": Kind("float32", K)}

    def make(write: Writer) -> dict[str, int]:
        model, inputs = load_model(source.path), Inputs()
        run = captured(partial(_logits, model))
        for row in _progress(range(layout.n_rows), "Teacher", show):
            batch = layout.batch(np.array([row]), 1)
            logits = run(*inputs(batch.tokens, batch.starts)).numpy()[:, :rows]  # (T, vocab)
            ids = np.argpartition(-logits, K - 1, axis=1)[:, :K]
            best = np.take_along_axis(logits, ids, 1)
            order = np.argsort(-best, axis=1, kind="stable")
            write("ids", np.take_along_axis(ids, order, 1))
            write("logits", np.take_along_axis(best, order, 1))
        return {}

    return kept(Path(config.data.cache_dir), key, kinds, make)


def _logits(model: Llama, tokens: Tensor, starts: Tensor) -> Tensor:
    """tokens, starts (1, T) -> logits (T, vocab) float32."""
    return model.head(model.hidden(tokens, starts))[0].contiguous().realize()


def _progress(items: range, what: str, show: bool) -> Iterator[int]:
    with progress_bar(len(items), what, "batch", shown=show) as bar:
        for item in items:
            yield item
            bar.update()
