"""A packed base: how far a weight may move, what is refused, what loading holds, and gradients."""

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from lora_helpers import load_packed
from model_helpers import build, difference, on_device, random_batch, random_weights
from tinygrad import Tensor, dtypes

from tinyllama.config import LlamaConfig
from tinyllama.errors import ConfigError, WeightsError
from tinyllama.formats.dtypes import to_bfloat16
from tinyllama.formats.int4 import as_packed, largest_block, row_parts
from tinyllama.formats.packed import PackedForm
from tinyllama.model import int4, lora
from tinyllama.model.int4 import Int4Linear, quantize_rows
from tinyllama.model.layers import Linear, block_linears
from tinyllama.ops import forms
from tinyllama.runtime.stage import saved_for_backward
from tinyllama.runtime.storage import read, write
from tinyllama.train.gradients import StagedLoss

# All products have a single shape, so that a training step compiles fast.
CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=64,
    num_layers=2,
    num_heads=2,
    intermediate_size=64,
    max_seq_len=64,
    rms_norm_eps=1e-3,
)
BLOCK = 32
LARGEST = 65504 * 7.0


def unpacked(packed, scales):
    """The weight that (packed, scales) stand for, in float64, from the format's description."""
    q = np.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1).astype(np.int64)
    q = np.where(q < 8, q, q - 16)
    block = q.shape[1] // scales.shape[1]
    return q, np.repeat(scales.astype(np.float64), block, axis=1)


def rows_of(block, low, high):
    """Three groups in each of two rows, of float32 values between the two sizes, either sign."""
    size = st.floats(low, high, width=32)
    value = st.one_of(st.just(0.0), size, size.map(lambda x: -x))
    return arrays.arrays(np.float32, (2, 3 * block), elements=value)


ANY_SIZE = st.sampled_from([(0, 2**-126), (0, 2**-20), (0, 1.0), (2**-24, LARGEST)])
GROUPS = st.tuples(st.sampled_from([2, 8, 64]), ANY_SIZE).flatmap(
    lambda chosen: rows_of(chosen[0], *chosen[1])
)


@settings(max_examples=100, deadline=None)
@given(GROUPS)
@example(np.zeros((2, 6), np.float32))
@example(np.full((2, 6), 2**-149, np.float32))  # the smallest float32 there is
@example(np.full((2, 6), 7.49 * 2**-24, np.float32))  # the smallest scale there is
@example(np.float32([[LARGEST, -LARGEST, 0.5, -0.5, 1e-30, 3e4]]))
@example(np.float32([[7.0, 0.5, 7.0, 1.5, 7.0, 0.50000006]]))  # ties, and what is next to one
@example(np.float32([[7.0, 2.4999998, 7.0, 3.4999998, 7.0, -3.5000002]]))
def test_no_weight_moves_by_more_than_half_its_scale(weight):
    block = weight.shape[1] // 3
    packed, scales = quantize_rows(weight, block)
    q, scale = unpacked(packed, scales)
    assert (np.abs(weight.astype(np.float64) - q * scale) <= scale / 2).all()
    assert np.abs(q).max() <= 7


@settings(max_examples=100, deadline=None)
@given(rows_of(8, 2**-10, 100.0))
def test_values_are_rounded_to_the_nearest_even_multiple_of_the_scale(weight):
    packed, scales = quantize_rows(weight, 8)
    absmax = np.abs(weight.reshape(2, 3, 8)).max(-1)
    assert (scales == (absmax / np.float32(7)).astype(np.float16)).all()
    q, scale = unpacked(packed, scales)
    exact = weight / np.where(scale == 0, 1, scale)
    assert (q == np.clip(np.rint(exact), -7, 7)).all()


def test_format_in_one_example():
    """Even values in low halves, two's complement, one scale for each group of a row."""
    weight = np.float32([[7, -7, 3, 0, 0.5, 1.5, -14, 2], [0, 0, 0, 0, -2, 7, 1, 2]])
    packed, scales = quantize_rows(weight, 4)
    assert scales.tolist() == [[1, 2], [0, 1]] and scales.dtype == np.float16
    assert packed.tolist() == [[0x97, 0x03, 0x10, 0x19], [0x00, 0x00, 0x7E, 0x21]]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (458641.0, "458641 is too large for 4 bits with a float16 scale"),
        (np.inf, "holds a value that is not finite"),
        (np.nan, "holds a value that is not finite"),
    ],
)
def test_what_a_float16_scale_cannot_hold_is_refused_by_name(value, said, tmp_path):
    weights = random_weights(CONFIG)
    weights["model.layers.1.mlp.up_proj.weight"][63, 63] = value
    build(CONFIG, weights).save_pretrained(tmp_path / "base")
    with pytest.raises(WeightsError) as error:
        load_packed(tmp_path / "base", BLOCK)
    assert str(error.value) == f"{tmp_path / 'base'}: model.layers.1.mlp.up_proj.weight: {said}"


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_weights_of_another_type_are_refused_by_name(name, tmp_path):
    build(CONFIG).save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    start = file.read_bytes().index(name.encode())
    text = file.read_bytes()
    file.write_bytes(text[:start] + text[start:].replace(b'"F32"', b'"I32"', 1))
    with pytest.raises(WeightsError, match=rf"^{tmp_path / 'base'}: {name}: type I32, must be"):
        load_packed(tmp_path / "base", BLOCK)


@settings(max_examples=30, deadline=None)
@given(GROUPS)
def test_what_a_packed_weight_stands_for_is_exact_in_parts_of_its_rows(weight):
    block = weight.shape[1] // 3
    rows = np.concatenate([weight, -weight, weight])
    q, scales = unpacked(*quantize_rows(rows, block))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tinyllama.formats.int4.PART_ELEMENTS", weight.shape[1])  # a row at a time
        found = as_packed("w", rows, block)
    assert found.dtype == np.float32
    assert (found == q * scales).all()


def test_what_4_bits_cannot_hold_is_said_of_the_tensor():
    with pytest.raises(WeightsError, match=r"^model: w: holds a value that is not finite$"):
        as_packed("model: w", np.float32([[np.inf, 1.0]]), 2)


@pytest.mark.parametrize(("limit", "largest"), [(64, 64), (63, 32), (8, 8), (7, 4), (1, 1)])
def test_the_largest_block_divides_every_layers_inputs(limit, largest):
    sizes = LlamaConfig(
        vocab_size=64, hidden_size=64, num_layers=1, num_heads=2, intermediate_size=192
    )
    assert largest_block(sizes, limit) == largest


@pytest.mark.parametrize(("shape", "step"), [((700, 512), 128), ((5, 2**17), 1), ((3, 64), 1024)])
def test_threads_share_a_tensor_by_its_rows_without_overlap(shape, step):
    parts = [range(shape[0])[part] for part in row_parts(shape)]
    assert [row for rows in parts for row in rows] == list(range(shape[0]))
    assert {len(rows) for rows in parts[:-1]} <= {step} and len(parts[-1]) <= step


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model on disk, in float32."""
    folder = tmp_path_factory.mktemp("quantize") / "base"
    build(CONFIG).save_pretrained(folder)
    return folder


def dense(model):
    """A plain model with the weights that a packed one computes with."""
    weights = {}
    for path, owner, name in block_linears(model.model.layers):
        weights[f"{path}.weight"] = getattr(owner, name).dense_weight().numpy()
    for name, tensor in model.state_dict().items():
        if tensor.dtype == dtypes.bfloat16:
            weights[name] = (read(tensor).astype(np.uint32) << 16).view(np.float32)
        elif tensor.dtype == dtypes.float32:
            weights[name] = read(tensor)
    return build(CONFIG, weights)


def test_block_size_that_does_not_divide_is_refused_by_name(tmp_path):
    build(LlamaConfig(**{**CONFIG.__dict__, "intermediate_size": 96})).save_pretrained(
        tmp_path / "base"
    )
    with pytest.raises(ConfigError) as error:
        load_packed(tmp_path / "base", 64)
    assert str(error.value) == (
        "qlora.block_size: got 64, must divide the inputs of every linear layer: down_proj has 96; "
        "the largest that does is 32"
    )
    with pytest.raises(ConfigError) as error:
        Int4Linear(100, 64, PackedForm(4, 64))
    assert str(error.value) == (
        "qlora.block_size: got 64, must be an even divisor of 100, the inputs of a linear layer"
    )
    with pytest.raises(ConfigError, match="got 25, must be an even divisor of 100"):
        Int4Linear(100, 64, PackedForm(4, 25))


def test_linear_layers_are_packed_and_the_rest_is_kept(base):
    model, weights = load_packed(base, BLOCK), random_weights(CONFIG)
    for path, owner, name in block_linears(model.model.layers):
        layer, weight = getattr(owner, name), weights[f"{path}.weight"]
        packed, scales = quantize_rows(weight, 32)
        assert (layer.in_features, layer.out_features) == weight.shape[::-1]
        assert (read(layer.packed) == packed).all() and (read(layer.scales) == scales).all()
        q, scale = unpacked(packed, scales)
        assert (layer.dense_weight().numpy() == q * scale).all()
    for table in ("model.embed_tokens.weight", "lm_head.weight"):
        assert (read(model.state_dict()[table]) == to_bfloat16(weights[table])).all()
    norms = [name for name in weights if "norm" in name]
    assert len(norms) == 5
    for name in norms:
        assert (read(model.state_dict()[name]) == weights[name]).all()
    assert len(model.state_dict()) == len(weights) + 7 * CONFIG.num_layers  # scales


def test_a_tied_head_is_the_embedding_in_bfloat16(tmp_path):
    tied = LlamaConfig(**{**CONFIG.__dict__, "tie_word_embeddings": True})
    build(tied).save_pretrained(tmp_path / "base")
    model = load_packed(tmp_path / "base", BLOCK)
    assert model.head_weight() is model.model.embed_tokens.weight
    assert model.head_weight().dtype == dtypes.bfloat16


def loss_and_gradients(model):
    """Summed loss and the gradients of rank-4 adapters on two layers of each block."""
    for path, owner, name in list(block_linears(model.model.layers)):
        if name in ("q_proj", "down_proj"):
            setattr(owner, name, lora.LoRALinear(getattr(owner, name), 4, 2.0))
            fill_adapter(getattr(owner, name), seed=len(name) + path.count("1"))
    staged = StagedLoss(model, lora.adapter_tensors(model))
    loss, grads = staged.gradients(*on_device(random_batch(CONFIG)))
    return float(loss.item()), {name: read(g).astype(np.float32) for name, g in grads.items()}


def fill_adapter(layer, seed):
    """A and B of an adapter, neither zero."""
    rng = np.random.default_rng(seed)
    for part in (layer.lora_A.weight, layer.lora_B.weight):
        write(part, 0.1 * rng.standard_normal(part.shape).astype(np.float32))


@pytest.mark.parametrize("form", ["cpu", "portable"])
def test_an_adapter_on_a_packed_layer_gets_the_gradients_of_one_on_the_dense_layer(form):
    rng = np.random.default_rng(0)
    weight, x, dy = (
        rng.standard_normal(n).astype(np.float32) for n in ((40, 64), (5, 64), (5, 40))
    )
    packed, plain = Int4Linear(64, 40, PackedForm(4, 32)), Linear(64, 40)
    for tensor, values in zip(
        (packed.packed, packed.scales), quantize_rows(weight, 32), strict=True
    ):
        write(tensor, values)
    results = []
    with forms.forced(form):
        write(plain.weight, packed.dense_weight().numpy())
        for base in (packed, plain):
            layer = lora.LoRALinear(base, 4, 2.0)
            fill_adapter(layer, seed=1)
            inputs = Tensor(x).realize()
            wanted = inputs, layer.lora_A.weight, layer.lora_B.weight
            found = layer(inputs).gradient(*wanted, gradient=Tensor(dy).realize())
            results.append([g.numpy() for g in found])
    for got, expected in zip(*results, strict=True):
        assert difference(got, expected) < 1e-5


def test_a_model_on_a_packed_base_has_the_gradients_of_the_dense_one(base):
    packed = load_packed(base, BLOCK)
    loss, grads = loss_and_gradients(dense(packed))
    packed_loss, packed_grads = loss_and_gradients(packed)
    assert packed_loss == pytest.approx(loss, rel=1e-6)
    assert grads.keys() == packed_grads.keys() and len(grads) == 2 * 2 * CONFIG.num_layers
    for name, grad in grads.items():
        assert difference(packed_grads[name], grad) < 1e-5, name


def test_a_weight_that_was_widened_is_not_kept_for_the_backward_pass():
    layer = Int4Linear(64, 40, PackedForm(4, 32))
    x = Tensor.empty(5, 64)
    with forms.forced("portable"):
        y = layer(x.exp().contiguous())
    weights = [layer.packed, layer.scales]
    assert {t.shape for t in saved_for_backward(y, [x], weights)} == {(5, 64), (5, 40)}
    assert (40, 64) in {t.shape for t in saved_for_backward(y, [x, *weights])}


def test_activations_may_be_narrow(base):
    wide, narrow = (load_packed(base, BLOCK, dtype=d) for d in (dtypes.float32, dtypes.bfloat16))
    loss, grads = loss_and_gradients(wide)
    found, narrow_grads = loss_and_gradients(narrow)
    assert found == pytest.approx(loss, rel=2e-2) and found != loss
    for name, grad in grads.items():
        assert difference(narrow_grads[name], grad) < 0.15, name


LOADING = """
import json, os, sys
os.environ["DEV"] = "CPU"
from tinyllama.system import memory
from dataclasses import replace
from tinyllama.config import Config, LoraConfig, QloraConfig
from tinyllama.formats.huggingface import open_folder
from tinyllama.runtime.storage import buffer_of
from tinyllama.model.build import build
from tinygrad import Tensor
buffer_of(Tensor.empty(1))  # the device is open before anything is counted
sizes = replace(open_folder(sys.argv[1]).config, base=sys.argv[1])
config = Config(model=sizes, lora=LoraConfig(rank=1), qlora=QloraConfig(block_size=64))
before = memory.resident_bytes()
model = build(config).model
held = sum(t.nbytes() for t in model.parameters())
print(json.dumps({"before": before, "peak": memory.resident_bytes(peak=True), "held": held}))
"""


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory):
    """Six layers of 1024 in float32: 300 MB, whose packed form is an eighth of that."""
    config = {"vocab_size": 512, "hidden_size": 1024, "num_layers": 6, "num_heads": 8}
    config |= {"intermediate_size": 2752, "max_seq_len": 64}
    folder = tmp_path_factory.mktemp("wide") / "base"
    make = [sys.executable, "tools/make_random_model.py", str(folder), "--dtype", "float32"]
    make += [f"--set=model.{key}={value}" for key, value in config.items()]
    subprocess.run([*make, "--shard-bytes", "100000000"], check=True, capture_output=True)
    return folder


def test_loading_holds_the_packed_model_and_no_more_than_a_layer_beside_it(wide_folder):
    done = subprocess.run(
        [sys.executable, "-c", LOADING, str(wide_folder)],
        check=True,
        capture_output=True,
        text=True,
    )
    seen = json.loads(done.stdout)
    layer_bytes = 4 * (4 * 1024**2 + 3 * 1024 * 2752)
    whole_bytes = 6 * layer_bytes
    grown = seen["peak"] - seen["before"]
    assert seen["held"] < whole_bytes / 6
    assert seen["held"] <= grown < seen["held"] + layer_bytes, f"{grown:,} of {whole_bytes:,}"


def test_packing_asks_for_no_memory_of_the_full_weights():
    """The blank model of an estimate is packed too, and holds nothing."""
    model = int4.packed_linears(int4.Llama(LlamaConfig.llama2_7b(), seed=None), block_size=64)
    held = sum(t.nbytes() for t in model.parameters())
    linear = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert held == linear // 2 + linear // 64 * 2 + 2 * 2 * 32000 * 4096 + 4 * 65 * 4096
