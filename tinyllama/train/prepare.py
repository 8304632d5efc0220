"""What a run starts from: the checkpoint it resumes, its base's sizes, its tokenizer."""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from tinyllama.config import Config, RopeScaling
from tinyllama.config.options import got, shown, to_toml
from tinyllama.data.conversations import Form
from tinyllama.data.corpus import Part, TokenDataset, prepare
from tinyllama.data.files import Source, content_digests, find_sources, read_texts
from tinyllama.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    TokenizerError,
    naming,
    reason,
)
from tinyllama.formats.models import local_path, open_model
from tinyllama.system import device
from tinyllama.system.files import atomic_write, make_folder, read_file
from tinyllama.system.notices import to_stderr
from tinyllama.system.untrusted import printable
from tinyllama.tokenizers.files import MODEL_FILE, TEMPLATE_FILE
from tinyllama.tokenizers.opening import from_files, holds_tokenizer, open_tokenizer
from tinyllama.tokenizers.sentencepiece import TRAINING, SentencePieceTokenizer, train_tokenizer
from tinyllama.tokenizers.templates import portable_template
from tinyllama.tokenizers.tokenizer import Tokenizer
from tinyllama.train import run_folder
from tinyllama.train.checkpoint import latest_valid, list_checkpoints, verify
from tinyllama.train.manifest import verify_loaded, verify_tokenizer

_MOST_TOKENIZER_BYTES = 64 << 20
_MOST_DIFFERENCES = 40  # that are named


def check_fresh(config: Config) -> None:
    """Raise CheckpointError if a new run's folder holds checkpoints or another run is in it."""
    folder = Path(config.checkpointing.checkpoint_dir)
    run_folder.clean_up(folder)
    run_folder.check_holds_none(folder)


def check_files(config: Config) -> None:
    """Raise DataError if a text is missing, CheckpointError if the run's folder is not writable."""
    with naming("data.train_path"):
        find_sources(config.data.train_path)
    if config.data.val_path is not None:
        find_validation(config.data.val_path)
    folder = Path(config.checkpointing.checkpoint_dir)
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        with TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise CheckpointError(
            f"checkpointing.checkpoint_dir: {folder} cannot be written: {reason(error)}"
        ) from error


def find_validation(paths: str | Sequence[str]) -> None:
    """Raise DataError, with what to do about it, if there is no validation text."""
    try:
        find_sources(paths)
    except DataError as error:
        raise DataError(
            f"{error} (data.val_path names it; --set data.val_path=none trains without validation)"
        ) from None


def supported(config: Config) -> Config:
    """The same configuration. Raises ConfigError naming options that are not supported yet."""
    if config.lora is not None and config.model.base is None:
        raise ConfigError(
            "[lora]: adapters are trained on a checkpoint: name its folder with model.base in the "
            "file or --set model.base=DIR, or remove the section to train a whole model"
        )
    t, data = config.training, config.data
    if config.lora is not None and data.replace_tokenizer:
        raise ConfigError(
            f"{config.where('data.replace_tokenizer')}: got true, must be false with [lora]: "
            "adapters leave the base's embeddings, and so its tokens, as they are"
        )
    if t.objective == "dpo" and config.model.base is None:
        raise ConfigError(
            f'{config.where("training.objective")}: got "dpo", must come with model.base: the '
            "model that answers are compared with is the one that training begins with"
        )
    problems = [
        f"{config.where(key)}: {got(value, f'{shown(only)} for now')}"
        for key, value, only in (
            ("training.devices", t.devices, 1),
            ("training.beam", t.beam, 0),
        )
        if value != only
    ]
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def without_effect(config: Config, sequences: int, steps: int) -> list[str]:
    """One line for each size that a run of so many steps and sequences of text never reaches."""
    t, warmup, lines = config.training, config.lr_schedule.warmup_steps, []
    if t.batch_size > sequences:
        lines.append(
            f"training.batch_size is {t.batch_size}, and the text fills {sequences} sequences: the"
            " rest of each batch is empty"
        )
    if warmup > steps:
        lines.append(
            f"lr_schedule.warmup_steps is {warmup}, and the run has {steps} steps: the learning"
            f" rate rises to {t.learning_rate * steps / warmup:.2g} only"
        )
    return lines


# Options that change no loss of a step, or are compared elsewhere (the text and its tokenizer by a
# digest). The others count, those of [data] included: which tokens are trained, for one.
_FREE_OF_NUMBERS = (
    "checkpointing.",
    "model.base",
    "training.eval_",
    "training.early_stopping",
    "data.train_path",
    "data.val_path",
    "data.context_length",
    "data.tokenizer",
    "data.replace_tokenizer",
    "data.cache_dir",
    "data.val_fraction",
    "observe.otlp_",
    "observe.update_ratio_every",
    "observe.trackers",
    "observe.sample_",
)
_MICRO_BATCH, _BATCH = "training.micro_batch_size", "training.batch_size"


def trained_and_validated(config: Config) -> list[str]:
    """One line for each validation file whose content is also that of a training file."""
    if config.data.val_path is None:
        return []
    cache = Path(config.data.cache_dir)
    train, val = (find_sources(paths) for paths in (config.data.train_path, config.data.val_path))
    trained = dict(zip(content_digests(train, cache), train, strict=True))
    return [
        f"{config.where('data.val_path')}: {source.path} is also trained on"
        f"{_as_another_file(source, trained[digest])}, so its validation loss says nothing about"
        " new text"
        for digest, source in zip(content_digests(val, cache), val, strict=True)
        if digest in trained and source.size_bytes
    ]


def _as_another_file(validated: Source, trained: Source) -> str:
    return "" if validated.path == trained.path else f" (as {trained.path})"


def resume_folder(config: Config, wanted: str, warn: Callable[[str], None]) -> Path:
    """The checkpoint that `--resume` names, verified: a folder, or "latest" for the newest one in
    the run's folder. What a killed run left there is cleaned up first.

    Raises CheckpointError, also where the run's folder belongs to another run or process.
    """
    root = Path(config.checkpointing.checkpoint_dir)
    run_folder.clean_up(root)
    if wanted == "latest":
        folder = latest_valid(root, warn)
        if folder is None:
            raise CheckpointError(
                f"{root}: holds no checkpoint to resume from; without --resume the run begins"
            )
        return folder
    folder = Path(wanted)
    if not folder.is_dir():
        raise CheckpointError(f"--resume {wanted}: no such folder")
    if inside := list_checkpoints(folder):
        raise CheckpointError(
            f"--resume {wanted}: is no checkpoint but holds some; its newest is {inside[-1]}"
        )
    verify(folder)
    if folder.resolve() not in [path.resolve() for path in list_checkpoints(root)]:
        run_folder.check_holds_none(root)
    return folder


def with_base(config: Config, notice: Callable[[str], None] = lambda line: None) -> Config:
    """The configuration with the sizes of `model.base`, if there is one.

    `notice` is called with a line for each value of the base that the configuration overrides.
    Raises CheckpointError where the base is a checkpoint of ours whose sums do not hold.
    """
    if config.model.base is None:
        return config
    with naming("model.base"):
        folder = open_model(config.model.base)
        verify_loaded(folder.path)
    source = str(folder.path / "config.json")
    config = config.with_base(folder.config, source)
    if folder.path != Path(str(config.model.base)):  # what a name on the hub stands for
        config = replace(config, model=replace(config.model, base=str(folder.path)))
    for line in config.overridden(folder.config, source):
        notice(line)
    return config


def with_micro_batch_of(checkpoint: Path, config: Config) -> Config:
    """The configuration with the micro-batch of a checkpoint, if none is set.

    What fits into memory may have changed, and with another micro-batch sums round differently.
    """
    t, saved = config.training, run_folder.micro_batch_size(checkpoint)
    if t.micro_batch_size is not None or saved is None or t.batch_size % saved:
        return config
    return replace(config, training=replace(t, micro_batch_size=saved))


def made_with(config: Config) -> dict[str, Any]:
    """What decides the losses of a run besides text and weights: options, device, threads."""
    from tinygrad import Device  # takes a while: what is wrong with the files is said before

    options = {k: v for k, v in config.values().items() if not k.startswith(_FREE_OF_NUMBERS)}
    options[_MICRO_BATCH] = config.training.micro_batch
    values = options | {"device": Device.DEFAULT, "threads": device.threads()}
    return {k: _as_json(v) for k, v in values.items()}


def _as_json(value: Any) -> Any:
    """The value of an option as the state's JSON gives it back."""
    if isinstance(value, RopeScaling):
        return to_toml(value)
    return list(value) if isinstance(value, tuple) else value


def differences(config: Config, checkpoint: Path) -> str | None:
    """How a checkpoint's training differs from what this configuration would do, in one line."""
    saved, now = run_folder.read_state(checkpoint).get("made_with"), made_with(config)
    if saved is None:
        return None
    was = {**_defaults(), **saved}
    if was[_MICRO_BATCH] is None:  # as older checkpoints have it
        was[_MICRO_BATCH] = was[_BATCH]
    if now["data.train_on"] is None and was["data.train_on"] == "all":
        was["data.train_on"] = None  # the default while every row was a text
    differing = {key for key in was.keys() | now.keys() if was.get(key) != now.get(key)}
    if all(made[_MICRO_BATCH] == made[_BATCH] for made in (was, now)):
        differing.discard(_MICRO_BATCH)  # the whole batch, then and now
    changes = [
        f"{printable(key)} is {shown(now.get(key))}, was {shown(was.get(key))}"
        for key in sorted(differing)[:_MOST_DIFFERENCES]
    ]
    if (more := len(differing) - len(changes)) > 0:
        changes.append(f"and {more} more")
    begin = f"{checkpoint} was trained with other options, so the losses are not those of a run"
    return f"{begin} that was never stopped: {'; '.join(changes)}" if changes else None


def _defaults() -> dict[str, Any]:
    """The defaults, which stand for options that did not exist when a checkpoint was saved."""
    return {k: v for k, v in made_with(Config()).items() if k not in ("device", "threads")}


def find_tokenizer(config: Config, resume: Path | None, show: bool) -> Tokenizer:
    """The run's tokenizer: the checkpoint's, a file, or one trained on the training text.

    Raises ConfigError if its vocabulary is larger than the model's, or differs from the base's.
    """
    tokenizer = _tokenizer_of(resume, config) if resume else _new_tokenizer(config, show)
    if resume is None or config.lora is not None:
        _check_against_base(config, tokenizer)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"{config.where('model.vocab_size')}: got {config.model.vocab_size}, must be at least"
            f" the tokenizer's {tokenizer.vocab_size} ({config.tokenizer_source})"
        )
    if config.data.template is not None and tokenizer.chat_template is None:
        return with_template(tokenizer, config.data.template)
    return tokenizer


def with_template(tokenizer: Tokenizer, name: str) -> Tokenizer:
    """The tokenizer with a template of ours, which the run's checkpoints then hold: whoever talks
    to the model writes what it was trained on."""
    template = portable_template(name, tokenizer).encode()
    return from_files({**tokenizer.sources, TEMPLATE_FILE: template}, "data.template")


def texts(
    config: Config, tokenizer: Tokenizer, show: bool, make: bool = True
) -> tuple[TokenDataset, TokenDataset | None]:
    """The training text as tokens, and the validation text if there is any. Without `make` they
    must be in the cache; else DataError."""
    data = config.data
    read = partial(
        prepare,
        tokenizer=tokenizer,
        cache_dir=data.cache_dir,
        special_tokens=data.special_tokens,
        form=Form(data.template, data.train_on),
        progress=show,
        make=make,
    )
    if data.val_fraction is not None:
        parts = (Part(data.val_fraction, rest) for rest in (True, False))
        train, val = (read(data.train_path, part=part) for part in parts)
        return train, val
    return read(data.train_path), None if data.val_path is None else read(data.val_path)


def unused_rows(vocab_size: int, tokenizer: Tokenizer) -> str | None:
    """A line about embeddings that belong to no piece of the tokenizer, if there are such."""
    rows = vocab_size - tokenizer.vocab_size
    if rows < 1:
        return None
    return (
        f"the model has {vocab_size} rows of embeddings and the tokenizer {tokenizer.vocab_size}"
        f" pieces: the last {rows} stand for no text"
    )


def _check_against_base(config: Config, tokenizer: Tokenizer) -> None:
    """Raise ConfigError if a base's embeddings are not those of the tokenizer's pieces."""
    base = config.model.base
    if base is None or config.data.replace_tokenizer or not holds_tokenizer(base):
        return
    with naming("model.base"):
        own = open_tokenizer(base)
    if tokenizer.vocabulary_digest not in (own.vocabulary_digest, *own.older_digests):
        raise ConfigError(
            f"{config.where('data.tokenizer')}: got a tokenizer ({config.tokenizer_source}) whose "
            f"pieces or ids differ from those of model.base ({base}), must be the base's own, "
            "which its embeddings were trained with: --set data.tokenizer=none uses that; to train "
            "the whole model on another tokenizer, set data.replace_tokenizer = true"
        )


def _new_tokenizer(config: Config, show: bool) -> Tokenizer:
    if config.tokenizer_source != "train":
        with naming("data.tokenizer" if config.data.tokenizer else "model.base"):
            place = local_path(config.tokenizer_source)
            verify_tokenizer(place)
            return open_tokenizer(place)
    sources = find_sources(config.data.train_path)
    cache = Path(config.data.cache_dir)
    made_of = [f"{TRAINING} {config.tokenizer_vocab_size}", *content_digests(sources, cache)]
    digest = hashlib.sha256("\n".join(made_of).encode()).hexdigest()[:32]
    file = cache / f"tokenizer-{digest}" / MODEL_FILE
    if (kept := _kept_tokenizer(file)) is not None:
        return kept
    what = f"data.tokenizer_vocab_size, for a tokenizer of {config.data.train_path}"
    with naming(what, TokenizerError):  # an error in the texts names its own place
        texts = read_texts(sources, progress=show)
        tokenizer = train_tokenizer(texts, config.tokenizer_vocab_size)
    make_folder(cache, 0o700)
    make_folder(file.parent)
    atomic_write(file, tokenizer.model, links=False)
    atomic_write(_sum_file(file), f"{tokenizer.fingerprint}\n".encode(), links=False)
    return tokenizer


def _kept_tokenizer(file: Path) -> Tokenizer | None:
    """The tokenizer that was trained before; None if there is none or its sum does not hold: the
    same texts give the same one again."""
    if not os.path.lexists(file):
        return None
    try:
        model = read_file(file, _MOST_TOKENIZER_BYTES, links=False)
        said = read_file(_sum_file(file), 100, links=False)
        if said == f"{hashlib.sha256(model).hexdigest()}\n".encode():
            return SentencePieceTokenizer(model, str(file))
        why = "damaged: its sum does not hold"
    except (OSError, TokenizerError) as error:
        why = reason(error) if isinstance(error, OSError) else "damaged"
    to_stderr(f"{file}: {why}; the tokenizer is trained again")
    return None


def _sum_file(file: Path) -> Path:
    return file.with_name(f"{file.name}.sha256")


def _same(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether two are the same; checkpoints of earlier versions hold a tokenizer.model alone."""
    models = {tokenizer.sources.get(MODEL_FILE) for tokenizer in (one, other)}
    return one.fingerprint == other.fingerprint or (len(models) == 1 and models != {None})


def _tokenizer_of(checkpoint: Path, config: Config) -> Tokenizer:
    """A checkpoint's tokenizer. Raises ConfigError if the configuration names another one."""
    tokenizer, data = open_tokenizer(checkpoint), config.data
    size = data.tokenizer_vocab_size
    if data.tokenizer not in (None, "train"):
        with naming("data.tokenizer"):
            same = _same(open_tokenizer(data.tokenizer), tokenizer)
        if not same:
            raise ConfigError(
                f"data.tokenizer: {data.tokenizer} is not the tokenizer of {checkpoint}, which a"
                " resumed run must keep"
            )
    elif config.tokenizer_source == "train" and size not in (None, tokenizer.vocab_size):
        raise ConfigError(
            f"data.tokenizer_vocab_size: got {size}, must be {tokenizer.vocab_size} as in "
            f"{checkpoint}"
        )
    return tokenizer
