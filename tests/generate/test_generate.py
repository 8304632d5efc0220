"""Generation: the cache changes nothing but the speed, and the draws follow the probabilities."""

import functools
import io
import json
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

    def drawn(logits, sampling, generator, text):
        seen.append(capsys.readouterr().out)
        return pieces[len(seen) - 1]

    monkeypatch.setattr("tinyllama.generate.completion.sample", drawn)
    words = ["--max-new-tokens", len(pieces)]
    assert cli("generate", "--model", finished_run() / "final", "--prompt", "a b", *words) == 0
    assert seen == ["a b", "", "é", "", "", "世", "", "", ""]
    assert capsys.readouterr().out == "🙂\n"


def test_a_prompt_that_fills_the_context_is_refused(capsys):
    words = ["generate", "--model", finished_run() / "final", "--prompt", "the quick fox " * 30]
    assert cli(*words) == 2
    out, err = capsys.readouterr()
    assert out == "" and "tokens, must be fewer than the 48 of the model's context" in err


def test_a_prompt_can_come_from_standard_input(monkeypatch, capsys):
    words = ["generate", "--model", finished_run() / "final", "--max-new-tokens", 6]
    assert cli(*words, "--prompt", "import sched\n") == 0
    given = capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO("import sched\n"))
    assert cli(*words, "--prompt", "-") == 0
    assert capsys.readouterr().out == given and given.startswith("import sched\n")


def test_prompts_of_a_file_are_each_continued_as_alone(tmp_path, capsys):
    texts = ["import sched", "class Event", "def ", "the quick fox", "for x in range(8):", "a"]
    model = ["generate", "--model", finished_run() / "final", "--max-new-tokens", 7]
    model += ["--temperature", 0]
    alone = []
    for text in texts:
        assert cli(*model, "--prompt", text) == 0
        alone.append(capsys.readouterr().out[len(text) : -1])
    (tmp_path / "prompts.txt").write_text("\n".join(texts) + "\n\n")
    assert cli(*model, "--prompts", tmp_path / "prompts.txt", "--parallel", 3) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prompt"] for row in rows] == texts and [row["text"] for row in rows] == alone
    assert {row["finish_reason"] for row in rows} <= {"stop", "length"}
    lines = [json.dumps({"prompt": text, "id": n}) for n, text in enumerate(texts)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    out = tmp_path / "out.jsonl"
    assert cli(*model, "--prompts", tmp_path / "prompts.jsonl", "--out", out) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["id"], row["text"]) for row in rows] == [*enumerate(alone)]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "line 2: not JSON"),
        ('{"text": "x"}', 'line 2: must be {"prompt": TEXT} or {"messages": [...]}'),
        ('{"prompt": "%s"}' % ("fox " * 60), "line 2: got "),
        ('{"messages": [{"role": "user", "content": "x"}]}', "line 2: the model has no chat"),
    ],
)
def test_a_wrong_row_of_a_file_of_prompts_is_named_before_anything_is_computed(
    tmp_path, capsys, line, problem
):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n' + line + "\n")
    assert cli("generate", "--model", finished_run() / "final", "--prompts", file) == 2
    out, err = capsys.readouterr()
    assert out == "" and f"{file}, {problem}" in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--prompt", "a", "--prompts", "b"], "--prompt: must be left out with --prompts"),
        (["--out", "b"], "--out: must be left out without --prompts"),
        (["--chat"], "--chat: needs a message"),
        (["--template", "chatml"], "--template: must be left out without --chat"),
        (["--min-p", "2"], "--min-p: got 2.0, must be 0 to 1"),
        (["--stop", ""], "--stop: got an empty string"),
        (["--repetition-penalty", "0"], "--repetition-penalty: got 0.0, must be finite"),
    ],
)
def test_options_that_are_wrong_are_refused(words, problem, capsys):
    assert cli("generate", "--model", finished_run() / "final", *words) == 2
    assert problem in capsys.readouterr().err


def test_a_stop_string_ends_what_is_printed(capsys):
    words = ["generate", "--model", finished_run() / "final", "--prompt", "import sched"]
    words += ["--temperature", 0, "--max-new-tokens", 20]
    assert cli(*words) == 0
    new = capsys.readouterr().out[len("import sched") : -1]
    assert cli(*words, "--stop", new[5:8], "--stop", "never there") == 0
    place = new.index(new[5:8])
    assert capsys.readouterr().out == "import sched" + new[:place] + "\n"


def test_prompts_that_are_no_text_are_named(tmp_path, capsys, monkeypatch):
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"a\nb\xff\n")
    assert cli("generate", "--model", finished_run() / "final", "--prompts", file) == 2
    assert capsys.readouterr().err.endswith(f"{file}: not UTF-8 text (0xff)\n")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"b\xfe"), "utf-8"))
    assert cli("generate", "--model", finished_run() / "final", "--prompt", "-") == 2
    assert capsys.readouterr().err.endswith("--prompt -: not UTF-8 text (0xfe)\n")
