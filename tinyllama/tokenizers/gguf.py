"""The vocabulary inside a GGUF file, as the files that transformers opens.

    tokenizer.ggml.model "gpt2"    byte pairs over bytes: a tokenizer.json
    tokenizer.ggml.model "llama"   SentencePiece's byte pairs: a tokenizer.model

The file names the rule that cuts a text into words before pairs are merged (tokenizer.ggml.pre),
and llama.cpp knows what the name means. The table here has the names that models of LLaMA's
architecture use, with the same patterns; another name is refused, because the ids would be wrong.
Source: docs/gguf.md of ggml, and the patterns in llama.cpp's src/llama-vocab.cpp.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from tinyllama.errors import TokenizerError
from tinyllama.tokenizers.files import (
    CONFIG_FILE,
    GENERATION_FILE,
    JSON_FILE,
    MODEL_FILE,
    to_compact_json,
    to_json,
)
from tinyllama.tokenizers.sentencepiece_json import around
from tinyllama.tokenizers.sentencepiece_model import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    Piece,
    write_model,
)

VOCABULARY_KEY = "tokenizer.ggml.model"
_PRE = "tokenizer.ggml.pre"
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
_KINDS = range(NORMAL, BYTE + 1)


class _Rule(NamedTuple):
    """How a text becomes words: patterns, applied one after another to what lies between."""

    patterns: tuple[str, ...]
    whole_words: bool = False  # a word that is a piece is taken whole, whatever the merges say
    adds_bos: bool = False  # unless the file says so
    composes: bool = False  # Unicode's NFC first


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CASES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CASES}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CASES}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE, _SLASHES = r"[^\r\n\p{L}\p{N}]?", r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = rf"{_BEFORE}{_UPPER}*{_LOWER}+|{_BEFORE}{_UPPER}+{_LOWER}*|\p{{N}}|{_SLASHES}"
_GPT4O = (
    rf"{_BEFORE}{_UPPER}*{_LOWER}+{_CASES}?|{_BEFORE}{_UPPER}+{_LOWER}*{_CASES}?"
    rf"|\p{{N}}{{1,3}}|{_SLASHES}"
)

_OF_LLAMA3 = _Rule((_LLAMA3,), whole_words=True, adds_bos=True)
_OF_SMOLLM = _Rule((r"\p{N}", GPT2))
RULES = {
    "default": _Rule((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion"), _Rule((GPT2,))),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1"), _OF_LLAMA3),
    **dict.fromkeys(("smaug-bpe", "dbrx"), _Rule((_LLAMA3,))),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), _OF_SMOLLM),
    **dict.fromkeys(("exaone", "minerva-7b"), _OF_SMOLLM),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _Rule((_QWEN2,), composes=True)),
    "stablelm2": _Rule((_QWEN2,)),
    "deepseek-coder": _Rule(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}")),
    "tekken": _Rule((_TEKKEN,), whole_words=True),
    **dict.fromkeys(("gpt-4o", "llama4"), _Rule((_GPT4O,))),
    "falcon": _Rule((r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]")),
}


def files_of_gguf(metadata: Mapping[str, Any], source: str) -> dict[str, bytes]:
    """The tokenizer's files of a GGUF file with this metadata; `source` names it in errors.

    Raises TokenizerError for a file without a vocabulary, of an unknown kind, or with an unknown
    rule for words.
    """
    return _Vocabulary(metadata, source).files()


class _Vocabulary:
    """The metadata about tokens, checked."""

    def __init__(self, metadata: Mapping[str, Any], source: str) -> None:
        self._metadata, self._source = metadata, source
        self.kind = metadata.get(VOCABULARY_KEY)
        if self.kind not in ("gpt2", "llama"):
            found = "no vocabulary" if self.kind is None else f"a vocabulary of kind {self.kind!r}"
            self._fail(f"holds {found}, must be 'gpt2' or 'llama' ({VOCABULARY_KEY})")
        self.tokens = self._texts("tokens")
        types = self._numbers("token_type", len(self.tokens))
        self.types = [NORMAL] * len(self.tokens) if types is None else [int(n) for n in types]
        if odd := set(self.types) - set(_KINDS):
            self._fail(f"tokenizer.ggml.token_type: damaged: kinds {sorted(odd)[:3]}")
        if len(set(self.tokens)) < len(self.tokens):
            self._fail("tokenizer.ggml.tokens: damaged: a token is there twice")

    def _fail(self, problem: str) -> NoReturn:
        raise TokenizerError(f"{self._source}: {problem}")

    def files(self) -> dict[str, bytes]:
        """tokenizer.json or tokenizer.model, and the files beside it."""
        if self.kind == "gpt2":
            name, rule = self._metadata.get(_PRE, "default"), None
            rule = RULES.get(name) if isinstance(name, str) else None
            if rule is None:
                self._fail(f"{_PRE}: got {name!r}, must be one of {', '.join(sorted(RULES))}")
            adds_bos = self._flag("add_bos_token", rule.adds_bos)
            made = {JSON_FILE: to_compact_json(self._tokenizer_json(rule, adds_bos))}
        else:
            adds_bos = self._flag("add_bos_token", True)
            made = {MODEL_FILE: self._sentencepiece()}
        ends = [number for key in _ENDS if (number := self._id(key)) is not None]
        generation = {
            "bos_token_id": self._id("bos_token_id"),
            "eos_token_id": [*dict.fromkeys(ends)],
        }
        said = {key: value for key, value in generation.items() if value not in (None, [])}
        return {
            **made,
            CONFIG_FILE: to_json(self._config(adds_bos)),
            GENERATION_FILE: to_json(said),
        }

    def _config(self, adds_bos: bool) -> dict[str, Any]:
        """tokenizer_config.json."""
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": adds_bos,
            "add_eos_token": self._flag("add_eos_token", False),
            "clean_up_tokenization_spaces": False,
        }
        if self.kind == "llama":  # llama.cpp puts a space behind each special token
            config["legacy"] = True
        for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
            number = self._id(f"{key}_token_id")
            if number is not None:
                config[f"{role}_token"] = self.tokens[number]
        template = self._metadata.get("tokenizer.chat_template")
        if isinstance(template, str):
            config["chat_template"] = template
        return config

    def _tokenizer_json(self, rule: _Rule, adds_bos: bool) -> dict[str, Any]:
        """A tokenizer.json of byte pairs over bytes."""
        splits = [
            {"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False}
            for p in rule.patterns
        ]
        bytes_only = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
        bos = self._id("bos_token_id")
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": self._added(),
            "normalizer": {"type": "NFC"} if rule.composes else None,
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [*splits, {**bytes_only, "use_regex": False}],
            },
            "post_processor": (
                {**bytes_only, "use_regex": True}
                if not adds_bos or bos is None
                else around(self.tokens, [bos], [])
            ),
            "decoder": {**bytes_only, "use_regex": True},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": rule.whole_words,
                "vocab": {token: number for number, token in enumerate(self.tokens)},
                "merges": self._texts("merges"),
            },
        }

    def _added(self) -> list[dict[str, Any]]:
        """Control tokens, and those that every text may hold."""
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        return [
            {"id": number, "content": token, **flags, "special": kind != USER_DEFINED}
            for number, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True))
            if kind in (CONTROL, UNKNOWN, USER_DEFINED) and token
        ]

    def _sentencepiece(self) -> bytes:
        """A tokenizer.model of the pieces with their scores."""
        scores = self._numbers("scores", len(self.tokens))
        if scores is None:
            self._fail("tokenizer.ggml.scores: missing, so pairs have no order")
        unknown = self._id("unknown_token_id")
        if unknown is None:
            unknown = self.types.index(UNKNOWN) if UNKNOWN in self.types else 0
        kinds = [*self.types]
        kinds[unknown] = UNKNOWN
        pieces = [
            Piece(token, float(score), kind)
            for token, score, kind in zip(self.tokens, scores, kinds, strict=True)
        ]
        return write_model(
            pieces,
            unknown_id=unknown,
            bos_id=self._id("bos_token_id"),
            eos_id=self._id("eos_token_id"),
            adds_space=self._flag("add_space_prefix", True),
            merges_spaces=False,
        )

    def _texts(self, key: str) -> list[str]:
        found = self._metadata.get(f"tokenizer.ggml.{key}")
        if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
            self._fail(f"tokenizer.ggml.{key}: missing, or not a list of texts")
        return found

    def _numbers(self, key: str, count: int) -> Sequence[float] | None:
        found = self._metadata.get(f"tokenizer.ggml.{key}")
        if found is not None and (not hasattr(found, "__len__") or len(found) != count):
            self._fail(f"tokenizer.ggml.{key}: damaged: must be {count} numbers, as many as tokens")
        return found

    def _id(self, key: str) -> int | None:
        """An id; numbers out of range stand for none, as old writers have it."""
        number = self._metadata.get(f"tokenizer.ggml.{key}")
        if type(number) is int and 0 <= number < len(self.tokens):
            return number
        return None

    def _flag(self, key: str, default: bool) -> bool:
        value = self._metadata.get(f"tokenizer.ggml.{key}", default)
        if not isinstance(value, bool):
            self._fail(f"tokenizer.ggml.{key}: got {value!r}, must be true or false")
        return value
