"""Models as EleutherAI's lm-evaluation-harness asks them (package lm_eval, extra lm-eval).

    loglikelihood           ln p of a continuation, and whether each of its tokens is the likeliest
    loglikelihood_rolling   ln p of a whole text, in windows of the context
    generate_until          an answer up to a stop string

Texts become ids as lm_eval's own models make them of it, so that results can be compared. What two
requests have in common, such as the question before each choice, is computed once.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from tinyllama.errors import ConfigError
from tinyllama.generate.completion import Completion, log_softmax
from tinyllama.generate.conversation import chat_template
from tinyllama.generate.generator import Generator
from tinyllama.generate.sampling import Sampling
from tinyllama.model.llama import Llama
from tinyllama.tokenizers.tokenizer import Tokenizer

# What gen_kwargs of a task may hold, besides lm_eval's own: our names of it.
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")

# (context, continuation) as text, and the ids of both.
TokenRequest = tuple[tuple[str, str] | None, list[int], list[int]]


class HarnessModel(TemplateLM):  # type: ignore[misc]  # lm_eval is untyped
    """A model of ours for lm_eval, one text at a time."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        model: Llama,
        name: str,
        length: int,
        template: str | None = None,
    ) -> None:
        """`length` bounds the tokens of a text; `template` is one of templates.NAMED, by default
        the model's own. Raises ConfigError for one that does not exist."""
        super().__init__()
        self.tokenizer, self.max_length = tokenizer, length
        self._generator, self._name = Generator(model, length), name
        has_template = template is not None or tokenizer.chat_template is not None
        self._template = chat_template(tokenizer, template) if has_template else None

    # ---- texts and ids

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The id that stands before a text without a context."""
        begin = self.tokenizer.bos_id
        return self.eot_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        """A name for lm_eval's caches."""
        return self._name.replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Ids of a text, in which special tokens are found; behind those that begin a text unless
        add_special_tokens is false, or the text begins with them."""
        ids = list(self.tokenizer.encode(string, special=True))
        begin = list(self.tokenizer.begin)
        if add_special_tokens is None and ids[: len(begin)] == begin:
            return ids
        return ids if add_special_tokens is False else [*begin, *ids]

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The source of the template that `apply_chat_template` uses."""
        if chat_template is False or self._template is None:
            return None
        return self._template.source

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of messages, up to where the answer begins; without add_generation_prompt up to
        the end of the last message, which the answer continues. Raises ConfigError where there is
        no template, and DataError where it refuses the messages."""
        if self._template is None:
            raise ConfigError("the model has no chat template: name one, template=chatml")
        text = self._template.render(chat_history, prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()
        return text[: text.rindex(last) + len(last)]

    # ---- what lm_eval wants to know

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """ln p of each text, whose windows do not overlap in what they predict."""
        found = []
        for request in requests:
            windows = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, 1
            )
            parts = [(None, *make_disjoint_window(window)) for window in windows]
            scored = self._loglikelihood_tokens(parts, disable_tqdm=disable_tqdm)
            found.append(sum(logprob for logprob, _ in scored))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, found[-1])
        return found

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The answer to each text. Raises ConfigError for gen_kwargs that are not known."""
        found = []
        for request in tqdm(requests, "Running generate_until requests", disable=disable_tqdm):
            completion = self._completion(*request.args)
            found.append("".join(completion.run(self._generator)))
            self.cache_hook.add_partial("generate_until", request.args, found[-1])
        return found

    def _completion(self, context: str, gen_kwargs: dict[str, Any]) -> Completion:
        given = dict(normalize_gen_kwargs(gen_kwargs))
        stop = handle_stop_sequences(given.pop("until"), eos=None)
        count = given.pop("max_gen_toks")
        given.pop("do_sample")  # without it lm_eval sets temperature to 0
        if unknown := sorted(given.keys() - SAMPLING):
            allowed = ", ".join(("until", "max_gen_toks", "do_sample", *SAMPLING))
            raise ConfigError(f"gen_kwargs: got {unknown[0]}, must be one of {allowed}")
        if count >= self.max_length:
            raise ConfigError(
                f"max_gen_toks: got {count}, must be below the context of {self.max_length} tokens"
            )
        ids = self.tok_encode(context)[-(self.max_length - count) :] or [self.prefix_token_id]
        return Completion(self.tokenizer, ids, count, Sampling(**given), stop, continued=False)

    def _loglikelihood_tokens(
        self, requests: Sequence[TokenRequest], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        found: dict[int, tuple[float, bool]] = {}
        # Side by side what begins alike: the choices of one question.
        order = sorted(range(len(requests)), key=lambda n: (requests[n][1], requests[n][2]))
        for number in tqdm(order, "Running loglikelihood requests", disable=disable_tqdm):
            words, context, continuation = requests[number]
            found[number] = self._score(context, continuation)
            if words is not None:
                self.cache_hook.add_partial("loglikelihood", words, found[number])
        return [found[number] for number in range(len(requests))]

    def _score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """ln p of `continuation` behind `context`, which loses its beginning where both are longer
        than the model's context; and whether each of its tokens is the likeliest."""
        text = [*context, *continuation][-(self.max_length + 1) :][:-1]
        logits = self._generator.following(text, len(text) - len(continuation))
        rows = zip(logits, continuation, strict=True)
        parts = [(log_softmax(row)[token], int(row.argmax()) == token) for row, token in rows]
        return float(np.sum([part for part, _ in parts])), all(likeliest for _, likeliest in parts)
