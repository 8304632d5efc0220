"""What users of other programs type as options, and what to type here.

The answer is our option, or a sentence. Words of a configuration, such as --lr, are answered from
config/other_words.py, as `--set training.learning_rate=VALUE`.
"""

_ADAPTER = "--model takes an adapter's folder, which names its base: leave it out"
_NO_PENALTY = "draws are shaped by --temperature, --top-k and --top-p alone: leave it out"
_STREAMED = "tokens are always printed one by one: leave it out"

WORDS: dict[str, str] = {
    "-m": "--model",
    "--checkpoint": "--model",
    "--checkpoint-dir": "--model",
    "--model-name-or-path": "--model",
    "--model-path": "--model",
    "--adapter": _ADAPTER,
    "--adapter-path": _ADAPTER,
    "--lora": _ADAPTER,
    "-p": "--prompt",
    "--text": "--prompt",
    "-n": "--max-new-tokens",
    "--max-length": "--max-new-tokens",
    "--max-tokens": "--max-new-tokens",
    "--n-predict": "--max-new-tokens",
    "--num-tokens": "--max-new-tokens",
    "-t": "--threads",
    "--n-threads": "--threads",
    "--do-sample": "--temperature above 0 draws, --temperature 0 does not: leave it out",
    "--num-beams": "there is no beam search: leave it out",
    "--repeat-penalty": _NO_PENALTY,
    "--repetition-penalty": _NO_PENALTY,
    "--min-p": _NO_PENALTY,
    "--stream": _STREAMED,
    "--batch-size": "--batch",
    "--context-length": "--context",
    "--ctx-size": "--context",
    "--max-seq-length": "--context",
    "--seq-len": "--context",
    "--config": "the configuration is typed without an option: tinyllama train FILE",
    "-c": "the configuration is typed without an option: tinyllama train FILE",
    "--output": "--out",
    "-o": "--out",
    "--vocab": "--vocab-size",
    "--resume-from-checkpoint": "--resume",
    "--time-budget": "--budget",
}
