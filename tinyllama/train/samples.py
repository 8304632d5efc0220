"""Text that the model writes while it is trained: samples.jsonl in the run's folder.

Each prompt of observe.sample_prompts is continued with a seed that stays, so that samples differ by
what the model has learned. Training's own numbers do not change: nothing it reads is written.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import msgspec

from tinyllama.config import Config
from tinyllama.errors import CheckpointError, ConfigError
from tinyllama.generate.generator import Generator, Sampling
from tinyllama.model.llama import Llama
from tinyllama.system.files import atomic_write
from tinyllama.system.untrusted import parse_json
from tinyllama.tokenizers.tokenizer import Tokenizer

SAMPLES = "samples.jsonl"
_MOST_BYTES = 64 << 20


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
        with open(folder / SAMPLES, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(msgspec.to_builtins(sample)) + "\n" for sample in samples)
        return samples

    def _continued(self, generator: Generator, prompt: list[int]) -> str:
        stop = self._tokenizer.eos_ids
        ids = generator.tokens(prompt, self._config.sample_tokens, Sampling(), stop=stop)
        return self._tokenizer.decode([*prompt, *ids])


def read_samples(folder: Path) -> list[Sample]:
    """The samples of a run's folder, without a last line that a kill cut short; none without a
    file. Raises CheckpointError."""
    path = folder / SAMPLES
    if not path.is_file():
        return []
    if path.stat().st_size > _MOST_BYTES:
        raise CheckpointError(f"{path}: larger than {_MOST_BYTES >> 20} MiB, so not ours")
    *lines, _ = path.read_bytes().split(b"\n")
    source = f"{path}: not a file of samples"
    return [parse_json(line, Sample, CheckpointError, source) for line in lines]


def forget_after(folder: Path, step: int) -> None:
    """Remove the samples of later steps, which a run that goes back writes again."""
    path = folder / SAMPLES
    if path.is_file():
        kept: list[dict[str, Any]] = [
            msgspec.to_builtins(sample) for sample in read_samples(folder) if sample.step <= step
        ]
        atomic_write(path, "".join(json.dumps(sample) + "\n" for sample in kept).encode())
