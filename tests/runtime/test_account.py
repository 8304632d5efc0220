"""What a step costs is counted without running it."""

import pytest
from fake_cuda import needs_nvrtc
from runs_helpers import printed_json
from tinygrad import Tensor, dtypes
from tinygrad.uop.ops import Ops, UOp

from tinyllama.ops.matmul import linear
from tinyllama.runtime.account import Account, Launch, _bytes, account


def float32(elements: int) -> UOp:
    return UOp.new_buffer("CPU", elements, dtypes.float32)


def test_launches_operations_and_bytes_are_counted() -> None:
    x, w = Tensor.empty(48, 64), Tensor.empty(80, 64)

    def step(x: Tensor) -> Tensor:
        return (linear(x, w) + 1).contiguous().realize()

    found = account(step, [x])
    assert found.kernels == 2
    product, addition = sorted(found.launches, key=lambda launch: -launch.flops)
    assert product.name.startswith("gemm") and product.is_product
    assert product.flops == 2 * 48 * 80 * 64
    assert (addition.flops, addition.is_product) == (48 * 80, False)
    assert addition.nbytes == 2 * 4 * 48 * 80
    assert found.flops == product.flops + addition.flops
    assert found.nbytes == product.nbytes + addition.nbytes
    assert found.compiled is None and found.tensor_core_share == 0
    assert not w.uop.base.is_realized  # nothing was computed


def test_equal_kernels_are_one_line_that_counts_them() -> None:
    tensors = [Tensor.empty(256) for _ in range(3)]

    def step(*tensors: Tensor) -> Tensor:
        return Tensor.cat(*[(t * 2).contiguous() for t in tensors]).contiguous().realize()

    found = account(step, tensors)
    (doubling,) = [launch for launch in found.launches if launch.times == 3]
    assert doubling.nbytes == 2 * 4 * 256
    assert found.kernels == 3 + sum(launch.times for launch in found.launches if launch.times != 3)


def test_what_two_arguments_share_is_counted_once() -> None:
    whole, other = float32(100), float32(10)
    first = UOp(Ops.BUFFER_VIEW, dtypes.float32, (whole,), (60, 0))
    second = UOp(Ops.BUFFER_VIEW, dtypes.float32, (whole,), (60, 40))
    inner = UOp(Ops.BUFFER_VIEW, dtypes.float32, (second,), (10, 5))
    body = UOp.sink()

    def moved(*arguments: UOp) -> int:
        return _bytes(body.call(*arguments))

    assert moved(whole, other) == 440
    assert moved(whole, whole) == moved(whole, first) == 400
    assert moved(first, second) == 4 * 100
    assert moved(first, inner) == 4 * 60  # 45 to 55 lies in 0 to 60
    assert moved(inner, other) == 80


def test_products_are_told_from_sums_over_rows() -> None:
    a, b = Tensor.empty(64, 64), Tensor.empty(64, 64)

    def launch(build: object) -> Launch:
        found = account(lambda a, b: build(a, b).realize(), [a, b])  # type: ignore[operator]
        return max(found.launches, key=lambda launch: launch.flops)

    assert launch(lambda a, b: a @ b).is_product
    assert launch(lambda a, b: a @ b.cast(dtypes.bfloat16).float()).is_product
    assert not launch(lambda a, b: (a * b).sum(1)).is_product
    assert not launch(lambda a, b: a.exp2().sin() * b).is_product


def test_the_share_of_tensor_cores_is_that_of_products() -> None:
    def kernel(flops: int, is_product: bool, on_cores: bool, times: int = 1) -> Launch:
        return Launch("k", times, flops, 1, is_product, on_cores, "", (), ())

    launches = (kernel(300, True, True, 2), kernel(200, True, False), kernel(999, False, False))
    assert Account(launches, None).tensor_core_share == 0.75


CUDA = """
import json
from tinyllama.system import device
device.select()
from tinygrad import Tensor, dtypes
from tinyllama.runtime.account import account
a, b = (Tensor.empty(256, 256, dtype=dtypes.bfloat16) for _ in range(2))
def step(a, b):
    return ((a @ b).contiguous() + 1).realize()
found = account(step, [a, b], compiling=True)
print(json.dumps([found.kernels, found.tensor_core_share, found.compiled.kernels,
  found.compiled.spilled_bytes, found.compiled.registers]))
"""


@needs_nvrtc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_kernels_are_compiled_for_a_card_that_is_not_here(arch: str) -> None:
    found = printed_json("-c", CUDA, DEV=f"NULL:CUDA:{arch}")
    kernels, share, compiled, spilled, registers = found
    assert (kernels, share, compiled, spilled) == (2, 1.0, 2, 0)
    assert 16 <= registers <= 255
