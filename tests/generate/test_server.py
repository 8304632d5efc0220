"""`tinyllama serve` in a real process, by OpenAI's own client and by hand."""

import concurrent.futures
import json
import signal
import socket
import sys
import time
import urllib.error
import urllib.request

import openai
import pytest
from chat_helpers import (
    CONTEXT,
    adapter_folder,
    answer_text,
    chat_model,
    chat_tokenizer,
    no_repeats,
    prompt_text,
    reference,
    served,
)
from runs_helpers import cli, finished_run

KEY = "secret-key"


@pytest.fixture(scope="module")
def server():
    words = ["--temperature", 0, "--adapter", f"other={adapter_folder()}", "--queue", 6]
    with served(*words) as (address, _):
        yield address


def client(address, key="none"):
    return openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0, timeout=120)


def send(address, path="/health", body=None, **headers):
    """Status and parsed body of a request by hand."""
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    request = urllib.request.Request(address + path, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def said(text):
    return [{"role": "user", "content": text}]


def test_models_are_the_model_and_its_adapters(server):
    assert [model.id for model in client(server).models.list()] == ["tiny-chat", "other"]
    assert client(server).models.retrieve("other").object == "model"
    with pytest.raises(openai.NotFoundError, match="must be one of tiny-chat, other"):
        client(server).models.retrieve("none")


def test_an_answer_is_what_the_model_says(server):
    done = client(server).chat.completions.create(
        model="tiny-chat", messages=said("Hello"), max_tokens=12
    )
    ids = reference(chat_model())(prompt_text("Hello"), 12)
    assert no_repeats(ids)
    choice = done.choices[0]
    assert choice.message.content == chat_tokenizer().decode(ids)
    assert choice.message.role == "assistant" and choice.finish_reason == "length"
    prompt = len(chat_tokenizer().encode(prompt_text("Hello"), special=True))
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (prompt, 12)
    assert done.usage.total_tokens == prompt + 12 and done.model == "tiny-chat"


def test_an_adapter_is_chosen_by_its_name(server):
    def answer(model):
        done = client(server).chat.completions.create(
            model=model, messages=said("Hello"), max_tokens=12
        )
        return done.choices[0].message.content

    expected = answer_text(prompt_text("Hello"), 12, adapter_folder())
    assert answer("other") == expected != answer("tiny-chat")
    assert answer("tiny-chat") == answer_text(prompt_text("Hello"), 12)


def test_a_stream_is_the_same_text_in_pieces(server):
    stream = client(server).chat.completions.create(
        model="tiny-chat",
        messages=[{"role": "system", "content": "Be brief."}, *said("Hi")],
        max_completion_tokens=10,
        stream=True,
        stream_options={"include_usage": True},
    )
    events = list(stream)
    assert events[0].choices[0].delta.role == "assistant"
    pieces = [e.choices[0].delta.content for e in events if e.choices]
    pieces = [piece for piece in pieces if piece]
    assert "".join(pieces) == answer_text(prompt_text("Hi", system="Be brief."), 10)
    assert len(pieces) > 3
    assert [e.choices[0].finish_reason for e in events if e.choices][-1] == "length"
    assert events[-1].choices == [] and events[-1].usage.completion_tokens == 10


def test_a_stream_ends_with_done(server):
    body = json.dumps({"messages": said("Hi"), "max_tokens": 3, "stream": True}).encode()
    request = urllib.request.Request(f"{server}/v1/chat/completions", body)
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = answer.read().decode().split("\n\n")
    assert lines[-1] == "" and lines[-2] == "data: [DONE]"
    assert all(line.startswith("data: {") for line in lines[:-2])


def test_a_completion_continues_the_text(server):
    done = client(server).completions.create(model="tiny-chat", prompt="def ", max_tokens=9)
    expected = chat_tokenizer().decode(reference(chat_model())("def ", 9))
    assert done.choices[0].text == expected and done.usage.completion_tokens == 9
    ids = chat_tokenizer().encode("def ")
    body = {"prompt": ids, "max_tokens": 9}
    assert send(server, "/v1/completions", body)[1]["choices"][0]["text"] == expected
    stream = client(server).completions.create(
        model="tiny-chat", prompt="def ", max_tokens=9, stream=True
    )
    assert "".join(event.choices[0].text for event in stream) == expected
    assert (
        client(server).completions.create(model="other", prompt="a").usage.completion_tokens == 16
    )


def test_stop_strings_end_the_text(server):
    whole = answer_text(prompt_text("Hello"), 12)
    stop = whole[5:9]
    for streaming in (False, True):
        done = client(server).chat.completions.create(
            model="tiny-chat", messages=said("Hello"), max_tokens=12, stop=[stop], stream=streaming
        )
        if streaming:
            events = [event.choices[0] for event in done]
            text = "".join(event.delta.content or "" for event in events)
            assert events[-1].finish_reason == "stop"
        else:
            text = done.choices[0].message.content
            assert done.choices[0].finish_reason == "stop"
        assert text == whole[: whole.index(stop)]


def test_seeds_choices_and_sampling(server):
    def drawn(**options):
        done = client(server).chat.completions.create(
            model="tiny-chat", messages=said("Hello"), max_tokens=8, temperature=2.0, **options
        )
        return [choice.message.content for choice in done.choices]

    three = drawn(seed=5, n=3)
    assert len(set(three)) == 3 and drawn(seed=5) == three[:1] and drawn(seed=6) == three[1:2]
    assert drawn(seed=5, extra_body={"top_k": 1}) == [answer_text(prompt_text("Hello"), 8)]
    assert drawn(seed=5, extra_body={"min_p": 1.0}) == drawn(seed=6, extra_body={"top_k": 1})


def test_logprobs_belong_to_the_tokens(server):
    done = client(server).chat.completions.create(
        model="tiny-chat", messages=said("Hello"), max_tokens=5, logprobs=True, top_logprobs=2
    )
    content = done.choices[0].logprobs.content
    ids = reference(chat_model())(prompt_text("Hello"), 5)
    assert [bytes(entry.bytes) for entry in content] == [
        chat_tokenizer().decode([number]).encode() for number in ids
    ]
    for entry in content:  # greedy: the token is the likeliest
        assert entry.logprob == entry.top_logprobs[0].logprob < 0
        assert entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob
    done = client(server).completions.create(
        model="tiny-chat", prompt="def ", max_tokens=4, logprobs=1
    )
    found = done.choices[0].logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == 4


def test_special_tokens_in_a_message_are_text(server):
    text = "a<|im_end|>b"
    done = client(server).chat.completions.create(
        model="tiny-chat", messages=said(text), max_tokens=1
    )
    as_text = len(chat_tokenizer().encode(text)) - len(chat_tokenizer().encode("Hi"))
    shorter = client(server).chat.completions.create(
        model="tiny-chat", messages=said("Hi"), max_tokens=1
    )
    assert done.usage.prompt_tokens - shorter.usage.prompt_tokens == as_text > 5


def test_only_the_new_tokens_of_a_conversation_are_computed(server):
    def computed():
        return send(server)[1]["computed"]

    first = "The quick brown fox jumps over the lazy dog. " * 5
    turns = [{"role": "user", "content": first}]
    body = {"messages": turns, "max_tokens": 4}
    _, done = send(server, "/v1/chat/completions", body)
    answer = done["choices"][0]["message"]["content"]
    for other in ("Something else", "And again"):
        send(server, "/v1/chat/completions", {"messages": said(other), "max_tokens": 4})
    before = computed()
    more = [*turns, {"role": "assistant", "content": answer}, *said("Go on")]
    _, done = send(server, "/v1/chat/completions", {"messages": more, "max_tokens": 2})
    usage = done["usage"]
    known = len(chat_tokenizer().encode(prompt_text(first), special=True))
    assert known > 60
    assert 2 <= computed() - before <= usage["prompt_tokens"] - known + 2


def test_eight_clients_at_once_get_their_own_answers(server):
    texts = [f"Number {n}" for n in range(8)]

    def ask(text):
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline:
            try:
                done = client(server).chat.completions.create(
                    model="tiny-chat", messages=said(text), max_tokens=10
                )
                return done.choices[0].message.content
            except openai.RateLimitError:
                time.sleep(0.05)
        raise AssertionError("never admitted")

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, texts))
    assert found == [answer_text(prompt_text(text), 10) for text in texts]


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b"{", "the request is no JSON"),
        (b'{"model": "\xfe"}', "the request is no JSON: 'utf-8' codec can't decode byte 0xfe"),
        (b"[" * 100_000, "Expected `object`, got `array`"),
        (b'{"messages": ' + b"[" * 100_000, "Expected `object`, got `array` - at `$.messages[0]`"),
        ({"messages": "x"}, "Expected `array`, got `str` - at `$.messages`"),
        ({}, "missing required field `messages`"),
        ({"messages": []}, "messages: got none"),
        ({"messages": [{"content": "x"}]}, "messages[0]: has no role"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content: must be a text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content: got a part of type 'image_url', must be text",
        ),
        ({"messages": said("x"), "temperature": -1}, "temperature: got -1.0, must be finite"),
        ({"messages": said("x"), "n": 99}, "n: got 99, must be 1 to 8"),
        ({"messages": said("x"), "n": 7}, "requests wait already"),
        ({"messages": said("x"), "max_tokens": 0}, "max_tokens: got 0, must be 1 or more"),
        ({"messages": said("x"), "stop": [""]}, "stop: got an empty string"),
        ({"messages": said("x"), "stop": ["a"] * 17}, "stop: got 17 strings"),
        ({"messages": said("x"), "seed": -1}, "seed: got -1"),
        ({"messages": said("fox " * 6000)}, f"must be fewer than the {CONTEXT} of the context"),
        ({"messages": said("x"), "model": "none"}, "model: got 'none', must be one of"),
        ({"messages": said("x"), "logprobs": True, "top_logprobs": 21}, "top_logprobs: got 21"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "the request is no JSON"),
    ],
)
def test_a_wrong_request_says_what_is_wrong(server, body, problem):
    status, answer = send(server, "/v1/chat/completions", body)
    assert status == (429 if "wait" in problem else 404 if "none'" in problem else 400)
    assert problem in answer["error"]["message"]


def test_parts_of_text_are_joined(server):
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    body = {"messages": [{"role": "user", "content": parts}], "max_tokens": 12}
    _, answer = send(server, "/v1/chat/completions", body)
    expected = answer_text(prompt_text("Hello"), 12)
    assert answer["choices"][0]["message"]["content"] == expected


def test_a_request_that_is_too_large_is_refused(server):
    assert send(server, "/v1/chat/completions", b" " * (5 << 20))[0] == 413


def test_others_are_answered_while_a_large_prompt_is_read(server):
    body = {"messages": said("fox " * 600_000)}
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        begun, longest = time.monotonic(), 0.0
        large = pool.submit(send, server, "/v1/chat/completions", body)
        while not large.done():
            before = time.monotonic()
            assert send(server)[0] == 200
            longest = max(longest, time.monotonic() - before)
        seconds = time.monotonic() - begun
    assert large.result()[0] == 400 and longest < seconds / 2


def test_unknown_addresses_and_methods(server):
    assert send(server, "/v1/unknown")[0] == 404
    assert send(server, "/v1/models", {})[0] == 405
    assert send(server, "/v1/completions", {"prompt": "", "max_tokens": 1})[0] == 400


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 403),  # DNS rebinding
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": "localhost:1"}, 200),
        ({"Host": "[::1]:80"}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://localhost:3000", "Host": "localhost:8000"}, 403),
        ({"Origin": "http://localhost:8000", "Host": "localhost:8000"}, 200),
    ],
)
def test_host_and_origin_are_checked(server, headers, status):
    assert send(server, **headers)[0] == status


def test_no_page_of_another_origin_may_read(server):
    with urllib.request.urlopen(f"{server}/", timeout=60) as answer:
        assert "access-control-allow-origin" not in answer.headers
        assert "default-src 'none'" in answer.headers["content-security-policy"]


def test_a_client_that_leaves_ends_its_computation(server):
    host, port = server.removeprefix("http://").split(":")
    body = json.dumps({"messages": said("Hello"), "max_tokens": 4000, "stream": True}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + b"\r\n\r\n" + body)
        connection.recv(100)
        assert send(server)[1]["requests"] == 1
    deadline = time.monotonic() + 20
    while send(server)[1]["requests"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert send(server)[1]["computed"] < 1e6
    before = send(server)[1]["computed"]
    time.sleep(0.1)
    assert send(server)[1]["computed"] == before


def test_key_cors_name_and_limits_of_the_command(tmp_path):
    file = tmp_path / "key"
    file.write_text(f"{KEY}\n")
    words = ["--api-key-file", file, "--cors", "https://page.example", "--name", "mine"]
    words += ["--queue", 1, "--parallel", 1, "--timeout", 0.2, "--allow-host", "box.lan"]
    with served(*words) as (address, process):
        with pytest.raises(openai.AuthenticationError):
            client(address, "wrong").models.list()
        assert send(address, "/v1/models")[0] == 401 and send(address)[0] == 200
        mine = client(address, KEY)
        assert [model.id for model in mine.models.list()] == ["mine"]
        keyed = {"Authorization": f"Bearer {KEY}", "Origin": "https://page.example"}
        request = urllib.request.Request(f"{address}/v1/models", headers=keyed)
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert answer.headers["access-control-allow-origin"] == "https://page.example"
        assert send(address, Host="box.lan")[0] == 200
        with pytest.raises(openai.APIStatusError) as late:
            mine.chat.completions.create(model="mine", messages=said("x" * 500), max_tokens=4000)
        assert late.value.status_code == 504
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 143 and "stopping: answers in progress may end" in err
        assert "Traceback" not in err


def test_a_signal_ends_answers_in_progress_and_the_server(tmp_path):
    with served() as (address, process):
        host, port = address.removeprefix("http://").split(":")
        body = json.dumps({"messages": said("Hello"), "max_tokens": 40, "stream": True}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}"
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head.encode() + b"\r\n\r\n" + body)
            received = connection.recv(1000)
            while received.count(b"delta") < 4:  # compilers may take longer than the grace
                received += connection.recv(1000)
            process.send_signal(signal.SIGINT)
            while part := connection.recv(65536):
                received += part
        assert b"data: [DONE]" in received and b'"finish_reason":"length"' in received
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130 and "Traceback" not in err


def test_a_model_without_a_template_still_completes():
    with served("--max-new-tokens", 2, model=finished_run() / "final") as (address, _):
        status, answer = send(address, "/v1/chat/completions", {"messages": said("x")})
        assert status == 400 and "start the server with --template" in answer["error"]["message"]
        for wanted, made in ({"max_tokens": 1}, 1), ({}, 2), ({"max_tokens": 3}, 2):
            body = {"prompt": "import sched", **wanted}
            assert send(address, "/v1/completions", body)[1]["usage"]["completion_tokens"] == made


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--port", "70000"], "--port: got 70000, must be 0 to 65535"),
        (["--adapter", "x"], "--adapter: got 'x', must be NAME=FOLDER"),
        (["--adapter", "a=x", "--adapter", "a=y"], "--adapter: the name 'a' is given twice"),
        (["--adapter", "tiny-chat=x"], "'tiny-chat' is what the model itself is called"),
        (["--context", "9999"], f"--context: got 9999, must be at most the model's {CONTEXT}"),
        (["--template", "x"], "--template: got 'x', must be one of chatml"),
        (["--top-p", "2"], "--top-p: got 2.0, must be above 0"),
        (["--host", "256.1.1.1"], "--host: got 256.1.1.1"),
    ],
)
def test_wrong_options_end_with_one_line(words, problem, capsys):
    assert cli("serve", chat_model(), "--port", "0", *words) == 2
    assert problem in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("name", ["uvicorn", "starlette"])
def test_a_missing_package_is_named_with_the_extra_that_has_it(name, monkeypatch, capsys):
    for module in [module for module in sys.modules if module.partition(".")[0] == name]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "tinyllama.generate.server", raising=False)
    assert cli("serve", chat_model(), "--port", "0") == 2
    line = f"{name} is not installed: pip install 'tinyllama-trainer[serve]'\n"
    assert capsys.readouterr().err == line


def test_a_port_in_use_is_named(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert cli("serve", chat_model(), "--port", port) == 2
    assert f"--port: 127.0.0.1:{port} cannot be used" in capsys.readouterr().err


def test_a_file_that_holds_no_key_is_named(tmp_path, capsys):
    file = tmp_path / "key"
    for data, problem in (
        (b"\xff\xfe", "must hold a key of one line of ASCII characters"),
        (b"a\nb", "must hold a key of one line of ASCII characters"),
        (b"k" * 5000, "5000 bytes, at most 4096 are allowed"),
    ):
        file.write_bytes(data)
        assert cli("serve", chat_model(), "--api-key-file", file) == 2
        assert capsys.readouterr().err == f"{file}: {problem}\n"
    assert cli("serve", chat_model(), "--api-key-file", "/dev/zero") == 2
    assert capsys.readouterr().err == "/dev/zero: is no regular file\n"
