"""`--ops`: our operations one at a time, beside numpy's products (OpenBLAS) and PyTorch's."""

import dataclasses
import json
import math
import subprocess
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tinygrad import Tensor, TinyJit, dtypes
from tinygrad.dtype import DType

from tinyllama.bench.operations import LAYOUTS, Operation, best_seconds
from tinyllama.bench.report import table
from tinyllama.bench.runner import worker_command
from tinyllama.config import Config, LlamaConfig, QloraConfig
from tinyllama.errors import TrainingError
from tinyllama.formats.huggingface import linear_shapes
from tinyllama.ops import forms
from tinyllama.ops.adamw import SCALARS, Parameter, adamw
from tinyllama.ops.attention import attention
from tinyllama.ops.cross_entropy import linear_cross_entropy
from tinyllama.ops.embedding import embedding
from tinyllama.ops.int4 import int4_linear
from tinyllama.ops.matmul import (
    NN,
    TN,
    gemm,
    linear,
)
from tinyllama.ops.rms_norm import rms_norm
from tinyllama.ops.rope import rope, tables
from tinyllama.ops.swiglu import swiglu
from tinyllama.runtime import storage
from tinyllama.runtime.capture import synchronize
from tinyllama.system import device

Run = Callable[[], Any]
COLUMNS = ("tinyllama", "numpy", "torch")


def measure(config: Config, threads: int, torch_python: str | None) -> list[dict[str, Any]]:
    """Seconds and GFLOPS of each operation, by contender; PyTorch's if an interpreter is given.

    Raises TrainingError if that interpreter fails.
    """
    device.set_threads(threads)
    every = operations(config.model, config.training.micro_batch, config.context_length)
    dtype = config.training.dtype
    seconds: dict[str, list[float | None]] = {
        "tinyllama": [best_seconds(ours(op, getattr(dtypes, dtype))) for op in every],
        "numpy": [best_seconds(run) if (run := by_numpy(op)) else None for op in every],
    }
    if torch_python is not None:
        seconds["torch"] = list(by_torch(torch_python, every, dtype, threads))
    return [
        {
            "operation": op.label,
            "flops": op.flops,
            "seconds": {name: column[i] for name, column in seconds.items()},
            "gflops": {
                name: op.flops / time / 1e9
                for name, column in seconds.items()
                if (time := column[i])
            },
        }
        for i, op in enumerate(every)
    ]


def operations(config: LlamaConfig, batch: int, context: int) -> list[Operation]:
    """Every operation of a step on `batch` rows of `context` tokens, each size once."""
    tokens, hidden, vocab = batch * context, config.hidden_size, config.vocab_size
    inner, heads = config.intermediate_size, config.num_heads
    shapes = dict.fromkeys([*linear_shapes(config).values(), (vocab, hidden)])
    every = [
        Operation(
            f"matmul {layout}", {"M": tokens, "N": rows, "K": columns}, 2 * tokens * rows * columns
        )
        for layout in LAYOUTS
        for rows, columns in shapes
    ]
    sizes = {"B": batch, "T": context, "H": heads, "KV": config.kv_heads, "D": config.head_dim}
    pairs = 2 * config.head_dim * batch * heads * context * (context + 1)  # of query and key
    every.append(Operation("attention forward", sizes, pairs))
    every.append(Operation("attention both", sizes, 3 * pairs))
    every.append(Operation("rope both", sizes, 6 * tokens * heads * config.head_dim))
    rows, columns = max(linear_shapes(config).values())
    packed = {
        "M": tokens,
        "N": rows,
        "K": columns,
        "BLOCK": math.gcd(QloraConfig().block_size, columns),
    }
    every.append(Operation("int4 both", packed, 4 * tokens * rows * columns))
    loss = {"N": tokens, "V": vocab, "H": hidden}
    every.append(Operation("embedding both", loss, tokens * hidden))
    every.append(Operation("cross_entropy both", loss, 6 * tokens * vocab * (hidden + 1)))
    every.append(Operation("rms_norm both", {"N": tokens, "H": hidden}, 14 * tokens * hidden))
    every.append(Operation("swiglu both", {"N": tokens, "I": inner}, 23 * tokens * inner))
    every.append(Operation("adamw", {"N": inner, "H": hidden}, 12 * inner * hidden))
    return every


def text(results: Sequence[dict[str, Any]]) -> str:
    """GFLOPS as a table."""
    columns = [name for name in COLUMNS if name in results[0]["seconds"]]
    rows = [
        [r["operation"], *(f"{r['gflops'][c]:.1f}" if c in r["gflops"] else "" for c in columns)]
        for r in results
    ]
    return "\n".join(table(["GFLOPS (best of several runs)", *columns], rows))


def ours(operation: Operation, dtype: DType) -> Run:
    """A function that runs our operation once and waits for it."""
    kind, _, part = operation.kind.partition(" ")
    inputs, function = _functions(kind, operation.sizes, dtype, part)
    if part != "both":
        return _compiled(function, inputs)
    out = function(*inputs)[0]
    upstream = _tensor(np.ones(out.shape), out.dtype)
    return _compiled(_with_backward(function), [upstream, *inputs])


def by_numpy(operation: Operation) -> Run | None:
    """The same product in numpy, float32; None for an operation that is not a product."""
    kind, _, layout = operation.kind.partition(" ")
    if kind != "matmul":
        return None
    a, b = (array.astype(np.float32) for array in _matrices(operation.sizes, layout))
    if layout == "NT":
        return lambda: a @ b.T
    return (lambda: a @ b) if layout == "NN" else (lambda: a.T @ b)


def by_torch(
    python: str, every: Sequence[Operation], dtype: str, threads: int
) -> list[float | None]:
    """Seconds of each operation in PyTorch, measured in another process; None if it lacks one."""
    request = {"operations": [dataclasses.asdict(op) for op in every]}
    done = subprocess.run(
        worker_command(python, "tinyllama.bench.operations_torch"),
        input=json.dumps({**request, "dtype": dtype, "threads": threads}),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise TrainingError(f"PyTorch's operations could not be timed by {python}: {last}")
    seconds: list[float | None] = json.loads(done.stdout)
    return seconds


def _with_backward(function: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
    def both(upstream: Tensor, *tensors: Tensor) -> list[Tensor]:
        out = function(*tensors)[0]
        differentiable = [t for t in tensors if dtypes.is_float(t.dtype)]
        return [out, *out.gradient(*differentiable, gradient=upstream)]

    return both


def _compiled(function: Callable[..., list[Tensor]], inputs: Sequence[Tensor]) -> Run:
    def step(*tensors: Tensor) -> list[Tensor]:
        results = function(*tensors)
        Tensor.realize(*results)
        return results

    compiled = TinyJit(step)

    def run() -> None:
        compiled(*inputs)
        synchronize()

    return run


def _functions(
    kind: str, sizes: dict[str, int], dtype: DType, part: str
) -> tuple[list[Tensor], Callable[..., list[Tensor]]]:
    """Inputs of an operation and the function over them."""
    n = sizes.get("N", 0)
    if kind == "matmul":
        a, b = _matrices(sizes, part)
        # A weight is float32, whatever the activations are.
        weight = dtype if part == "TN" else dtypes.float32
        return [_tensor(a, dtype), _tensor(b, weight)], lambda a, b: [_product(part, a, b)]
    if kind == "attention":
        B, T, D = sizes["B"], sizes["T"], sizes["D"]
        heads = [_random(dtype, B, T, sizes[h], D) for h in ("H", "KV", "KV")]
        starts = _tensor(np.zeros((B, T)), dtypes.int32)
        return [*heads, starts], lambda q, k, v, s: [attention(q, k, v, s)]
    if kind == "rope":
        B, T, H, D = (sizes[name] for name in "BTHD")
        cos, sin = (_tensor(table, dtypes.float32) for table in tables(D, 10000.0, T))
        return [_random(dtype, B, T, H, D)], lambda x: [rope(x, cos, sin)]
    if kind == "int4":
        rows, columns = sizes["N"], sizes["K"]
        bits = np.random.default_rng(0).integers(0, 256, (rows, columns // 2))
        packed = _tensor(bits, dtypes.uint8)
        scales = _random(dtypes.float16, rows, columns // sizes["BLOCK"])
        return [_random(dtype, sizes["M"], columns)], lambda x: [int4_linear(x, packed, scales)]
    if kind == "embedding":
        ids = _tensor(np.arange(n).reshape(1, n) * 7919 % sizes["V"], dtypes.int32)
        weight = _random(dtypes.float32, sizes["V"], sizes["H"])
        return [weight], lambda w: [embedding(ids, w, dtype)]
    if kind == "cross_entropy":
        targets = _tensor(np.arange(n) % sizes["V"], dtypes.int32)
        weight = _random(dtypes.float32, sizes["V"], sizes["H"])
        return [_random(dtype, n, sizes["H"]), weight, targets], lambda x, w, t: [
            linear_cross_entropy(x, w, t)
        ]
    if kind == "rms_norm":
        inputs = [_random(dtype, n, sizes["H"]), _random(dtypes.float32, sizes["H"])]
        return inputs, lambda x, w: [rms_norm(x, w, 1e-5)]
    if kind == "swiglu":
        return [_random(dtype, n, sizes["I"]) for _ in range(2)], lambda g, u: [swiglu(g, u)]
    parameters = [_random(dtypes.float32, n, sizes["H"]) for _ in range(4)]
    scalars = _tensor(np.full(len(SCALARS), 0.1), dtypes.float32)
    return [*parameters, scalars], lambda p, m, v, g, s: adamw([Parameter(p, m, v, g, True)], s)


def _product(layout: str, a: Tensor, b: Tensor) -> Tensor:
    if layout == "NT":
        return linear(a, b)
    if forms.chosen(a, b) != "portable":
        return gemm({"NN": NN, "TN": TN}[layout], a, b, dtype=a.dtype)
    left = a if layout == "NN" else a.transpose()
    return (left @ b.cast(a.dtype)).contiguous()


def _matrices(sizes: dict[str, int], layout: str) -> tuple[np.ndarray, np.ndarray]:
    """The two factors of x W^T, dy W or dy^T x for x (M, K), W (N, K), dy (M, N)."""
    M, N, K = sizes["M"], sizes["N"], sizes["K"]
    shapes = {"NT": ((M, K), (N, K)), "NN": ((M, N), (N, K)), "TN": ((M, N), (M, K))}
    generator = np.random.default_rng(0)
    a, b = (generator.standard_normal(shape, np.float32) for shape in shapes[layout])
    return a, b


def _random(dtype: DType, *shape: int) -> Tensor:
    return _tensor(np.random.default_rng(0).standard_normal(shape, np.float32), dtype)


def _tensor(array: np.ndarray, dtype: DType) -> Tensor:
    """The array in a buffer of its own, narrowed here: clang 14 has no bfloat16."""
    tensor = Tensor.empty(*array.shape, dtype=dtype)
    if dtype == dtypes.bfloat16:
        bits = array.astype(np.float32).view(np.uint32)
        storage.write(tensor, (bits >> 16).astype(np.uint16))
    else:
        storage.write(tensor, array.astype(np.dtype(dtype.fmt)))
    return tensor
