"""Is an export its source? Every tensor compared, and the logits of one real text.

Both models are walked side by side, a tensor and a layer at a time, so that no more memory is
needed than a layer takes. The arithmetic is the model's own, in float32.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from tinygrad import Tensor

from tinyllama.config import LlamaConfig
from tinyllama.errors import WeightsError
from tinyllama.formats.huggingface import EMBEDDING, HEAD, llama_shapes
from tinyllama.model.layers import named_tensors
from tinyllama.model.llama import Llama
from tinyllama.runtime.storage import write

Matrix = npt.NDArray[np.float32]
# A tensor in float32 by its Hugging Face name.
Read = Callable[[str], Matrix]

# Read by every tokenizer that is exported, so that what is compared is what text gives.
TEXT = """The quick answer is rarely the whole one. In 1969 a crew of three flew to the Moon, and
two of them walked on it; the third, alone in orbit, wrote down what he saw.

def area(radius: float) -> float:
    return 3.14159 * radius**2

Le café est prêt à 8 h 30. Дом стоит у реки. 東京の朝は静かだ。 مرحبا بالعالم 🙂
"""
TOKENS = 64

# The largest root mean square of a difference that rounding explains, of a tensor and of the
# logits, each over the root mean square of the source's.
LIMITS = {
    "F32": (0.0, 1e-5),
    "F16": (1e-3, 0.02),
    "BF16": (4e-3, 0.1),
    "Q8_0": (0.02, 0.2),
    "Q4_0": (0.2, 1.0),
}


@dataclass(frozen=True)
class Check:
    """Differences between the logits of a source and of its export, over `tokens` tokens."""

    tokens: int
    largest: float  # |difference|
    relative: float  # root mean square of the difference over that of the source
    same: int  # tokens after which both predict the same one

    def __str__(self) -> str:
        return (
            f"logits of {self.tokens} tokens differ from the source's by at most "
            f"{self.largest:.3g} (relative {self.relative:.2g}), {self.same} of {self.tokens} "
            "predictions are the same"
        )


class _Walk:
    """One model on its way from tokens to logits, of which one layer is in memory."""

    def __init__(self, config: LlamaConfig, read: Read, tokens: Sequence[int]) -> None:
        self.config, self.read = config, read
        self.model = Llama(replace(config, num_layers=1), seed=None)
        self.tokens = np.array([tokens], np.int32)
        self.x = Tensor(np.zeros(0, np.float32))

    def embed(self) -> Matrix:
        table = self.read(EMBEDDING)
        self.x = Tensor(table[self.tokens]).realize()  # (1, T, hidden)
        return table

    def fill(self, module: object, name: str, stored: str) -> Matrix:
        """Write one weight of the module in memory; returns it."""
        values = self.read(stored)
        write(dict(named_tensors(module))[name], values)
        return values

    def layer(self) -> None:
        cos, sin = self.model.rotations(self.tokens.shape[1])
        starts = Tensor(np.zeros_like(self.tokens))
        self.x = self.model.model.layers[0](self.x, cos, sin, starts).realize()

    def logits(self) -> tuple[Matrix, Matrix]:
        """(logits (T, vocab), the output matrix)."""
        head = self.read(EMBEDDING if self.config.tie_word_embeddings else HEAD)
        x = self.model.model.norm(self.x).numpy()[0]
        return x @ head.T, head


def compare(
    source: tuple[LlamaConfig, Read],
    export: tuple[LlamaConfig, Read],
    kinds: Callable[[str], str],
    tokens: Sequence[int],
    label: str,
) -> Check:
    """Compare an export with its source; kinds(name) is the type that a tensor was rounded to.

    Raises WeightsError, beginning with `label`, where they differ by more than rounding explains.
    """
    (config, _), (written, _) = source, export
    if llama_shapes(config) != llama_shapes(written):
        raise WeightsError(f"{label}: reads back with other shapes than its source has")
    ours, theirs = _Walk(*source, tokens), _Walk(*export, tokens)

    def same(name: str, a: Matrix, b: Matrix) -> None:
        away = _relative(a, b)
        if math.isinf(away) and not np.isfinite(b).all():
            raise WeightsError(f"{label}: {name}: would hold a value that is not finite")
        if not away <= LIMITS[kinds(name)][0]:
            raise WeightsError(
                f"{label}: {name}: differs from its source by {away:.2g} of its size when read "
                f"back, at most {LIMITS[kinds(name)][0]:g} is rounding to {kinds(name)}"
            )

    same(EMBEDDING, ours.embed(), theirs.embed())
    for number in range(config.num_layers):
        for name, _ in named_tensors(ours.model.model.layers[0]):
            stored = f"model.layers.{number}.{name}"
            same(stored, *(w.fill(w.model.model.layers[0], name, stored) for w in (ours, theirs)))
        ours.layer()
        theirs.layer()
    last = "model.norm.weight"
    same(last, *(w.fill(w.model.model.norm, "weight", last) for w in (ours, theirs)))
    (a, a_head), (b, b_head) = ours.logits(), theirs.logits()
    if not config.tie_word_embeddings:
        same(HEAD, a_head, b_head)
    result = Check(
        len(tokens),
        float(np.abs(a - b).max()),
        _relative(a, b),
        int((a.argmax(-1) == b.argmax(-1)).sum()),
    )
    limit = max(LIMITS[kinds(name)][1] for name in llama_shapes(config))
    if not result.relative <= limit:
        raise WeightsError(f"{label}: {result}: at most a relative {limit:g} is rounding")
    return result


def _relative(a: Matrix, b: Matrix) -> float:
    """Root mean square of b - a over that of a; 0 for equal ones, infinite for one that is not
    finite."""
    if np.array_equal(a, b):
        return 0.0
    size = float(np.square(a, dtype=np.float64).sum())
    away = float(np.square(np.subtract(a, b, dtype=np.float64)).sum())
    if not math.isfinite(size + away):
        return math.inf
    return math.sqrt(away / size) if size else math.inf
