"""How fast conversations are trained beside plain text: steps on rows of equal length, in turns.

python tools/sft_speed.py demo --set training.batch_size=4
python tools/sft_speed.py lora --set model.base=SmolLM2-135M-Instruct.Q4_1.gguf

The rows of docstrings.py as packed conversations, and the same text in windows. Each step takes its
batch and trains on it, as a run does. Times are of the process's processor, on one thread, so that
other programs matter little. Prints the medians of both, the median of their ratios, and how much
of a row conversations fill.
"""

import argparse
import json
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import docstrings
import preferences

from tinyllama.cli.arguments import exit_code, leave
from tinyllama.config import Config, load_config
from tinyllama.data.batches import Batches, prepare
from tinyllama.data.conversations import Form
from tinyllama.system import device
from tinyllama.tokenizers.opening import open_tokenizer
from tinyllama.tokenizers.sentencepiece import train_tokenizer
from tinyllama.tokenizers.tokenizer import Tokenizer

WARM_UP = 3


def datasets(config: Config, folder: Path) -> dict[str, Batches]:
    """Batches of text and of conversations, of the same rows."""
    docstrings.write_rows(Path(sysconfig.get_path("stdlib")), folder)
    rows = [json.loads(line) for line in (folder / "train.jsonl").open(encoding="utf-8")]
    chats = [preferences.conversation(row) for row in rows]
    texts = ["\n\n".join(m["content"] for m in chat["messages"]) for chat in chats]
    write_rows(folder / "chats.jsonl", chats)
    write_rows(folder / "texts.jsonl", [{"text": text} for text in texts])
    tokenizer = tokenizer_of(config, texts)
    template = None if tokenizer.chat_template else "chatml"
    t, made = config.training, {}
    for name, form in (("texts", Form()), ("chats", Form(template))):
        file = str(folder / f"{name}.jsonl")
        data = prepare(file, tokenizer, folder / "cache", form=form, progress=False)
        made[name] = Batches(data, config.context_length, t.batch_size, t.seed)
    return made


def write_rows(path: Path, rows: Sequence[object]) -> None:
    """Write JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def tokenizer_of(config: Config, texts: Sequence[str]) -> Tokenizer:
    """That of the base, or one that is trained on the texts."""
    if config.model.base is not None:
        return open_tokenizer(config.model.base)
    return train_tokenizer(texts, config.model.vocab_size)


def stepper(config: Config) -> Callable[[Batches, int], None]:
    """A model and its step: `run(batches, n)` trains step n on the next batch."""
    from tinyllama.model.build import build, build_random
    from tinyllama.model.lora import dropping
    from tinyllama.train.losses import CrossEntropy
    from tinyllama.train.optimizer import AdamW
    from tinyllama.train.prepare import with_base
    from tinyllama.train.step import TrainStep

    config, t = with_base(config), config.training
    model, trained, _ = build_random(config, t.seed) if config.model.base is None else build(config)
    around = dropping(model, t.seed)
    train = TrainStep(model, AdamW(trained, t), 1, around, CrossEntropy())

    def run(batches: Batches, n: int) -> None:
        train([batches.next()], n, t.learning_rate)

    return run


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 1 where conversations are more than 5 % slower."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config", nargs="?", default="demo")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args(arguments)
    device.select()
    device.set_threads(1)
    config = load_config(options.config, options.set)
    with tempfile.TemporaryDirectory(prefix="tinyllama-sft-") as folder:
        both = datasets(config, Path(folder))
        run = stepper(config)
        seconds: dict[str, list[float]] = {name: [] for name in both}
        for n in range(1, WARM_UP + options.steps + 1):
            for name, batches in both.items():
                begun = time.process_time()
                run(batches, n)
                seconds[name].append(time.process_time() - begun)
        filled = filled_share(both["chats"])
    texts, chats = (seconds[name][WARM_UP:] for name in ("texts", "chats"))
    ratio = statistics.median(a / b for a, b in zip(texts, chats, strict=True))
    print(
        f"a step on text {1e3 * statistics.median(texts):.1f} ms, on conversations "
        f"{1e3 * statistics.median(chats):.1f} ms: {ratio:.1%} of text's speed; conversations fill "
        f"{filled:.1%} of a row"
    )
    return 0 if ratio > 0.95 else 1


def filled_share(batches: Batches) -> float:
    """The share of the rows' places that hold a token of a conversation, of 256 rows."""
    rows = np.arange(min(batches.n_windows, 256))
    batch = batches.layout.batch(rows, len(rows))
    used = (batch.starts != np.arange(batch.tokens.shape[1])) | (batch.targets >= 0)
    return float(used.mean())


if __name__ == "__main__":
    leave(exit_code(main, "sft_speed"))
