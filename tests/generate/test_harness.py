"""The model for lm-evaluation-harness: what it answers is what the model says."""

import sys

import numpy as np
import pytest
from chat_helpers import CONTEXT, answer_text, chat_model, chat_tokenizer, prompt_text

from tinyllama import lm_eval as door
from tinyllama.errors import ConfigError
from tinyllama.generate.completion import log_softmax
from tinyllama.generate.generator import Generator
from tinyllama.model.build import load_model


def test_a_missing_package_is_named_with_the_extra_that_has_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert door.main() == 2
    line = "lm_eval is not installed: pip install 'tinyllama-trainer[lm-eval]'\n"
    assert capsys.readouterr().err == line


def test_logits_after_each_token_are_those_after_each_beginning():
    model, text = load_model(chat_model()), chat_tokenizer().encode("The quick brown fox " * 5)
    assert len(text) > 40
    one, each = Generator(model, 96), Generator(model, 96)
    for first in (0, 3, len(text) - 1):
        rows = list(one.following(text, first))
        assert len(rows) == len(text) - first
        for number, row in enumerate(rows, first):
            np.testing.assert_allclose(row, each.follow(text[: number + 1]), atol=1e-4)
    before = one.decoder.computed
    list(one.following([*text[:-2], 7], len(text) - 2))  # all but the last token are known
    assert one.decoder.computed == before + 1


# ---- with the package (make lm-eval)


class Asked:
    """What lm_eval calls an instance."""

    def __init__(self, *args):
        self.args = args


@pytest.fixture(scope="module")
def harness():
    pytest.importorskip("lm_eval")
    from lm_eval.api.registry import get_model

    door.register()
    words = f"pretrained={chat_model()},max_length=64"
    return get_model("tinyllama").create_from_arg_string(words, {"batch_size": 1, "device": None})


def by_hand(context, continuation):
    """ln p of ids behind ids, from logits that are computed one text at a time."""
    generator = Generator(load_model(chat_model()), CONTEXT)
    total, greedy = 0.0, True
    for count, token in enumerate(continuation):
        logits = generator.follow([*context, *continuation[:count]])
        total += log_softmax(logits)[token]
        greedy &= int(logits.argmax()) == token
    return total, greedy


def test_log_likelihoods_are_the_models_own(harness):
    encode = chat_tokenizer().encode
    pairs = [("The quick", " brown fox"), ("The quick", " dog"), ("", "a text"), ("The ", "end")]
    greedy = answer_text("The quick", 4)
    found = harness.loglikelihood([Asked(*pair) for pair in [*pairs, ("The quick", greedy)]])
    quick = encode("The quick")
    expected = [
        by_hand(quick, encode("The quick brown fox")[len(quick) :]),
        by_hand(quick, encode("The quick dog")[len(quick) :]),
        by_hand([chat_tokenizer().bos_id], encode("a text")),
        by_hand(encode("The"), encode("The end")[len(encode("The")) :]),
    ]
    for got, (total, likeliest) in zip(found, expected, strict=False):
        assert got[0] == pytest.approx(total, rel=1e-4) and got[1] == likeliest
    assert found[4][1] and not found[0][1]


def test_a_long_text_is_scored_in_windows_each_token_once(harness):
    text = "The quick brown fox jumps over the lazy dog. " * 4
    ids = chat_tokenizer().encode(text)
    assert 64 < len(ids) < 128
    total = by_hand([chat_tokenizer().bos_id], ids[:64])[0]
    total += by_hand(ids[len(ids) - 65 : 64], ids[64:])[0]  # behind as much as the context holds
    (found,) = harness.loglikelihood_rolling([Asked(text)])
    assert found == pytest.approx(total, rel=1e-4)


def test_a_context_that_is_too_long_loses_its_beginning(harness):
    ids = chat_tokenizer().encode("fox " * 90)
    ((found, _),) = harness._loglikelihood_tokens([(None, ids, ids[:3])])
    assert found == pytest.approx(by_hand(ids[-62:], ids[:3])[0], rel=1e-4)


def test_an_answer_ends_before_a_stop_string(harness):
    whole = answer_text("The quick", 12)
    options = {"until": [whole[6:9]], "max_gen_toks": 12, "do_sample": False}
    assert harness.generate_until([Asked("The quick", options)]) == [
        whole[: whole.index(whole[6:9])]
    ]
    with pytest.raises(ConfigError, match="gen_kwargs: got num_beams, must be one of until"):
        harness.generate_until([Asked("The", {"until": [], "num_beams": 2})])
    with pytest.raises(ConfigError, match="max_gen_toks: got 64, must be below the context of 64"):
        harness.generate_until([Asked("The", {"until": [], "max_gen_toks": 64})])


def test_messages_become_the_templates_text(harness):
    messages = [{"role": "user", "content": "Hello"}]
    assert harness.apply_chat_template(messages) == prompt_text("Hello")
    messages.append({"role": "assistant", "content": "I say"})
    text = harness.apply_chat_template(messages, add_generation_prompt=False)
    assert text == prompt_text("Hello") + "I say"
    assert "im_start" in harness.chat_template(True) and harness.chat_template(False) is None
    ids = chat_tokenizer().encode(prompt_text("Hello"), special=True)
    assert harness.tok_encode(prompt_text("Hello")) == ids


def test_unknown_words_of_model_args_are_refused(harness):
    with pytest.raises(ConfigError, match="model_args: got dtype, must be one of pretrained"):
        type(harness)(str(chat_model()), dtype="float32")
    with pytest.raises(ConfigError, match="max_length: got 9999, must be at most the model's"):
        type(harness)(str(chat_model()), max_length=9999)
