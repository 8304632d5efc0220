"""Every kernel of training and generation compiles for every instruction set, present or not.

What comes out is loaded the way tinygrad loads it, so that a call of a library function, which
nothing would resolve, is an error. Nothing is run: the sanitized harnesses do that for the
instruction set of the machine.
"""

import functools
import os
import re
from concurrent.futures import ThreadPoolExecutor
from importlib import resources

import pytest
from model_helpers import kernel_texts
from tinygrad import Tensor, dtypes
from tinygrad.runtime.support.compiler_cpu import ClangJITCompiler
from tinygrad.uop.ops import Ops

from tinyllama.config import config_from_toml
from tinyllama.ops.cached_attention import cached_attention, new_cache
from tinyllama.ops.copies import copied
from tinyllama.ops.int4 import int4_embedding
from tinyllama.runtime import c_kernel
from tinyllama.train.memory_estimate import blank_step, estimate_memory

# Architecture and processor by tinygrad's names, and an instruction that only this set has.
TARGETS = {
    "AMX": ("x86_64", "sapphirerapids", "tdpbf16ps"),
    "AVX-512-BF16": ("x86_64", "cooperlake", "vdpbf16ps"),
    "AVX-512": ("x86_64", "skylake-avx512", "zmm"),
    "AVX2+FMA": ("x86_64", "haswell", "vfmadd"),
    "generic": ("x86_64", "x86-64", "mulps"),
    "NEON": ("arm64", "apple-m1", "fmla"),
}
BF16X3 = {"bfloat16x3": 'float32_products = "bfloat16x3"'}
MODEL = """
[model]
vocab_size = 300
hidden_size = 64
num_layers = 1
num_heads = 2
intermediate_size = 96
max_seq_len = 64
[training]
batch_size = 1
micro_batch_size = 1
"""
RUNS = {
    "float32": "",
    "bfloat16": 'dtype = "bfloat16"',
    "label smoothing": "label_smoothing = 0.1",
    "a state in bfloat16": 'optimizer_state = "bfloat16"',
    "QLoRA": "[lora]\nrank = 4\n[qlora]\nblock_size = 32",
    "a teacher": 'objective = "distill"\n[distillation]\nteacher = "a"\ntop_k = 8',
}


@functools.cache
def sources(amx: bool = False) -> dict[str, str]:
    """C texts of the kernels of full training, QLoRA, distillation and generation, one of each
    kind."""
    found: dict[str, str] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(c_kernel, "has_bf16_products", lambda: True)
        patch.setattr(c_kernel, "has_amx", lambda: amx)
        for run, words in (RUNS | (BF16X3 if amx else {})).items():
            config = config_from_toml(MODEL + words, run)
            step = blank_step(config)
            estimate_memory(config, step)
            stages = [*vars(step.staged.stages).values(), *step.optimizer.stages.values()]
            for stage in stages:
                found |= {kind(code): code for code in kernel_texts(stage)}
        found |= {kind(code): code for code in generation() | first_copies()}
    return {name: code for name, code in found.items() if "#define KERNEL" in code}


def generation() -> set[str]:
    """C texts of attention to a cache, for one new token and for several, and of packed rows."""
    packed, scales = Tensor.empty(9, 16, dtype=dtypes.uint8), Tensor.empty(9, 1, dtype=dtypes.half)
    ids = Tensor.empty(1, 3, dtype=dtypes.int32)
    results = [int4_embedding(ids, packed, scales, None, dtypes.bfloat16)]
    for tokens, dtype in ((1, dtypes.bfloat16), (5, dtypes.float32)):
        cache = new_cache(2, 32, 16, dtype)
        q, k = (Tensor.empty(1, tokens, heads, 16, dtype=dtype) for heads in (4, 2))
        results.append(cached_attention(q, k, k, cache, Tensor.empty(1, dtype=dtypes.int32)))
    return {n.arg for out in results for n in out.uop.toposort() if n.op is Ops.SOURCE}


def first_copies() -> set[str]:
    """The C text that copies weights before the first step."""
    weight, copy = Tensor.empty(9, 16), Tensor.empty(9, 16, dtype=dtypes.bfloat16)
    nodes = copied([weight], [copy])[0].uop.toposort()
    return {node.arg for node in nodes if node.op is Ops.SOURCE}


def kind(code: str) -> str:
    """A kernel's file with the macros that choose among its code, not those that are sizes."""
    name = re.search(r"#define KERNEL ([a-z]\w*?)(_\d|\s)", code)
    macros = (
        "LAYOUT|ACCUMULATE|ADDEND|COMPUTE_BF16|TILE_AMX|BF16X3|MANY_ROWS|BLOCK|DECAY|GRADIENT|ACT"
    )
    macros += "|ROWS|[ABC]_T|COPY|STATE_T"
    chosen = re.findall(rf"#define ({macros}) (\d+)", code.partition("/*")[0])
    return " ".join([name[1] if name else "", *(f"{key}={value}" for key, value in chosen)])


def test_the_steps_have_kernels_of_every_file() -> None:
    files = {file.name for file in (resources.files("tinyllama.ops") / "cpu").iterdir()}
    words = {name.split()[0] for amx in (False, True) for name in sources(amx)}
    missing = {file for file in files if file.endswith(".c")}
    missing -= {f"{word}.c" for word in words}
    assert not missing, words


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile_for(target: str) -> None:
    architecture, processor, instruction = TARGETS[target]
    compiler, texts = ClangJITCompiler([architecture, processor]), sources(target == "AMX")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = dict(zip(texts, pool.map(compiler.compile, texts.values()), strict=True))
    assert all(len(code) > 100 for code in objects.values())
    products = [next(code for name, code in texts.items() if "COMPUTE_BF16=1" in name)]
    if target == "AMX":
        products += [code for name, code in texts.items() if re.match("attention_.*_amx", name)]
        products += [code for name, code in texts.items() if "BF16X3=1" in name]
        assert len(products) >= 6  # attention, forward and back, and layouts
    compiler.args += ["-S"]
    for product in products:
        assert instruction in compiler.compile_to_obj(product).decode()
