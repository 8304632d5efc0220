"""Text that the model writes while it is trained: samples.jsonl in the run's folder.

Each prompt of observe.sample_prompts is continued with a seed that stays, so that samples differ by
what the model has learned. Training's own numbers do not change: nothing it reads is written.
"""

import json
from pathlib import Path

import msgspec

from tinyllama.config import Config
from tinyllama.errors import ConfigError
from tinyllama.generate.generator import Generator, Sampling
from tinyllama.model.llama import Llama
from tinyllama.observe.samples import SAMPLES, Sample
from tinyllama.system.files import append_regular
from tinyllama.tokenizers.tokenizer import Tokenizer


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
