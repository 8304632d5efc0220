"""Sizes that a kernel gets when it is loaded: one compilation serves them all."""

import struct

import numpy as np
import pytest
from model_helpers import kernel_texts
from tinygrad import Tensor
from tinygrad.device import Device

from tinyllama.config import config_from_toml
from tinyllama.ops.matmul import (
    NN,
    NT,
    TN,
    gemm,
)
from tinyllama.runtime.patches import kernel_sizes
from tinyllama.train.memory_estimate import blank_step, estimate_memory

MODEL = """
[model]
vocab_size = 300
hidden_size = {hidden}
num_layers = 1
num_heads = 2
intermediate_size = {inner}
max_seq_len = 64
[training]
batch_size = {batch}
"""


def sources(hidden: int, inner: int, batch: int) -> set[str]:
    """C texts of the kernels of a step that grow with its sizes: products and the optimizer."""
    config = config_from_toml(MODEL.format(hidden=hidden, inner=inner, batch=batch), "sizes")
    step = blank_step(config)
    estimate_memory(config, step)
    stages = [*vars(step.staged.stages).values(), *step.optimizer.stages.values()]
    texts = {code for stage in stages for code in kernel_texts(stage)}
    names = ("#define KERNEL gemm", "#define KERNEL adamw", "#define KERNEL square_sum")
    return {code for code in texts if any(name in code for name in names)}


def test_models_of_all_sizes_share_their_products_and_optimizer():
    small = sources(64, 96, 1)
    assert len(small) >= 8
    assert sources(128, 320, 4) == small


@pytest.mark.parametrize("layout", [NT, NN, TN])
def test_a_second_size_is_not_compiled_again(layout, monkeypatch):
    compiled: list[str] = []
    compiler = Device["CPU"].compiler
    compile_cached = compiler.compile_cached

    def counting(code: str) -> bytes:
        compiled.append(code)
        return compile_cached(code)

    monkeypatch.setattr(compiler, "compile_cached", counting)
    rng = np.random.default_rng(0)
    for m, n, k in ((19, 21, 23), (97, 45, 331)):
        a, b = rng.standard_normal((m, k), np.float32), rng.standard_normal((k, n), np.float32)
        x = Tensor(np.ascontiguousarray(a.T if layout == TN else a)).realize()
        w = Tensor(np.ascontiguousarray(b.T if layout == NT else b)).realize()
        np.testing.assert_allclose(gemm(layout, x, w).numpy(), a @ b, rtol=1e-4, atol=1e-4)
    products = [code for code in compiled if "#define KERNEL gemm" in code]
    assert len(products) == 2
    assert len(set(products)) == 1


def test_sizes_are_put_behind_the_mark_and_nothing_else_changes():
    code = b"before" + struct.pack("=Q", kernel_sizes.MARK) + bytes(16) + b"after"
    placed = kernel_sizes.with_sizes(code, (7, 1 << 40))
    assert placed == b"before" + struct.pack("=Qqq", kernel_sizes.MARK, 7, 1 << 40) + b"after"
    assert kernel_sizes.with_sizes(code, ()) == code


def test_a_kernel_without_a_mark_takes_no_sizes():
    with pytest.raises(AssertionError, match="exactly one mark"):
        kernel_sizes.with_sizes(b"code", (1,))
