"""Generation: the cache changes nothing but the speed, and the draws follow the probabilities."""

import functools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from model_helpers import GROUPED, build, random_weights, reference_logits
from runs_helpers import cli, finished_run, tokenizer

from tinyllama.errors import ConfigError
from tinyllama.generate.generator import PROMPT_CHUNK, Generator
from tinyllama.generate.sampling import Sampling
from tinyllama.model.llama import Block

GREEDY = Sampling(temperature=0)
CONTEXT = 64


@functools.cache
def generator():
    return Generator(build(replace(GROUPED, max_seq_len=CONTEXT)))


def prompt(length):
    return np.random.default_rng(length).integers(3, GROUPED.vocab_size, length).tolist()


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
