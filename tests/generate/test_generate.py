"""Generation: the cache changes nothing but the speed, and the draws follow the probabilities."""

import functools
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from model_helpers import GROUPED, build, random_weights, reference_logits
from runs_helpers import cli, finished_run, tokenizer

from tinyllama.errors import ConfigError, WeightsError
from tinyllama.generate.generator import (
    PROMPT_CHUNK,
    Generator,
    Sampling,
    sample,
)
from tinyllama.model.llama import Block

GREEDY = Sampling(temperature=0)
CONTEXT = 64
LOGITS = np.log(np.array([0.05, 0.4, 0.1, 0.15, 0.3], np.float32))


@functools.cache
def generator():
    return Generator(build(replace(GROUPED, max_seq_len=CONTEXT)))


def prompt(length):
    return np.random.default_rng(length).integers(3, GROUPED.vocab_size, length).tolist()


def draws(sampling, count=4000, logits=LOGITS):
    random = np.random.Generator(np.random.PCG64(sampling.seed))
    found = Counter(sample(logits, sampling, random) for _ in range(count))
    return {token: times / count for token, times in sorted(found.items())}


@pytest.mark.parametrize("length", [1, 5, PROMPT_CHUNK, PROMPT_CHUNK + 8])
def test_greedy_generation_is_the_uncached_forward_pass_token_for_token(length):
    given = prompt(length)
    new = list(generator().tokens(given, 15, GREEDY))
    logits = reference_logits(random_weights(GROUPED), GROUPED, np.array([given + new]))[0]
    assert new == logits[length - 1 : -1].argmax(-1).tolist()
    assert len(set(new)) > 3  # not one token again and again, which would prove little


def test_greedy_generation_is_the_model_called_without_a_cache():
    from tinygrad import Tensor

    ids = prompt(PROMPT_CHUNK + 8)
    new = list(generator().tokens(ids, 15, GREEDY))
    logits = generator().model(Tensor(np.array([ids + new], np.int32))).numpy()[0]
    assert new == logits[len(ids) - 1 : -1].argmax(-1).tolist()


def test_the_whole_context_can_be_filled():
    new = list(generator().tokens(prompt(50), CONTEXT - 50, GREEDY))
    assert new == list(generator().tokens(prompt(50), 5, GREEDY)) + new[5:]
    assert len(new) == CONTEXT - 50


def test_more_than_the_context_is_refused():
    with pytest.raises(ConfigError, match="50 prompt tokens and 15 new ones are more than the 64"):
        next(generator().tokens(prompt(50), 15, GREEDY))
    with pytest.raises(ConfigError, match="the prompt holds no token"):
        next(generator().tokens([], 1, GREEDY))


def test_a_length_below_the_context_is_a_limit_too():
    limited = Generator(generator().model, length=10)
    with pytest.raises(ConfigError, match="8 prompt tokens and 3 new ones are more than the 10"):
        next(limited.tokens(prompt(8), 3, GREEDY))


def test_generation_ends_before_a_stop_token():
    new = list(generator().tokens(prompt(5), 15, GREEDY))
    stop = new[6]
    assert list(generator().tokens(prompt(5), 15, GREEDY, stop=[stop])) == new[: new.index(stop)]


def test_the_same_seed_draws_the_same_tokens_and_another_seed_others():
    def drawn(seed):
        return list(generator().tokens(prompt(5), 15, Sampling(temperature=3.0, seed=seed)))

    assert drawn(1) == drawn(1) != drawn(2)


def test_a_layer_is_built_once_for_a_prompt_and_once_for_a_token(monkeypatch):
    built = Counter()
    cached = Block.cached

    def counting(self, x, *rest):
        built[x.shape[1]] += 1
        return cached(self, x, *rest)

    monkeypatch.setattr(Block, "cached", counting)
    list(Generator(build(replace(GROUPED, num_layers=5))).tokens(prompt(3), 3, GREEDY))
    assert built == {PROMPT_CHUNK: 1, 1: 1}


def test_ids_beyond_the_vocabulary_are_never_drawn():
    limited = Generator(generator().model, vocabulary=7)
    assert max(limited.tokens(prompt(5), 20, Sampling(temperature=50.0))) < 7


def test_draws_follow_the_probabilities():
    assert draws(Sampling(temperature=1.0)) == pytest.approx(
        {0: 0.05, 1: 0.4, 2: 0.1, 3: 0.15, 4: 0.3}, abs=0.03
    )


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_the_temperature_is_a_power_of_the_probabilities(temperature):
    powers = np.exp(LOGITS) ** (1 / temperature)
    expected = dict(enumerate((powers / powers.sum()).tolist()))
    assert draws(Sampling(temperature=temperature)) == pytest.approx(expected, abs=0.03)


def test_temperature_zero_takes_the_likeliest():
    assert draws(GREEDY, 20) == {1: 1.0}


def test_top_k_keeps_the_likeliest_in_proportion():
    found = draws(Sampling(temperature=1.0, top_k=2))
    assert found == pytest.approx({1: 4 / 7, 4: 3 / 7}, abs=0.03)
    assert set(draws(Sampling(temperature=1.0, top_k=99))) == {0, 1, 2, 3, 4}


def test_top_p_keeps_the_fewest_that_reach_it():
    assert set(draws(Sampling(temperature=1.0, top_p=0.69))) == {1, 4}
    assert set(draws(Sampling(temperature=1.0, top_p=0.71))) == {1, 3, 4}
    assert set(draws(Sampling(temperature=1.0, top_p=0.01))) == {1}
    assert set(draws(Sampling(temperature=1.0, top_p=1.0))) == {0, 1, 2, 3, 4}
    found = draws(Sampling(temperature=1.0, top_p=0.71))
    assert found == pytest.approx({1: 8 / 17, 3: 3 / 17, 4: 6 / 17}, abs=0.03)


def test_top_k_and_top_p_act_together():
    assert set(draws(Sampling(temperature=1.0, top_k=3, top_p=0.8))) == {1, 4}


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("temperature", -0.1, "finite and 0 or more"),
        ("temperature", math.nan, "finite and 0 or more"),
        ("seed", -1, "0 or more"),
        ("top_k", 0, "1 or more"),
        ("top_p", 0.0, "above 0 and at most 1"),
        ("top_p", 1.1, "above 0 and at most 1"),
    ],
)
def test_a_wrong_option_says_what_is_allowed(option, value, allowed):
    with pytest.raises(ConfigError, match=f"{option}: got {value}, must be {allowed}"):
        Sampling(**{option: value})


def test_logits_that_are_not_finite_are_refused():
    with pytest.raises(WeightsError, match="not finite"):
        sample(np.array([0.0, np.nan], np.float32), Sampling(), np.random.default_rng(0))


def test_the_smallest_temperature_takes_the_likeliest():
    logits = np.array([1.0, 300.0, -300.0], np.float32)
    assert sample(logits, Sampling(temperature=1e-320), np.random.default_rng(0)) == 1


def test_the_command_prints_the_prompt_and_its_continuation(capsys):
    given = "import sched\n\nclass"
    words = ["generate", "--model", finished_run() / "final", "--prompt", given]
    assert cli(*words, "--max-new-tokens", 8, "--temperature", 0) == 0
    out, err = capsys.readouterr()
    assert err.startswith("backend CPU, ")
    from tinyllama.model.llama import Llama

    ids = [tokenizer().bos_id, *tokenizer().encode(given)]
    new = list(Generator(Llama.from_pretrained(finished_run() / "final")).tokens(ids, 8, GREEDY))
    assert out == tokenizer().decode(ids + new) + "\n"
    assert out.startswith(given)


def test_characters_of_several_bytes_are_printed_when_they_are_whole(monkeypatch, capsys):
    text = "é世🙂"
    pieces = tokenizer().encode(text, continued=True)
    assert len(pieces) >= 9  # bytes, for the small tokenizer knows none of these
    seen = []

    def tokens(self, prompt, new_tokens, sampling, stop):
        for piece in pieces:
            yield piece
            seen.append(capsys.readouterr().out)

    monkeypatch.setattr(Generator, "tokens", tokens)
    assert cli("generate", "--model", finished_run() / "final", "--prompt", "a b") == 0
    assert seen == ["a b", "é", "", "", "世", "", "", "", "🙂"]
    assert capsys.readouterr().out == "\n"


def test_a_prompt_that_fills_the_context_is_refused(capsys):
    words = ["generate", "--model", finished_run() / "final", "--prompt", "the quick fox " * 30]
    assert cli(*words) == 2
    out, err = capsys.readouterr()
    assert out == "" and "tokens, must be fewer than the 48 of the model's context" in err
