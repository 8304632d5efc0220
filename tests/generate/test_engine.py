"""The thread that computes requests: every one ends, whatever another one did."""

import queue

import pytest
from test_batch import CONTEXT, alone, completion, model, prompt

from tinyllama.errors import WeightsError
from tinyllama.generate.batch import Batch
from tinyllama.generate.completion import Made
from tinyllama.generate.engine import Busy, Closed, Engine, Request

SECONDS = 60


class Asked:
    """A request, and what was reported of it."""

    def __init__(self, ids, count=12, name="one", deadline=float("inf"), **options):
        self.completion = completion(ids, count, **options)
        self.reported = queue.Queue()
        self.request = Request(name, self.completion, self.reported.put, deadline)

    def until_end(self):
        """All pieces up to the None behind the last one, or the error."""
        found = []
        while True:
            news = self.reported.get(timeout=SECONDS)
            if not isinstance(news, Made):
                assert self.reported.empty()
                return found if news is None else news
            found.append(news)


class Failing(Batch):
    """A batch of which one method fails, the first time that it is called in all batches."""

    def __init__(self, fails, errors):
        super().__init__(model(), CONTEXT, 2)
        self.fails, self.errors = fails, errors

    def begin(self, completion):
        self._fail("begin")
        super().begin(completion)

    def drop(self, completion):
        self._fail("drop")
        super().drop(completion)

    def advance(self):
        self._fail("advance")
        return super().advance()

    def _fail(self, name):
        if name == self.fails and self.errors:
            raise self.errors.pop()


@pytest.fixture
def engine():
    made = Engine({"one": lambda: Batch(model(), CONTEXT, 2)}, queue=3)
    yield made
    made.close()


def asked(engine, *given, **options):
    """A request that has been submitted."""
    one = Asked(*given, **options)
    engine.submit([one.request])
    return one


@pytest.mark.parametrize("count", [1, 2, 3])
def test_short_answers_end_and_others_are_computed_after_them(engine, count):
    # The pass that ends a prompt makes its text's first token and the second one too.
    for seed in (1, 2):
        one = asked(engine, prompt(5, seed), count)
        assert [made.token for made in one.until_end()] == alone(prompt(5, seed), count)
        assert one.completion.finish_reason == "length"


def test_an_end_at_the_second_token_is_reported_once(engine):
    letters = "".join(chr(33 + n) for n in alone(prompt(5)))
    one = asked(engine, prompt(5), stop=[letters[:2]])
    assert "".join(made.text for made in one.until_end()) == ""
    assert one.completion.finish_reason == "stop" and one.completion.made == 2
    assert [made.token for made in asked(engine, prompt(6)).until_end()] == alone(prompt(6))


@pytest.mark.parametrize("fails", ["begin", "advance", "drop"])
def test_a_mistake_of_ours_ends_requests_and_not_the_server(fails, capfd):
    errors = [ZeroDivisionError("a mistake")]
    engine = Engine({"one": lambda: Failing(fails, errors)}, queue=3)
    try:
        first = asked(engine, prompt(40), 50)
        if fails == "drop":  # which the end of its time leads to
            first.reported.get(timeout=SECONDS)
            first.request.deadline = 0.0
        with pytest.raises(RuntimeError, match="the model failed: ZeroDivisionError"):
            while True:
                news = first.reported.get(timeout=SECONDS)
                if isinstance(news, Exception):
                    raise news
        assert engine.load == 0
        assert [made.token for made in asked(engine, prompt(6)).until_end()] == alone(prompt(6))
    finally:
        engine.close()
    assert "ZeroDivisionError: a mistake" in capfd.readouterr().err


def test_an_error_with_words_of_its_own_is_reported_with_them(capfd):
    engine = Engine({"one": lambda: Failing("advance", [WeightsError("no use")])}, queue=3)
    with pytest.raises(WeightsError, match="no use"):
        raise asked(engine, prompt(5)).until_end()
    engine.close()
    assert capfd.readouterr().err == ""


def test_a_request_that_is_late_or_cancelled_computes_nothing_more(engine):
    assert isinstance(asked(engine, prompt(5), deadline=0.0).until_end(), TimeoutError)
    left = asked(engine, prompt(5), 80)
    left.reported.get(timeout=SECONDS)
    engine.cancel(left.request)
    assert [made.token for made in asked(engine, prompt(6)).until_end()] == alone(prompt(6))
    assert engine.load == 0 and left.completion.made < 80


def test_what_waits_is_limited_and_ends_with_the_engine():
    engine = Engine({"one": lambda: Batch(model(), CONTEXT, 1)}, queue=2)
    several = [Asked(prompt(5, seed), 80) for seed in range(3)]
    with pytest.raises(Busy, match="0 requests wait already"):
        engine.submit([one.request for one in several])
    engine.submit([one.request for one in several[:2]])
    engine.close()
    assert all(isinstance(one.until_end(), Closed) for one in several[:2])
    with pytest.raises(Closed):
        engine.submit([several[2].request])


def test_what_is_compiled_beforehand_is_all_that_requests_need(engine, monkeypatch):
    given = [prompt(length, 7) for length in (1, 5, 33, 70)]
    expected = [alone(ids, 9) for ids in given]
    engine.compile("one")
    assert engine.computed == 0
    monkeypatch.setattr("tinyllama.generate.generator.captured", None)
    for pair in (0, 1), (2, 3):  # two at a time
        several = [Asked(given[number], 9) for number in pair]
        engine.submit([one.request for one in several])
        for one, number in zip(several, pair, strict=True):
            assert [made.token for made in one.until_end()] == expected[number]
