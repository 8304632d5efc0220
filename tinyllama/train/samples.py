"""Text that the model writes while it is trained: samples.jsonl in the run's folder.

Each prompt of observe.sample_prompts is continued with a seed that stays, so that samples differ by
what the model has learned. Training's own numbers do not change: nothing it reads is written.
"""

import io
import json
import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import msgspec

from tinyllama.config import Config
from tinyllama.errors import CheckpointError, ConfigError, reason
from tinyllama.generate.generator import Generator, Sampling
from tinyllama.model.llama import Llama
from tinyllama.system.files import append_regular, atomic_write, free_name, read_file
from tinyllama.system.notices import to_stderr
from tinyllama.system.untrusted import parse_json
from tinyllama.tokenizers.tokenizer import Tokenizer

SAMPLES = "samples.jsonl"
_MOST_BYTES = 32 << 20
_MOST_SHOWN = 1000  # of the newest


class Sample(msgspec.Struct):
    """What a model wrote after so many steps."""

    step: Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]
    prompt: str
    text: str


class Samples:
    """Writes the samples of a run; its graphs are compiled when the first one is due."""

    def __init__(self, config: Config, model: Llama, tokenizer: Tokenizer) -> None:
        """Raises ConfigError for a prompt that does not fit the model's context."""
        self._config, self._model, self._tokenizer = config.observe, model, tokenizer
        self._generator: Generator | None = None
        prompts = config.observe.sample_prompts
        self._prompts = {p: [*tokenizer.begin, *tokenizer.encode(p, special=True)] for p in prompts}
        longest = max(map(len, self._prompts.values()), default=0)
        self._length = longest + config.observe.sample_tokens
        if longest and self._length > model.config.max_seq_len:
            raise ConfigError(
                f"observe.sample_prompts: got {longest} tokens and observe.sample_tokens = "
                f"{config.observe.sample_tokens}, must be at most model.max_seq_len together, which"
                f" is {model.config.max_seq_len}"
            )

    def are_due(self, step: int, validates: bool) -> bool:
        """Whether samples are written after a step, at which the run validates or not."""
        every = self._config.sample_every
        return bool(self._prompts) and (validates if every is None else step % every == 0)

    def write(self, folder: Path, step: int) -> list[Sample]:
        """Append a sample per prompt to the file in `folder`. Raises OSError."""
        if self._generator is None:
            self._generator = Generator(self._model, self._length, self._tokenizer.vocab_size)
        samples = [
            Sample(step, prompt, self._continued(self._generator, ids))
            for prompt, ids in self._prompts.items()
        ]
        with append_regular(folder / SAMPLES) as file:
            file.writelines(json.dumps(msgspec.to_builtins(sample)) + "\n" for sample in samples)
        return samples

    def _continued(self, generator: Generator, prompt: list[int]) -> str:
        stop = self._tokenizer.eos_ids
        ids = generator.tokens(prompt, self._config.sample_tokens, Sampling(), stop=stop)
        return self._tokenizer.decode([*prompt, *ids])


def read_samples(folder: Path) -> list[Sample]:
    """The last samples of a run's folder, without a last line that a kill cut short; none without a
    file. Raises CheckpointError."""
    path = folder / SAMPLES
    source = f"{path}: not a file of samples"
    try:
        parsed = (parse_json(line, Sample, CheckpointError, source) for line in _lines(path))
        return [*deque(parsed, _MOST_SHOWN)]
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {reason(error)}") from error


def forget_after(folder: Path, step: int) -> None:
    """Remove the samples of later steps, which a run that goes back writes again.

    What a disk did to the file does not keep a run from going on: damaged lines are left out, and
    the file that held them gets another name, which standard error says. Raises OSError.
    """
    path = folder / SAMPLES
    if not os.path.lexists(path):
        return
    kept, wrong = bytearray(), None
    try:
        for line in _lines(path):
            try:
                is_kept = parse_json(line, Sample, CheckpointError, "").step <= step
            except CheckpointError:
                wrong, is_kept = "damaged lines are left out", False
            kept += line if is_kept else b""
    except OSError as error:
        wrong = f"cannot be read: {reason(error)}"
    if wrong is not None:
        aside = free_name(path)
        os.rename(path, aside)
        to_stderr(f"{path}: {wrong}; the file as it was is now {aside.name}")
    atomic_write(path, bytes(kept), links=False)


def _lines(path: Path) -> Iterator[bytes]:
    """The whole lines of a file that is no link; none without a file. Raises OSError."""
    if os.path.lexists(path):
        lines = io.BytesIO(read_file(path, _MOST_BYTES, links=False))
        yield from (line for line in lines if line.endswith(b"\n"))
