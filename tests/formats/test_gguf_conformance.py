"""SmolLM2 from its GGUF file, against transformers' own reader of such files."""

import warnings

import numpy as np
import pytest
from real_models import smollm2
from tinygrad import Tensor

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of their imports, not of our use
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers", minversion="5")
    pytest.importorskip("gguf")

from tinyllama.formats.gguf import open_gguf
from tinyllama.model.build import load_model
from tinyllama.model.llama import Llama

pytestmark = pytest.mark.filterwarnings("default")  # theirs are not ours to turn into errors

PROMPTS, LENGTH = 5, 64


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return smollm2(tmp_path_factory.mktemp("smollm2"))


@pytest.fixture(scope="module")
def tokens(file):
    vocabulary = open_gguf(file).config.vocab_size
    rng = np.random.default_rng(0)
    return rng.integers(0, vocabulary, (PROMPTS, LENGTH)).astype(np.int32)


@pytest.fixture(scope="module")
def theirs(file, tokens):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    ).eval()
    with torch.no_grad():
        return model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()


@pytest.mark.parametrize("held", ["float32", "as stored"])
def test_smollm2_has_the_logits_of_transformers(file, tokens, theirs, held):
    model = Llama.from_pretrained(file) if held == "float32" else load_model(file)
    ours = model(Tensor(tokens)).numpy()
    difference = float(np.abs(ours - theirs).max())
    print(f"SmolLM2, {held}: largest difference of logits {difference:.2e}")
    assert difference < 2e-3
    assert (ours.argmax(-1) == theirs.argmax(-1)).all()
