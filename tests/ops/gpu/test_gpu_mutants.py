"""Faults put into the GPU kernels' texts, each of which the emulation must find."""

import re

import gpu_kernels
import gpu_rows
import pytest
from faults import is_found
from gpu_kernels import emulate

from tinyllama.ops.gpu.gemm import Tile

NT, NN = "NT bfloat16", "NN float16"
INT4 = "NT bfloat16, 4 bits by 64"
MINIMUM = "NN bfloat16, 8 bits by 64, minimum"
SPLIT = "TN bfloat16, split"
ACCUMULATE = "NN float32, accumulate"
# What the fault is: the case that finds it, the text, what replaces it.
PRODUCT_MUTANTS = {
    "a wait for one tile too few": (NT, "WAIT(STAGES - 2);", "WAIT(STAGES - 1);"),
    "no barrier": (NT, "BARRIER; /* the tile is there for all", "; /*"),
    "nothing committed at the end": (NT, "COMMIT(); /* also", "if ((step) < end) COMMIT(); /*"),
    "a tile copied to the place in use": (
        NT,
        "ahead = stage ? stage - 1 : STAGES - 1",
        "ahead = stage",
    ),
    "A's fragment from the wrong chunk": (NT, "k / 8 + lane / 16)", "k / 8 + lane / 8 % 2)"),
    "B's fragment from the wrong rows": (NT, "m, lane % 16, k / 8", "m + 8, lane % 16, k / 8"),
    "B's fragment not transposed": (NN, "ldmatrix_transposed(x,", "ldmatrix(x,"),
    "columns past the edge are copied": (NT, "in_row && (whole_rows", "(whole_rows"),
    "a step of the copies that misses rows": (NT, "even) + i * step * cols", "even) + i * cols"),
    "a band of the wrong height": (NT, "in_band % height", "in_band % BAND"),
    "C written past its edge": (NT, "M % BM == 0 || row < M", "1"),
    "the parts of a split on one place": (SPLIT, "c += (long)part * M * N;", ""),
    "the last step of a part left out": (
        SPLIT,
        "? begin + PART : STEPS",
        "? begin + PART - 1 : STEPS",
    ),
    "what C held is forgotten": (ACCUMULATE, "+WIDEN(OUT_TYPE, c[at])", ""),
    "3xTF32 without a product": (ACCUMULATE, "mma_tf32(d->v, a->lo, b->hi);", ""),
    "packed numbers without a sign": (INT4, "(int)((bits) << (32 - BITS)) >> (32 - BITS)", "bits"),
    "packed numbers a tile late": (
        INT4,
        "WIDEN_HELD(k + STAGES - 1, ahead)",
        "WIDEN_HELD(k + STAGES - 1, stage)",
    ),
    "the scale of another group": (INT4, "scales[at / GROUP]", "scales[at / GROUP / 2]"),
    "the minimum is left out": (MINIMUM, "* h->scale + h->minimum", "* h->scale"),
}
# The same of several products in one launch.
TOGETHER_MUTANTS = {
    "the first term alone": ("a sum of three", "term == 1 ? x##1 : x##2", "x"),
    "the steps of a term run on": ("a sum of two", "(step) - term * STEPS_OF_TERM", "(step)"),
    "results of a batch in one place": ("three of one A", "which == 1 ? x1 : x2", "x1"),
    "a part of a batch's split": ("two of one B, split", "bz % SPLIT", "bz"),
    "all results are turned": ("three turned", "if (which < TURNED)", ""),
    "positions that go on into the next row": ("three turned", "row % T", "row"),
    "a pair of another head": (
        "three turned",
        "j / (HEAD / 16) * (HEAD / 8) + j % (HEAD / 16)",
        "j / (HEAD / 16) * (HEAD / 16) + j % (HEAD / 16)",
    ),
    "gate and up from the wrong rows": ("gate and up", "% (FN / 2)) + (j) / (FN / 2)", ") + 0"),
    "blocks as wide as two": (
        "gate and up",
        "in_band / height * COLUMNS",
        "in_band / height * BN",
    ),
    "the gradient without the gate's slope": (
        "their gradients",
        "(1 + g0 * (1 - s0))",
        "(1 + g0)",
    ),
}
DOCUMENTS = "float32, D 32, documents"
GROUPED = "bfloat16, D 64, three queries per key"
ATTENTION_MUTANTS = {
    "a query does not see itself": (
        GROUPED,
        "key <= (e < 2 ? upper : lower)",
        "key < (e < 2 ? upper : lower)",
    ),
    "documents see each other": (DOCUMENTS, "&& key >= (e < 2 ? upper_start : lower_start)", ""),
    "a tile with a document's edge is not masked": (DOCUMENTS, "&& t * TILE >= newest", ""),
    "the maximum of two lanes alone": (
        GROUPED,
        "x = op(x, exchanged(x, ACROSS_ROW_2, scratch, tid));",
        "",
    ),
    "sums keep the old maximum's scale": (GROUPED, "upper_sum *= upper_shrink;", ""),
    "no barrier before a tile is overwritten": (DOCUMENTS, "BARRIER;\n      FETCH(", "FETCH("),
    "no wait for a tile": (GROUPED, "WAIT(0);", ""),
    "no barrier after the wait": (GROUPED, "WAIT(0);\n    BARRIER;", "WAIT(0);"),
    "queries of another head": (GROUPED, "const int head = kv * (H / KV)", "const int head = kv"),
    "queries of a document are left out": (DOCUMENTS, "< k0 + OWN_ROWS) count++", "< k0) count++"),
    "rows past the end are written": (GROUPED, "INSIDE(row0 + ROW(e))", "1"),
    "results in the wrong order": (DOCUMENTS, "s->v[e % 2 * 2 + e / 2]", "s->v[e]"),
    "positions turned the wrong way": (
        GROUPED,
        "GET(o[j + FD / 2], e) = second * c - first * s",
        "GET(o[j + FD / 2], e) = second * c + first * s",
    ),
    "angles of another row": (GROUPED, "CLAMPED(row) * (D / 2)", "CLAMPED(row0) * (D / 2)"),
    "a gradient without its scale": (GROUPED, "gk, k0 + row, SCALE, SCALE", "gk, k0 + row, 1, 1"),
}


# Of the kernels beside products and attention.
ROW_MUTANTS = {
    "rms norm: the mean over another width": ("rms norm: float32", "tid) / H + EPS", "tid) + EPS"),
    "rms norm: columns past the end count": (
        "rms norm: odd rows",
        "squares += INSIDE(COLUMN(i)) ? v[k] * v[k] : 0",
        "squares += v[k] * v[k]",
    ),
    "rms norm: columns past the end are written": (
        "rms norm: odd rows",
        "if (INSIDE(COLUMN(i))) STORE(0, partial",
        "STORE(0, partial",
    ),
    "rms norm: the gradient without its pull": (
        "rms norm: float32",
        "* scale - value[j] * pull",
        "* scale",
    ),
    "rms norm: the weight's gradient of the last row alone": (
        "rms norm: float16, more rows than blocks",
        "dw[j] += gradient[j]",
        "dw[j] = gradient[j]",
    ),
    "rms norm: no addend": ("rms norm: odd rows", "result[k] += gradient", "result[k] = gradient"),
    "a block's sum without the groups' barrier": (
        "rms norm: float32",
        "scratch[tid] = x;                                                                     \\\n"
        "    BARRIER;",
        "scratch[tid] = x;",
    ),
    "a block's sum without a barrier before": (
        "cross entropy: bfloat16",
        "BARRIER; /* the numbers of the last time have been read */",
        ";",
    ),
    "a block's sum without its last group": (
        "rms norm: float32",
        "first < THREADS; first += 32",
        "first < THREADS - 32; first += 32",
    ),
    "column sum: groups read the same rows": (
        "rms norm: float32",
        "int row = group; row < ROWS",
        "int row = 0; row < ROWS",
    ),
    "column sum: no barrier": ("rms norm: float32", "part;\n  BARRIER;", "part;"),
    "cross entropy: sums keep the old maximum": (
        "cross entropy: bfloat16",
        "sum *= EXP_LESS(max, higher);",
        "",
    ),
    "cross entropy: threads' sums are not rescaled": (
        "cross entropy: float32",
        "block_sum(sum * EXP_LESS(max, highest)",
        "block_sum(sum",
    ),
    "cross entropy: the target keeps its 1": ("cross entropy: float32", "* scale - hit", "* scale"),
    "cross entropy: an untrained row has a gradient": (
        "cross entropy: float32",
        "v[k] = trained ?",
        "v[k] = 1 ?",
    ),
    "cross entropy: a target beyond the vocabulary is trained": (
        "cross entropy: without gradient",
        "target >= 0 && target < V",
        "target >= 0",
    ),
    "cross entropy: the loss from another thread": (
        "cross entropy: float32",
        "target / VEC % THREADS",
        "target % (THREADS - 1)",
    ),
    "swiglu: the gradient without 1 - s": (
        "swiglu: float32",
        "(1 + g[k] * (1 - s))",
        "(1 + g[k])",
    ),
    "swiglu: up for gate": ("swiglu: float32", "u[k] = gradient * g", "u[k] = gradient * u"),
    "swiglu: written past the end": ("swiglu: float16, odd", "|| at < COUNT", "|| 1"),
    "rope: the gradient turns forwards": ("rope: float32", "? -s[k] : s[k]", "? s[k] : s[k]"),
    "rope: the position of another head": (
        "rope: float32",
        "n / (ACROSS * HEADS) % T",
        "n / ACROSS % T",
    ),
    "rope: the half that is not written": (
        "rope: bfloat16",
        "STORE(TYPE, y + at + HALF, b);",
        "",
    ),
    "attention's delta: by time before heads": (
        "attention delta: float32",
        "(mine / (T * H)) * H + mine % H) * T + mine / H % T",
        "(mine / (T * H)) * T + mine / H % T) * H + mine % H",
    ),
    "attention's delta: no barrier": (
        "attention delta: bfloat16",
        "= part;\n  BARRIER;\n  const",
        "= part;\n  const",
    ),
    "attention's delta: written past the end": (
        "attention delta: float32",
        "tid < PER_BLOCK && mine < ROWS",
        "tid < PER_BLOCK",
    ),
    "embedding: tokens of one id in any order": (
        "embedding: float32",
        "id + (first + j < n)",
        "id + (first + j > n)",
    ),
    "embedding: no barrier before a tile": (
        "embedding: float32",
        "BARRIER;\n    tile[tid] =",
        "tile[tid] =",
    ),
    "embedding: the next entry's first token too": (
        "embedding: bfloat16",
        "i < begin[e + 1]",
        "i <= begin[e + 1] && i < N",
    ),
    "embedding: no barrier after the search": (
        "embedding: bfloat16",
        "begin[tid] = low;\n  BARRIER;",
        "begin[tid] = low;",
    ),
    "embedding: the search is one off": (
        "embedding: float32",
        "below ? middle + 1 : low",
        "below ? middle : low; if (below && high - low == 1) high = low; low = low",
    ),
    "embedding: rows past the table are written": (
        "embedding: float16, odd",
        "if (v0 + e < V && col < H)",
        "if (col < H)",
    ),
    "adamw: the decay of a parameter that has none": (
        "adamw: float32",
        "decays ? lr * scalars[4] : 0",
        "lr * scalars[4]",
    ),
    "adamw: the square without its correction": ("adamw: float32", "* root + eps", "+ eps"),
    "adamw: the tensor before": ("adamw: float32", "bx >= its_first", "bx > its_first"),
    "adamw: written past the end": ("adamw: bfloat16, odd", "if (at < count && ", "if ("),
    "adamw: the copy holds what was": (
        "adamw copies: bfloat16",
        "parameter[k] -= step * mean[k]",
        "if (copy) STORE(COPY_T, copy + at, parameter); copy = 0; parameter[k] -= step * mean[k]",
    ),
    "adamw: the copy of the tensor before": (
        "adamw copies: bfloat16",
        "copy = its_copy,",
        "copy = its_copy ? its_copy : copy,",
    ),
    "adamw: one random number for both moments": (
        "adamw state: bfloat16",
        "rounded_randomly(square[k], bits >> 16)",
        "rounded_randomly(square[k], bits & 0xffff)",
    ),
    "adamw: the indices of the first parameter": (
        "adamw state: bfloat16",
        "begin = firsts[number]",
        "begin = firsts[0]",
    ),
    "adamw: neighbours share a random number": (
        "adamw state: bfloat16",
        "begin + (u32)at + k",
        "begin + (u32)at",
    ),
    "narrow: the tensor before": ("narrow: bfloat16", "bx >= its_first", "bx > its_first"),
    "narrow: written past the end": ("narrow: float16, odd", "if (at < count) {", "{"),
    "squares: what parts held is forgotten": ("adamw: float32", "sum += parts[bx];", ""),
    "squares: blocks sum the same numbers": (
        "adamw: float32",
        "((long)bx * THREADS + tid) * VEC; at < count",
        "((long)tid) * VEC; at < count",
    ),
    "few rows: the neighbour's weights": (
        "few rows: bfloat16",
        "(n0 + (e) < N ? n0 + (e) : N - 1)",
        "(n0 + 1 < N ? n0 + 1 : N - 1)",
    ),
    "few rows: lanes past the end count": (
        "few rows: float32",
        "inside ? in[r][i] : 0;\n    }",
        "in[r][i];\n    }",
    ),
    "few rows: written past the end": (
        "few rows: float16, odd",
        "N % (GROUPS * EACH) == 0 || n0 + e < N",
        "1",
    ),
    "few rows: packed numbers without a sign": (
        "few rows: 4 bits by 64",
        "BITS == 4 ? 0x88888888u",
        "BITS == 4 ? 0",
    ),
    "few rows: x is not divided": (
        "few rows: 4 bits by 32, minimum",
        "in[r][i] *= 1 / POWER(i);",
        "",
    ),
    "few rows: the scale of another group": (
        "few rows: 8 bits by 32",
        "(ROW_OF_W(e) + k) / GROUP",
        "(ROW_OF_W(e) + k) / GROUP / 2",
    ),
    "few rows: the minimum is left out": (
        "few rows: 8 bits by 64, minimum",
        "sum[r][e] += WIDEN_2(minima[at]) * total[r];",
        "",
    ),
    "few rows: no addend": ("few rows: float32", "+WIDEN(TYPE, addend[at])", ""),
    "cached attention: a token does not see itself": (
        "cached attention: bfloat16",
        "seen = first + tid <= at",
        "seen = first + tid < at",
    ),
    "cached attention: its own key from the cache": (
        "cached attention: bfloat16",
        "first + slot + i == at ? own",
        "first + slot + i > at ? own",
    ),
    "cached attention: its own value from the cache": (
        "cached attention: bfloat16",
        "first + s == at ? v",
        "first + s > at ? v",
    ),
    "cached attention: keys before the window": (
        "cached attention: a window",
        " && first + tid > at - WINDOW",
        "",
    ),
    "cached attention: the window is one too short": (
        "cached attention: a window",
        "first + tid > at - WINDOW",
        "first + tid > at - WINDOW + 1",
    ),
    "cached attention: the key is not kept": (
        "cached attention: float32",
        "keys[((long)(at / LANES) * D + tid) * LANES + at % LANES] = k[tid];",
        "",
    ),
    "cached attention: parts with their own maxima": (
        "cached attention: float32",
        "EXP2(parts[p * WIDTH + D + 1] - highest)",
        "1",
    ),
    "cached attention: parts beyond the position": (
        "cached attention: float32",
        "position[0] / PART + 1, column",
        "position[0] / PART, column",
    ),
    "cached attention: no barrier before the weights are read": (
        "cached attention: float32",
        "  BARRIER;\n  /* The sum of values",
        "  /* The sum of values",
    ),
    "cached attention: no barrier between heads' scores": (
        "cached attention: bfloat16",
        "    BARRIER;\n    score[h] = 0;",
        "    score[h] = 0;",
    ),
    "cached attention: no barrier between heads": (
        "cached attention: bfloat16",
        "    BARRIER;\n    UNROLL\n    for (int i = 0; i < VEC; i++) sums[subset",
        "    UNROLL\n    for (int i = 0; i < VEC; i++) sums[subset",
    ),
}  # fmt: skip


def wrong_product(dialect: str, case: str, **more: object) -> bool:
    found = gpu_kernels.run_product(emulate, dialect, case, **more)
    return not found <= 10 * gpu_kernels.allowed_product_error(case)


@pytest.mark.parametrize("fault", PRODUCT_MUTANTS)
def test_a_fault_in_a_product_is_found(fault: str) -> None:
    case, old, new = PRODUCT_MUTANTS[fault]
    assert is_found(old, new, lambda change: wrong_product("cuda", case, change=change))


@pytest.mark.parametrize("fault", TOGETHER_MUTANTS)
def test_a_fault_in_several_products_is_found(fault: str) -> None:
    case, old, new = TOGETHER_MUTANTS[fault]
    wrong = gpu_kernels.wrong_together
    assert is_found(old, new, lambda change: wrong(emulate, "cuda", case, change=change))


@pytest.mark.parametrize("fault", ATTENTION_MUTANTS)
def test_a_fault_in_attention_is_found(fault: str) -> None:
    case, old, new = ATTENTION_MUTANTS[fault]
    wrong = gpu_kernels.wrong_attention
    assert is_found(old, new, lambda change: wrong(emulate, "cuda", case, change=change))


METAL_MUTANTS = {
    "A's rows for its columns": (
        "AT8(cols, m + 8 * h, i, k + j)",
        "AT8(cols, m + 8 * h, j, k + i)",
    ),
    "B's second matrix is the first": (
        "EACH(f[h].m, AT8(cols, n + 8 * h, j",
        "EACH(f[h].m, AT8(cols, n, j",
    ),
    "no barrier": ("BARRIER; /* the tile is there for all", "; /*"),
    "another lane layout": ("lane / 8 % 2 * 4 + lane % 2 * 2", "lane / 8 % 2 * 2 + lane % 2 * 4"),
    "zeros past the edge are not": (
        "valid ? *(GLOBAL const uint4 *)from : uint4(0)",
        "*(GLOBAL const uint4 *)from",
    ),
}


@pytest.mark.parametrize("fault", METAL_MUTANTS)
def test_a_fault_in_the_metal_form_is_found(fault: str) -> None:
    old, new = METAL_MUTANTS[fault]
    assert is_found(old, new, lambda change: wrong_product("metal", NT, change=change))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("WAIT(STAGES - 2);\n        BARRIER;", "BARRIER;"),
        ("tiles + next * STAGE", "tiles + stage * STAGE"),
    ],
    ids=["no wait", "the tile before"],
)
def test_a_fault_in_the_pipelined_loop_is_found(old: str, new: str) -> None:
    tile = Tile(pipelined=True)
    assert is_found(old, new, lambda change: wrong_product("cuda", NT, change=change, tile=tile))


@pytest.mark.parametrize("fault", ROW_MUTANTS)
def test_a_fault_in_a_kernel_of_rows_is_found(fault: str) -> None:
    case, old, new = ROW_MUTANTS[fault]
    assert is_found(old, new, lambda change: gpu_rows.CASES[case](emulate, "cuda", change))


@pytest.mark.parametrize(
    ("swizzle", "least"),
    [("(chunk)", 3), ("((chunk) ^ (row) % SWIZZLE(chunks))", 1.5)],
    ids=["none", "of neighbouring rows"],
)
def test_another_swizzle_is_right_but_has_bank_conflicts(swizzle: str, least: float) -> None:
    def changed(text: str) -> str:
        pattern = r"#define SWIZZLED\(chunks, row, chunk\) \\\n.*\n"
        new, count = re.subn(pattern, f"#define SWIZZLED(chunks, row, chunk) {swizzle}\n", text)
        assert count == 1
        return new

    assert gpu_kernels.run_product(emulate, "cuda", NT, change=changed) <= 1e-6
    assert gpu_kernels.cycles_per_bank_read() >= least
