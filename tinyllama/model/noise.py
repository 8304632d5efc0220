"""NEFTune (Jain et al. 2023, arXiv:2310.05914): noise on the embeddings of a text in training.

    x + u,  u uniform in +-alpha / sqrt(T hidden)

The noise is a function of a key, which is written before every micro-batch, so that a resumed run
has the same noise.
"""

import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import numpy as np
from tinygrad import Tensor, dtypes

from tinyllama.ops.random_bits import random_bits
from tinyllama.runtime import storage


class EmbeddingNoise:
    """What is added to the output of the embedding while it is on; the key (2,) uint32."""

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha
        self.noise_key = Tensor.empty(2, dtype=dtypes.uint32)
        self.is_on = False  # only while training

    def __call__(self, x: Tensor, noise_key: Tensor) -> Tensor:
        """x (B, T, hidden) -> like x."""
        bound = self.alpha / (x.shape[1] * x.shape[2]) ** 0.5
        bits = random_bits(noise_key, x.numel()).cast(dtypes.float32).reshape(x.shape)
        return (x.float() + (bits * (bound / 2**31) - bound)).cast(x.dtype)

    def set_key(self, seed: int, step: int, micro_batch: int) -> None:
        """Choose the noise of a micro-batch."""
        entropy = [seed, zlib.crc32(b"embedding noise"), step, micro_batch]
        storage.write(self.noise_key, np.random.SeedSequence(entropy).generate_state(2))

    @contextmanager
    def on(self) -> Iterator[None]:
        """Noise is added within this block: in training, not in validation."""
        self.is_on = True
        try:
            yield
        finally:
            self.is_on = False


Around = Callable[[int, int], AbstractContextManager[None]]


def noising(noise: EmbeddingNoise | None, seed: int, around: Around) -> Around:
    """`around`, with the noise of a step and micro-batch besides, if there is any."""
    if noise is None:
        return around

    @contextmanager
    def both(step: int, micro_batch: int) -> Iterator[None]:
        noise.set_key(seed, step, micro_batch)
        with ExitStack() as stack:
            stack.enter_context(around(step, micro_batch))
            stack.enter_context(noise.on())
            yield

    return both
