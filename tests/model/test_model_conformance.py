"""Logits and loss beside transformers' own LlamaForCausalLM; needs torch and transformers."""

import importlib
import warnings
from dataclasses import replace

import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of their imports, not of our use
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers", minversion="5")
    LlamaForCausalLM = importlib.import_module("transformers.models.llama").LlamaForCausalLM

from model_helpers import (
    EVERY_HEAD,
    GROUPED,
    TIED,
    build,
    difference,
    on_device,
    random_batch,
    random_weights,
)
from tinygrad import Tensor

from tinyllama import Llama
from tinyllama.runtime.storage import read
from tinyllama.train.gradients import StagedLoss

pytestmark = pytest.mark.filterwarnings("default")  # theirs are not ours to turn into errors

CONFIGS = {
    "grouped": GROUPED,
    "tied": TIED,
    "every head": EVERY_HEAD,
    "tied, every head": replace(TIED, num_kv_heads=None),
}


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory):
    """The same weights here and there, carried over by the folder that we write."""
    config = CONFIGS[request.param]
    model = build(config)
    folder = model.save_pretrained(tmp_path_factory.mktemp("conformance") / "model")
    theirs = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return config, model, theirs.eval()


def one_document(config):
    batch = random_batch(config)
    return batch._replace(starts=np.zeros_like(batch.starts))


def test_logits_equal_those_of_transformers(pair):
    config, model, theirs = pair
    tokens = one_document(config).tokens
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens).long()).logits.numpy()
    assert difference(model(Tensor(tokens).realize()).numpy(), expected) < 1e-5


def test_loss_and_gradients_equal_those_of_transformers(pair):
    """Theirs shifts the labels itself and takes the mean; -100 is not trained."""
    config, model, theirs = pair
    batch = one_document(config)
    labels = np.full_like(batch.targets, -100)
    labels[:, 1:] = np.where(batch.targets < 0, -100, batch.targets)[:, :-1]
    theirs.zero_grad()
    tokens = torch.from_numpy(batch.tokens).long()
    mean = theirs(tokens, labels=torch.from_numpy(labels).long()).loss
    count = int((batch.targets >= 0).sum())
    (mean * count).backward()
    loss, grads = StagedLoss(model, model.state_dict()).gradients(*on_device(batch))
    assert float(loss.item()) / count == pytest.approx(mean.item(), rel=1e-5)
    expected = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        assert difference(read(grad), expected[name]) < 1e-5, name


def test_a_folder_of_theirs_gives_their_logits(pair, tmp_path):
    config, _, theirs = pair
    theirs.save_pretrained(tmp_path / "theirs")
    model = Llama.from_pretrained(tmp_path / "theirs")
    for name, values in random_weights(config).items():
        assert (read(model.state_dict()[name]) == values).all()
    tokens = one_document(config).tokens
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens).long()).logits.numpy()
    assert difference(model(Tensor(tokens).realize()).numpy(), expected) < 1e-5
