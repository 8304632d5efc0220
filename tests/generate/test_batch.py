"""Several texts at once are each what it is alone, and nothing is computed twice."""

import functools
from dataclasses import replace

import numpy as np
import pytest
from model_helpers import GROUPED, build

from tinyllama.errors import ConfigError
from tinyllama.generate.batch import Batch, Prefixes
from tinyllama.generate.completion import Completion, StopStrings, log_softmax
from tinyllama.generate.generator import Generator, Sampling, common_length
from tinyllama.tokenizers.tokenizer import StreamDecoder

CONTEXT = 96
GREEDY = Sampling(temperature=0)


class Letters:
    """What a completion needs of a tokenizer: id n is the n-th character from "!" on."""

    vocab_size, eos_ids = 90, (0,)

    def stream(self, *, continued=False, special=False):
        return StreamDecoder([chr(33 + n) for n in range(90)], strip=False)


@functools.cache
def model():
    return build(replace(GROUPED, max_seq_len=CONTEXT))


@functools.cache
def batch():
    return Batch(model(), CONTEXT, 4)


@functools.cache
def generator():
    return Generator(model(), vocabulary=90)


def prompt(length, seed=0):
    return np.random.default_rng([length, seed]).integers(1, 90, length).tolist()


def completion(ids, count=12, sampling=GREEDY, **options):
    return Completion(Letters(), ids, count, sampling, ends=(), **options)


def alone(ids, count=12, sampling=GREEDY):
    return list(Generator(model(), vocabulary=90).tokens(ids, count, sampling))


def run(batch, waiting):
    """All completions through a batch, each as early as there is room; the most that ran."""
    waiting, most = [*waiting], 0
    while waiting or not batch.is_idle:
        if waiting and batch.has_room:
            batch.begin(waiting.pop(0))
        batch.advance()
        most = max(most, len(batch._rows))
    return most


def test_texts_that_come_and_go_are_each_what_it_is_alone():
    lengths = [(5, 12), (40, 3), (33, 20), (1, 7), (64, 9), (17, 1), (9, 30)]
    given = [completion(prompt(length), count) for length, count in lengths]
    assert run(batch(), given) == 4
    for each, (length, count) in zip(given, lengths, strict=True):
        assert each.text == prompt(length) + alone(prompt(length), count)
        assert each.finish_reason == "length"


def test_each_text_has_its_own_draws():
    hot = [Sampling(temperature=2.0, seed=seed) for seed in (1, 2, 1)]
    given = [completion(prompt(6), sampling=sampling) for sampling in hot]
    run(batch(), given)
    texts = [each.text[6:] for each in given]
    assert texts[0] == texts[2] == alone(prompt(6), sampling=hot[0]) != texts[1]


def test_a_text_that_is_dropped_leaves_the_others_as_they_are():
    given = [completion(prompt(10, seed), 20) for seed in range(4)]
    several = Batch(model(), CONTEXT, 4)
    for each in given:
        several.begin(each)
        several.advance()
    several.drop(given[1])
    left = len(given[1].text)
    run(several, [])
    assert len(given[1].text) == left < 30
    for seed in (0, 2, 3):
        assert given[seed].text[10:] == alone(prompt(10, seed), 20)


def test_a_text_may_be_dropped_while_its_prompt_is_read():
    several = Batch(model(), CONTEXT, 2)
    long = completion(prompt(80))
    several.begin(long)
    several.advance()
    assert not several.has_room
    several.drop(long)
    assert several.is_idle
    other = completion(prompt(7))
    run(several, [other])
    assert other.text[7:] == alone(prompt(7))


def test_of_a_known_beginning_only_the_rest_is_computed():
    several = Batch(model(), CONTEXT, 2)
    first = completion(prompt(40), 10)
    run(several, [first])
    assert several.computed == 40 + 9  # the last token is never read
    run(several, [completion(prompt(30, 5), 2)])
    before = several.computed
    longer = first.text[:45] + prompt(4, 3)
    again = completion(longer, 5)
    run(several, [again])
    assert several.computed - before == 4 + 4
    assert again.text[len(longer) :] == alone(longer, 5)


def test_what_is_kept_of_texts_is_limited():
    kept = Prefixes(1000)
    part = np.zeros(100, np.float32)
    kept.add([1, 2], [part])
    kept.add([1, 2, 3], [part])  # takes the place of its beginning
    kept.add([7], [part])
    assert kept.bytes == 800 and kept.longest([1, 2, 9])[:2] == (2, [1, 2, 3])
    kept.add([8], [part])  # too much: the one not used for longest goes
    assert kept.bytes == 800
    assert kept.longest([7, 7])[0] == 0 and kept.longest([1, 2, 3, 4])[0] == 3
    kept.add([9] * 5, [np.zeros(1001, np.uint8)])
    assert kept.bytes == 0 and kept.longest([9]) is None


def test_the_cache_is_kept_between_texts():
    one = Generator(model(), vocabulary=90)
    first = list(one.tokens(prompt(40), 8, GREEDY))
    assert one.decoder.computed == 40 + 7
    text = prompt(40) + first + prompt(6, 1)
    second = list(one.tokens(text, 8, GREEDY))
    assert one.decoder.computed == 47 + 1 + 6 + 7
    assert second == alone(text, 8)
    assert list(one.tokens(prompt(40), 8, GREEDY)) == first
    assert one.decoder.computed == 61 + 1 + 7


def test_common_beginnings():
    assert common_length([1, 2, 3], [1, 2, 4]) == 2
    assert common_length([1, 2], [1, 2, 4]) == common_length([1, 2, 4], [1, 2]) == 2
    assert common_length([], [1]) == common_length([2], [1]) == 0


# ---- the text of tokens


def test_a_stop_string_ends_the_text_wherever_tokens_end():
    for size in (1, 2, 3, 20):
        text, found = "one two ENDING three", StopStrings(["END", "thr"])
        pieces = [found.push(text[at : at + size]) for at in range(0, len(text), size)]
        assert "".join(pieces) == "one two " and found.found and found.flush() == ""


def test_text_that_only_begins_like_a_stop_string_is_given_out():
    found = StopStrings(["</s>"])
    assert [found.push(piece) for piece in ("a<", "/", "b", "<", "</")] == [
        "a", "", "</b", "", "<",
    ]  # fmt: skip
    assert not found.found and found.flush() == "</"


def test_the_first_of_several_stop_strings_counts():
    found = StopStrings(["cd", "b"])
    assert found.push("abcd") == "a"
    with pytest.raises(ConfigError, match="stop: got an empty string"):
        StopStrings(["x", ""])


def test_a_completion_ends_at_the_end_token_or_its_limit():
    ids = alone(prompt(5))
    ended = Completion(Letters(), prompt(5), 12, GREEDY, ends=(ids[4],))
    text = "".join(ended.run(generator()))
    place = ids.index(ids[4])
    assert text == "".join(chr(33 + n) for n in ids[:place]) and ended.made == place
    assert ended.finish_reason == "stop"
    whole = completion(prompt(5))
    assert len("".join(whole.run(generator()))) == 12 and whole.finish_reason == "length"


def test_a_stop_string_of_several_tokens_ends_a_completion():
    letters = "".join(chr(33 + n) for n in alone(prompt(5)))
    stopped = completion(prompt(5), stop=[letters[6:9]])
    place = letters.index(letters[6:9])
    assert "".join(stopped.run(generator())) == letters[:place]
    assert stopped.finish_reason == "stop"


def test_logprobs_are_those_of_the_model():
    logits = np.array([0.0, np.log(3.0), 0.0], np.float32)
    assert np.exp(log_softmax(logits)) == pytest.approx([0.2, 0.6, 0.2])
    each = completion(prompt(5), logprobs=True)
    made = each.advance(generator().follow(prompt(5)))
    assert made.logprobs.argmax() == made.token and np.exp(made.logprobs).sum() == pytest.approx(1)


def test_a_completion_that_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="90 prompt tokens and 12 new ones are more than the 96"):
        next(completion(prompt(90)).run(generator()))
