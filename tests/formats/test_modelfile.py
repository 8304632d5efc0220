"""Ollama's Modelfile: the template, the ends, the first message."""

import re

import pytest

from tinyllama.formats.modelfile import modelfile

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
)
LLAMA2 = "{{ bos_token + '[INST] <<SYS>>\n' + system + '\n<</SYS>>\n\n' + content + ' [/INST]' }}"
MISTRAL = "{{ '[INST] ' + message['content'] + ' [/INST]' }}"
ALPACA = "### Instruction:\n{{ message['content'] }}\n\n### Response:\n"
ZEPHYR = "<|user|>\n{{ message['content'] }}</s>\n<|assistant|>\n"


def go(template, system, prompt, response=""):
    """What Ollama makes of a Go template with these fields, for the little of it used here."""
    values = {".System": system, ".Prompt": prompt, ".Response": response}

    def conditional(found):
        return found[2] if values[found[1]] else ""

    text = re.sub(r"{{ if (\.\w+) }}(.*?){{ end }}", conditional, template, flags=re.DOTALL)
    return re.sub(r"{{ (\.\w+) }}", lambda found: values[found[1]], text)


def template_of(text):
    return re.search(r'^TEMPLATE """(.*?)"""$', text, re.DOTALL | re.MULTILINE)[1]


@pytest.mark.parametrize(
    ("jinja", "rendered"),
    [
        (
            CHATML,
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n"
            "<|im_start|>assistant\n",
        ),
        (
            LLAMA3,
            "<|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nU<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        (LLAMA2, "[INST] <<SYS>>\nS\n<</SYS>>\n\nU [/INST]"),
        (MISTRAL, "[INST] S\n\nU [/INST]"),
        (ALPACA, "S\n\n### Instruction:\nU\n\n### Response:\n"),
        (ZEPHYR, "<|system|>\nS</s>\n<|user|>\nU</s>\n<|assistant|>\n"),
    ],
)
def test_known_templates_are_written_in_ollamas_language(jinja, rendered):
    text = modelfile("model.gguf", jinja, ["</s>"])
    template = template_of(text)
    before, _, _ = go(template, "S", "U", "\0").partition("\0")
    assert before.rstrip(" ") == rendered
    alone = go(template, "", "U")
    assert "SYS" not in alone and "system" not in alone and "U" in alone
    assert 'PARAMETER stop "</s>"\n' in text and text.startswith("FROM ./model.gguf\n")


def test_every_end_stops_once_and_is_quoted():
    text = modelfile("m.gguf", CHATML, ["<|im_end|>", 'a"b'])
    stops = [line for line in text.splitlines() if line.startswith("PARAMETER")]
    assert stops == [
        'PARAMETER stop "<|im_end|>"',
        'PARAMETER stop "a\\"b"',
        'PARAMETER stop "<|im_start|>"',
    ]


def test_the_message_that_a_template_begins_with_is_the_system_message():
    assert 'SYSTEM """You are a helpful assistant"""\n' in modelfile("m.gguf", CHATML, [])
    escaped = CHATML.replace("\n", "\\n")
    assert 'SYSTEM """You are a helpful assistant"""\n' in modelfile("m.gguf", escaped, [])
    assert "SYSTEM" not in modelfile("m.gguf", LLAMA3, [])


def test_a_template_of_another_kind_is_left_to_ollama():
    assert modelfile("m.gguf", "{{ messages }}", ["</s>"]) == (
        'FROM ./m.gguf\nPARAMETER stop "</s>"\n'
    )
    assert modelfile("m.gguf", None, []) == "FROM ./m.gguf\n"


def test_an_adapter_stands_on_a_base_that_the_reader_names():
    text = modelfile(None, None, [], adapter="adapter.gguf")
    assert text.splitlines() == [
        "# Write here the model that the adapter was trained on.",
        "FROM ./model.gguf",
        "ADAPTER ./adapter.gguf",
    ]
