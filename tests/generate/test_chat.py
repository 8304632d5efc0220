"""`tinyllama chat`, through a pseudo-terminal and without a terminal."""

import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from chat_helpers import (
    adapter_folder,
    answer_text,
    chat_model,
    chat_tokenizer,
    prompt_text,
)
from runs_helpers import cli, environment, finished_run
from terminal_helpers import Terminal

from tinyllama.errors import ConfigError, DataError
from tinyllama.generate.conversation import Conversation, chat_template, checked_messages, fitting
from tinyllama.generate.generator import Generator, Sampling, common_length
from tinyllama.model.build import load_model

GREEDY = Sampling(temperature=0)
GREEDY_WORDS = ["--temperature", "0", "--max-new-tokens", "8"]


def conversation(system=None, length=None):
    tokenizer = chat_tokenizer()
    generator = Generator(load_model(chat_model()), length)
    return Conversation(generator, tokenizer, chat_template(tokenizer), system)


def terminal(*words):
    """A chat in a terminal."""
    return Terminal("chat", chat_model(), *words)


def chat(monkeypatch, lines, *words):
    """The exit code of a chat whose lines come from a pipe."""
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    return cli("chat", chat_model(), *GREEDY_WORDS, *words)


def test_the_cache_is_kept_over_turns():
    talk = conversation("Be brief.")
    first = "".join(talk.answer("The quick brown fox jumps", 10, GREEDY))
    decoder = talk.generator.decoder
    assert first == answer_text(prompt_text("The quick brown fox jumps", system="Be brief."), 10)
    held, before = [*talk.generator.held], decoder.computed
    second = "".join(talk.answer("And?", 6, GREEDY))
    text = prompt_text("The quick brown fox jumps", first, "And?", system="Be brief.")
    ids = chat_tokenizer().encode(text, special=True)
    known = common_length(held, ids)
    assert known >= len(
        chat_tokenizer().encode(prompt_text("The quick brown fox jumps", system="Be brief."))
    ) // 2  # fmt: skip
    assert decoder.computed - before == len(ids) - known + 5
    assert second == answer_text(text, 6)
    assert [m["role"] for m in talk.all_messages()] == [
        "system", "user", "assistant", "user", "assistant",
    ]  # fmt: skip


def test_an_answer_that_is_left_is_a_message_as_far_as_it_came():
    talk = conversation()
    pieces = iter(talk.answer("Hello", 30, GREEDY))
    said = "".join(next(pieces) for _ in range(6))
    assert talk.messages[1] == {"role": "assistant", "content": said}
    talk.reset()
    assert "".join(talk.answer("Hello", 8, GREEDY)) == answer_text(prompt_text("Hello"), 8)


def test_the_oldest_turns_are_left_out_where_all_do_not_fit():
    template = chat_template(chat_tokenizer())
    messages = [{"role": "system", "content": "Be brief."}]
    for number in range(4):
        messages.append({"role": "user", "content": f"Question {number}"})
        messages.append({"role": "assistant", "content": f"Answer {number}"})
    messages.append({"role": "user", "content": "Last"})
    everything = template.encode_prompt(messages)
    assert fitting(template, messages, len(everything)) == (everything, messages)
    ids, kept = fitting(template, messages, len(everything) - 1)
    assert kept == [messages[0], *messages[3:]] and ids == template.encode_prompt(kept)
    shortest = len(template.encode_prompt([messages[0], messages[9]]))
    ids, kept = fitting(template, messages, shortest)
    assert kept == [messages[0], messages[9]]
    with pytest.raises(ConfigError, match=r"the message is too long: .* must be at most 9"):
        fitting(template, messages, 9)


def test_a_message_that_is_too_long_changes_nothing():
    talk = conversation(length=64)
    with pytest.raises(ConfigError, match="too long"):
        talk.answer("fox " * 100, 5, GREEDY)
    assert talk.messages == []


def test_a_model_without_a_template_needs_the_name_of_one(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
    run = finished_run() / "final"
    assert cli("chat", run, *GREEDY_WORDS) == 2
    assert "no chat template: name the one that it was" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", io.StringIO("a\n"))
    assert cli("chat", run, *GREEDY_WORDS, "--template", "none") == 0
    assert cli("chat", run, *GREEDY_WORDS, "--template", "x") == 2


def test_messages_are_checked():
    with pytest.raises(ConfigError, match=r"messages\[1\]: has no role"):
        checked_messages([{"role": "user", "content": "x"}, {}])
    with pytest.raises(DataError, match="nothing was said yet"):
        conversation().save("unused")


def test_lines_of_a_pipe_are_answered(monkeypatch, capsys, tmp_path):
    file = tmp_path / "chat.jsonl"
    lines = ["Hello", "", "/system", "/system Be brief.", "/system", "Hello", f"/save {file}"]
    assert chat(monkeypatch, [*lines, "/exit", "never read"]) == 0
    out, err = capsys.readouterr()
    first = answer_text(prompt_text("Hello"), 8)
    second = answer_text(prompt_text("Hello", system="Be brief."), 8)
    assert out == f"{first}\nthere is no system prompt\nBe brief.\n{second}\n"
    assert "the conversation is forgotten" in err and f"saved {file}" in err
    saved = [json.loads(line) for line in file.read_text().splitlines()]
    assert saved == [
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Hello"},
                {"role": "assistant", "content": second},
            ]
        }
    ]


def test_an_adapter_of_the_model_can_be_talked_to(monkeypatch, capsys):
    assert chat(monkeypatch, ["Hello"], "--adapter", adapter_folder()) == 0
    expected = answer_text(prompt_text("Hello"), 8, adapter_folder())
    assert capsys.readouterr().out == expected + "\n"
    assert chat(monkeypatch, ["Hello"], "--adapter", adapter_folder(), "--base", "x") == 2


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("/rest", "no command /rest, the nearest is /reset"),
        ("/save", "/save: name a file"),
        ("/save {0}/no/such.jsonl", "nothing was said yet"),
        ("fox " * 6000, "the message is too long"),
    ],
)
def test_a_line_of_a_pipe_that_is_wrong_ends_the_chat(monkeypatch, capsys, tmp_path, line, problem):
    assert chat(monkeypatch, [line.format(tmp_path)]) == 2
    assert problem in capsys.readouterr().err.splitlines()[-1]


# ---- through a terminal


def test_a_chat_in_a_terminal_end_to_end(tmp_path):
    file = tmp_path / "said.jsonl"
    history = tmp_path / "typed"
    with terminal(
        "--temperature", "0", "--max-new-tokens", "4000", "--history", str(history)
    ) as at:
        at.wait_for_prompt(1)
        at.type("Hello\r")
        # A long answer, of which Ctrl-C leaves the beginning.
        beginning = answer_text(prompt_text("Hello"), 3).split("\n")[0].strip()
        at.wait_for(beginning)
        at.type("\x03")
        at.wait_for_prompt(2)
        at.type(f"/save {file}\r")
        at.wait_for_prompt(3)
        at.type("/nonsense\r")
        at.wait_for("no command /nonsense")
        at.wait_for_prompt(4)
        at.type("\x03")
        at.wait_for("/exit or Ctrl-D ends the chat")
        at.wait_for_prompt(5)
        at.type("\x1b[A\x1b[A\x1b[A")  # the third line from below
        time.sleep(0.3)
        at.type("\r")
        time.sleep(1)
        at.type("\x03")
        at.wait_for_prompt(6)
        at.type("\x04")
        assert at.end() == 0
    (line,) = file.read_text().splitlines()
    user, assistant = json.loads(line)["messages"]
    assert user == {"role": "user", "content": "Hello"}
    whole = answer_text(prompt_text("Hello"), 4000)
    assert assistant["content"] and whole.startswith(assistant["content"])
    assert len(assistant["content"]) < len(whole)
    assert [row[1:] for row in history.read_text().splitlines() if row.startswith("+")] == [
        "Hello", f"/save {file}", "/nonsense", "Hello",
    ]  # fmt: skip


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, None)])
def test_a_signal_at_the_prompt(number, code):
    with terminal("--temperature", "0") as at:
        at.wait_for_prompt(1)
        at.process.send_signal(number)
        if code is None:
            time.sleep(0.3)
            at.type("/exit\r")
        assert at.end() == (code or 0)


def test_a_signal_in_an_answer_of_a_pipe_ends_only_the_answer():
    command = [sys.executable, "-m", "tinyllama", "chat", str(chat_model()), "--temperature", "0"]
    process = subprocess.Popen(
        [*command, "--max-new-tokens", "4000"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    try:
        process.stdin.write(b"Hello\n")
        process.stdin.flush()
        seen = os.read(process.stdout.fileno(), 10)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(b"/exit\n", timeout=60)
        assert process.returncode == 0, err
        whole = answer_text(prompt_text("Hello"), 4000).encode()
        assert whole.startswith((seen + out)[:-1]) and len(seen + out) < len(whole)
    finally:
        process.kill()
        process.wait()


def test_a_missing_prompt_toolkit_is_named_before_the_model_is_loaded(monkeypatch, capsys):
    class Typed(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr("sys.stdin", Typed())
    monkeypatch.setattr("sys.stdout", Typed())
    monkeypatch.setitem(sys.modules, "prompt_toolkit", None)
    assert cli("chat", "no/such/model") == 2
    line = (
        "prompt_toolkit is not installed: pip install prompt_toolkit, or give messages on standard"
    )
    assert capsys.readouterr().err == f"{line} input\n"
