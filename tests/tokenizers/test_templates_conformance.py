"""Masks and ids of 200 conversations under seven published templates, against transformers.

transformers marks nothing without {% generation %}: each template gets a copy with those marks, set
by hand, that is shown to render the same. Ours reads the template as it was published.
"""

import doctest
import inspect
import json
import random
import re
import textwrap
import unittest.mock
from pathlib import Path

import pytest
from tokenizers_helpers import package_file, smollm2

from tinyllama.tokenizers.opening import from_files, open_tokenizer
from tinyllama.tokenizers.templates import ChatTemplate
from tinyllama.tokenizers.tokenizer import write_files

transformers = pytest.importorskip("transformers", minversion="5")

SMOLLM2 = [
    (
        "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}",
        "{{'<|im_start|>' + message['role'] + '\n'}}{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
        "{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}",
    )
]
LLAMA3 = [
    (
        "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ "
        "message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = "
        "bos_token + content %}{% endif %}{{ content }}",
        "{% if loop.index0 == 0 %}{{ bos_token }}{% endif %}{{ '<|start_header_id|>' + "
        "message['role'] + '<|end_header_id|>\n\n' }}{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}"
        "{% else %}{{ message['content'] | trim + '<|eot_id|>' }}{% endif %}",
    )
]
QWEN = [
    (
        ' or (message.role == "assistant" and not message.tool_calls) %}',
        " %}",
    ),
    (
        "        {{- '<|im_start|>' + message.role }}\n        {%- if message.content %}\n"
        "            {{- '\\n' + message.content }}\n        {%- endif %}",
        "        {{- '<|im_start|>assistant\\n' }}{% generation %}"
        "{%- if message.content or not message.tool_calls %}{{- message.content }}{%- endif %}",
    ),
    (
        '            {{- \'\\n<tool_call>\\n{"name": "\' }}',
        "            {%- if message.content or not loop.first %}{{- '\\n' }}{%- endif %}"
        '{{- \'<tool_call>\\n{"name": "\' }}',
    ),
    (
        "        {%- endfor %}\n        {{- '<|im_end|>\\n' }}\n"
        '    {%- elif message.role == "tool" %}',
        "        {%- endfor %}\n        {{- '<|im_end|>' }}{% endgeneration %}{{- '\\n' }}\n"
        '    {%- elif message.role == "tool" %}',
    ),
]
PHI = [
    (
        "{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}",
        "{{'<|assistant|>\n'}}{% generation %}{{ message['content'] + '<|end|>' }}"
        "{% endgeneration %}{{ '\n' }}",
    )
]
GEMMA = [
    (
        "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}",
        "{{ '<start_of_turn>' + role + '\n' }}{% if role == 'model' %}{% generation %}"
        "{{ message['content'] | trim + '<end_of_turn>' }}{% endgeneration %}{% else %}"
        "{{ message['content'] | trim + '<end_of_turn>' }}{% endif %}{{ '\n' }}",
    )
]
# The prompt for an answer ends with "<think>\n", which past answers do not begin with.
DEEPSEEK = [
    (
        "{{'<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}",
        "{{'<｜Assistant｜>'}}{% generation %}{{ content + '<｜end▁of▁sentence｜>'}}"
        "{% endgeneration %}",
    )
]
# As llama-cpp-python has it (MISTRAL_INSTRUCT_CHAT_TEMPLATE).
MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 "
    "% 2 == 0) %}{{ raise_exception('Conversation roles must alternate user/assistant/user/"
    "assistant/...') }}{% endif %}{% if message['role'] == 'user' %}{{ '[INST] ' + message["
    "'content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ message['content'] + "
    "eos_token + ' ' }}{% else %}{{ raise_exception('Only user and assistant roles are supported!"
    "') }}{% endif %}{% endfor %}"
)
MISTRAL = [
    (
        "{{ message['content'] + eos_token + ' ' }}",
        "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{{ ' ' }}",
    )
]
# Name: where it was published, the marks, whether it knows the system's role, and tools. Those that
# know the system's let an assistant begin.
TEMPLATES = {
    "smollm2": (None, SMOLLM2, True, False),
    "llama3": ("llama3.jinja", LLAMA3, True, False),
    "qwen2.5": ("qwen2_5.jinja", QWEN, True, True),
    "phi3": ("phi3.jinja", PHI, True, False),
    "gemma": ("gemma.jinja", GEMMA, False, False),
    "deepseek-v3": ("deepseekv3.jinja", DEEPSEEK, True, False),
    "mistral": (MISTRAL_TEMPLATE, MISTRAL, False, False),
}
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Finds a symbol\u2019s documentation.",
        "parameters": {"type": "object", "properties": {"name": {"type": "string"}}},
    },
}


def published(name: str, own: str | None) -> str:
    found = TEMPLATES[name][0]
    if found is None:
        assert own is not None
        return own
    if not found.endswith(".jinja"):
        return found
    return package_file("trl", "chat_templates", found).read_text()


def texts() -> list[str]:
    """Paragraphs of the standard library's documentation, some with spaces around them."""
    found: list[str] = []
    for module in (doctest, inspect, json, random, re, textwrap, unittest.mock):
        for member in (module, *vars(module).values()):
            if isinstance(text := getattr(member, "__doc__", None), str):
                found += [part for part in text.split("\n\n") if part.strip()]
    return [
        *found,
        "é😀 \u4f60\u597d\n",
        "  x = [1,\n\n  2]\n",
        "a\u2028b",
        "\n\nafter lines",
        "<b>",
    ]


def conversations(system: bool, tools: bool) -> list[dict]:
    draw, said = random.Random(7), texts()
    made = []
    for number in range(200):
        messages = []
        if system and number % 3 == 0:
            messages.append({"role": "system", "content": draw.choice(said).strip()})
        if system and number % 5 == 0:
            messages.append({"role": "assistant", "content": draw.choice(said)})
        for _ in range(draw.randint(1, 4)):
            messages.append({"role": "user", "content": draw.choice(said)})
            if tools and number % 2:
                call = {"name": "look_up", "arguments": {"name": draw.choice(said)[:20]}}
                content = draw.choice(["", "Let me see."])
                messages.append({"role": "assistant", "content": content,
                                 "tool_calls": [{"type": "function", "function": call}] *
                                 draw.randint(1, 2)})  # fmt: skip
                messages.append({"role": "tool", "content": draw.choice(said)})
            messages.append({"role": "assistant", "content": draw.choice(said)})
        if number % 7 == 0:
            messages.append({"role": "user", "content": draw.choice(said)})
        made.append({"messages": messages, "tools": [TOOL] if tools and number % 2 else None})
    return made


def with_special(folder: Path, template: str, tmp_path: Path) -> Path:
    """SmolLM2's tokenizer with the special tokens that a template writes."""
    write_files(open_tokenizer(smollm2(folder)), tmp_path / "own")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "own")
    pieces = re.findall(r"<[|｜][^<>]*[|｜]>|<(?:start|end)_of_turn>", template)
    theirs.add_special_tokens({"additional_special_tokens": sorted(set(pieces))})
    theirs.save_pretrained(tmp_path / "made")
    return tmp_path / "made"


@pytest.mark.parametrize("name", TEMPLATES)
def test_masks_and_ids_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    source, marks, system, tools = TEMPLATES[name]
    source = published(name, open_tokenizer(smollm2(tmp_path)).chat_template)
    marked = source
    for old, new in marks:
        assert marked.count(old) == 1, old
        marked = marked.replace(old, new)
    folder = with_special(tmp_path, source, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = open_tokenizer(folder)
    template, again = ChatTemplate(source, ours), from_files(ours.sources, "again")
    seen = 0
    for row in conversations(system, tools):
        messages = row["messages"]
        options = {"tools": row["tools"], "tokenize": True, "return_dict": True}
        plain = theirs.apply_chat_template(messages, chat_template=source, **options)
        made = theirs.apply_chat_template(
            messages, chat_template=marked, return_assistant_tokens_mask=True, **options
        )
        assert made["input_ids"] == plain["input_ids"]  # the copy renders the same
        wanted = {n for n, m in enumerate(messages) if m["role"] == "assistant"}
        encoded = template.encode(messages, wanted, tools=row["tools"])
        assert encoded.ids == plain["input_ids"]
        assert [*map(int, encoded.trained)] == made["assistant_masks"], encoded.text
        seen += sum(encoded.trained)
        assert again.encode(encoded.text, special=True) == encoded.ids
    assert seen > 4000
