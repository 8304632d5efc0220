"""PyTorch's time for each operation: one JSON object in, one list of seconds out.

Run as a process of its own, in the interpreter that has PyTorch.
"""

import contextlib
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tinyllama.bench.operations import Operation, best_seconds

Run = Callable[[], Any]


def build(operation: Operation, dtype: Any) -> Run | None:
    """A function that runs the operation once; None if PyTorch does not have it."""
    kind, _, part = operation.kind.partition(" ")
    if kind == "int4":
        return None
    if kind == "matmul":
        return _matmul(operation.sizes, part, dtype)
    if kind == "adamw":
        return _adamw(operation.sizes)
    return _differentiable(kind, operation.sizes, dtype, backward=part == "both")


def _matmul(sizes: dict[str, int], layout: str, dtype: Any) -> Run:
    x = torch.randn(sizes["M"], sizes["K"], dtype=dtype)
    w = torch.randn(sizes["N"], sizes["K"], dtype=dtype)
    dy = torch.randn(sizes["M"], sizes["N"], dtype=dtype)
    if layout == "NT":
        return lambda: F.linear(x, w)
    return (lambda: dy @ w) if layout == "NN" else (lambda: dy.t() @ x)


def _adamw(sizes: dict[str, int]) -> Run:
    p = torch.randn(sizes["N"], sizes["H"], requires_grad=True)
    p.grad = torch.randn_like(p)
    optimizer = torch.optim.AdamW([p], fused=True)
    return lambda: optimizer.step()


def _differentiable(kind: str, sizes: dict[str, int], dtype: Any, *, backward: bool) -> Run:
    inputs, function = _functions(kind, sizes, dtype)
    if not backward:
        return lambda: function(*inputs)
    for tensor in inputs:
        tensor.requires_grad_(True)
    upstream = torch.ones_like(function(*inputs))
    return lambda: torch.autograd.grad(function(*inputs), inputs, upstream)


def _functions(
    kind: str, sizes: dict[str, int], dtype: Any
) -> tuple[list[Tensor], Callable[..., Tensor]]:
    n = sizes.get("N", 0)
    if kind == "attention":
        B, T, D = sizes["B"], sizes["T"], sizes["D"]
        inputs = [torch.randn(B, sizes[h], T, D, dtype=dtype) for h in ("H", "KV", "KV")]
        grouped = sizes["H"] != sizes["KV"]
        return inputs, lambda q, k, v: F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=grouped
        )
    if kind == "rope":
        return [torch.randn(*(sizes[name] for name in "BTHD"), dtype=dtype)], _rotation(
            sizes, dtype
        )
    if kind == "embedding":
        ids = torch.arange(n) * 7919 % sizes["V"]
        table = torch.randn(sizes["V"], sizes["H"])
        return [table], lambda w: F.embedding(ids, w).to(dtype)
    if kind == "cross_entropy":
        targets = torch.randint(0, sizes["V"], (n,))
        inputs = [torch.randn(n, sizes["H"], dtype=dtype), torch.randn(sizes["V"], sizes["H"])]
        return inputs, lambda x, w: F.cross_entropy(
            F.linear(x, w.to(dtype)).float(), targets, reduction="sum"
        )
    if kind == "rms_norm":
        width = sizes["H"]
        inputs = [torch.randn(n, width, dtype=dtype), torch.ones(width, dtype=dtype)]
        return inputs, lambda x, w: F.rms_norm(x, (width,), w, 1e-5)
    inputs = [torch.randn(n, sizes["I"], dtype=dtype) for _ in range(2)]
    return inputs, lambda gate, up: F.silu(gate) * up


def _rotation(sizes: dict[str, int], dtype: Any) -> Callable[[Tensor], Tensor]:
    """The rotary embedding as Hugging Face's LLaMA computes it."""
    half = sizes["D"] // 2
    frequencies = 10000.0 ** (-torch.arange(half) / half)
    angles = torch.outer(torch.arange(sizes["T"]), frequencies).repeat(1, 2)[None, :, None]
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return lambda x: x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def main() -> int:
    """Time every operation that standard input lists."""
    request = json.loads(sys.stdin.read())
    torch.set_num_threads(request["threads"])
    dtype = getattr(torch, request["dtype"])
    with contextlib.redirect_stdout(sys.stderr):
        every = [Operation(**entry) for entry in request["operations"]]
        runs = [build(operation, dtype) for operation in every]
        seconds = [None if run is None else best_seconds(run) for run in runs]
    print(json.dumps(seconds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
