"""Losses of pairs and of a teacher beside trl's own trainers; needs torch, transformers and trl."""

import importlib
import warnings

import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of their imports, not of our use
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers", minversion="5")
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    tokenizers = pytest.importorskip("tokenizers")
    LlamaForCausalLM = importlib.import_module("transformers.models.llama").LlamaForCausalLM

from model_helpers import GROUPED, build, difference, random_weights
from tinygrad import Tensor

from tinyllama.data.batches import Batch
from tinyllama.runtime.storage import read
from tinyllama.train.gradients import StagedLoss
from tinyllama.train.losses import Distillation
from tinyllama.train.preferences import DPO, ORPO

pytestmark = pytest.mark.filterwarnings("default")  # theirs are not ours to turn into errors

EOS = 1
ROWS = [
    ("w3 w4 w5", " w6 w7", " w8"),
    ("w9 w10", " w11", " w12 w13 w14 w15"),
    ("w16", " w17 w18 w19", " w20 w21"),
]


def theirs(folder, seed):
    """A model of random weights in both frameworks."""
    model = build(GROUPED, random_weights(GROUPED, seed))
    model.save_pretrained(folder / str(seed))
    loaded = LlamaForCausalLM.from_pretrained(folder / str(seed), dtype=torch.float32)
    return model, loaded.eval()


def word_tokenizer():
    words = {"<pad>": 0, "</s>": EOS, "<unk>": 2}
    words |= {f"w{i}": i for i in range(3, GROUPED.vocab_size)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def pair_rows():
    keys = ("prompt", "chosen", "rejected")
    return datasets.Dataset.from_list([dict(zip(keys, row, strict=True)) for row in ROWS])


def ours(ids, is_answer, is_there):
    """Their rows, chosen ones first, as our batch of pairs one after another."""
    B, L = ids.shape
    order = np.arange(B).reshape(2, -1).T.reshape(-1)
    ids, is_answer, is_there = (np.asarray(x)[order] for x in (ids, is_answer, is_there))
    tokens = ids[:, :-1].astype(np.int32)
    targets = np.where(is_answer[:, 1:] != 0, ids[:, 1:], -1).astype(np.int32)
    positions = np.arange(L - 1, dtype=np.int32)
    starts = np.where(is_there[:, :-1] != 0, 0, positions).astype(np.int32)
    return Batch(tokens, targets, starts)


def on_device(*arrays):
    return [Tensor(np.ascontiguousarray(x)).realize() for x in arrays]


def check(model, loss, batch, more, their_loss, their_model, count):
    """Our summed loss and its gradients against `count` times theirs, which are means."""
    their_model.zero_grad()
    their_loss.backward()
    staged = StagedLoss(model, model.state_dict(), loss)
    sums, grads = staged.gradients(*on_device(*batch), *on_device(*more))
    sums = sums.numpy() / count
    assert sums[0] == pytest.approx(their_loss.item(), rel=1e-5)
    assert staged.loss(*on_device(*batch), *on_device(*more)).numpy() / count == pytest.approx(
        sums, rel=1e-5, abs=1e-6
    )
    expected = {name: p.grad.numpy() for name, p in their_model.named_parameters()}
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        assert difference(read(grad) / count, expected[name]) < 1e-5, name
    return dict(zip(loss.measures, sums[1:], strict=True))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_dpo_is_that_of_trl(beta, smoothing, tmp_path):
    """Their "aot" of a single pair is the loss with label smoothing, which "sigmoid" left out."""
    model, policy = theirs(tmp_path, 0)
    reference, their_reference = theirs(tmp_path, 1)
    kind = {"loss_type": ["aot"], "label_smoothing": smoothing} if smoothing else {}
    args = trl.DPOConfig(
        output_dir=str(tmp_path / "dpo"), beta=beta, report_to=[], use_cpu=True, bf16=False,
        gradient_checkpointing=False, disable_dropout=True, **kind,
    )  # fmt: skip
    trainer = trl.DPOTrainer(
        policy, their_reference, args, train_dataset=pair_rows(), processing_class=word_tokenizer()
    )
    rows = [trainer.train_dataset[i] for i in range(len(ROWS))]
    for chosen in [rows[:1]] if smoothing else [rows, rows[1:2]]:
        inputs = trainer.data_collator(chosen)
        batch = ours(inputs["input_ids"], inputs["completion_mask"], inputs["attention_mask"])
        assert int((batch.targets >= 0).sum()) == int(inputs["completion_mask"].sum())
        known = StagedLoss(reference).log_probabilities(*on_device(*batch)).numpy()
        trainer._metrics["train"].clear()
        trainer._metrics["eval"].clear()
        their_loss = trainer.compute_loss(policy, inputs)
        count = len(chosen)
        found = check(model, DPO(beta, smoothing), batch, [known], their_loss, policy, count)
        metrics = trainer._metrics["eval"] or trainer._metrics["train"]
        names = {"accuracy": "accuracies", "margin": "margins"}
        names |= {"reward_chosen": "chosen", "reward_rejected": "rejected"}
        for name, their_name in names.items():
            assert found[name] == pytest.approx(metrics[f"rewards/{their_name}"][0], abs=2e-5)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_orpo_is_that_of_trl(beta, tmp_path):
    experimental = importlib.import_module("trl.experimental.orpo")
    model, policy = theirs(tmp_path, 0)
    args = experimental.ORPOConfig(
        output_dir=str(tmp_path / "orpo"), beta=beta, report_to=[], use_cpu=True, bf16=False,
        gradient_checkpointing=False, per_device_train_batch_size=len(ROWS), max_length=32,
    )  # fmt: skip
    trainer = experimental.ORPOTrainer(
        policy, args, train_dataset=pair_rows(), processing_class=word_tokenizer()
    )
    inputs = next(iter(trainer.get_train_dataloader()))
    both = trainer.concatenated_inputs(inputs)
    ids = both["concatenated_input_ids"].numpy()
    there = both["concatenated_attention_mask"].numpy()
    batch = ours(ids, both["concatenated_labels"].numpy() != -100, there)
    text = ours(ids, there, there)
    is_answer = batch.targets >= 0
    answer = (is_answer / is_answer.sum(1, keepdims=True)).astype(np.float32)
    is_chosen = (np.arange(len(ids)) % 2 == 0)[:, None]
    targets = np.where(is_chosen, text.targets, batch.targets)
    is_text = (targets >= 0) & is_chosen
    weights = (is_text * (len(ROWS) / is_text.sum())).astype(np.float32)
    their_loss, metrics = trainer.get_batch_loss_metrics(policy, inputs)
    rows = batch._replace(targets=targets)
    more = [answer, weights]
    found = check(model, ORPO(beta), rows, more, their_loss, policy, len(ROWS))
    for name, their_name in (("accuracy", "accuracies"), ("margin", "margins")):
        assert found[name] == pytest.approx(float(metrics[f"rewards/{their_name}"]), abs=1e-5)
    assert found["reward_chosen"] == pytest.approx(float(metrics["rewards/chosen"]), abs=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_distillation_of_the_whole_vocabulary_is_that_of_trl(temperature, tmp_path):
    """Theirs is not multiplied by the temperature's square."""
    gkd = importlib.import_module("trl.experimental.gkd.gkd_trainer").GKDTrainer
    model, student = theirs(tmp_path, 0)
    _, teacher = theirs(tmp_path, 1)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, GROUPED.vocab_size, (2, 17)).astype(np.int32)
    targets = np.roll(tokens, -1, 1)
    targets[:, -1] = -1
    batch = Batch(tokens, targets, np.zeros_like(tokens))
    ids = torch.from_numpy(tokens).long()
    with torch.no_grad():
        wanted = teacher(ids).logits
    labels = torch.from_numpy(targets).long()
    labels[labels < 0] = -100
    count = int((targets >= 0).sum())
    logits = student(ids).logits
    soft = gkd.generalized_jsd_loss(
        logits, wanted, labels, beta=0, temperature=temperature, num_items_in_batch=count
    )
    hard = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels)
    their_loss = 0.3 * hard + 0.7 * temperature**2 * soft
    every = np.broadcast_to(np.arange(GROUPED.vocab_size, dtype=np.int32), wanted.shape)
    loss = Distillation(0.0, 0.0, alpha=0.3, temperature=temperature)
    check(model, loss, batch, [every, wanted.numpy()], their_loss, student, count)
