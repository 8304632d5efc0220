"""Ollama's Modelfile: what a GGUF file is run with.

    FROM ./model.gguf           the weights; ADAPTER ./adapter.gguf, a LoRA on them
    TEMPLATE, SYSTEM            the chat template as a Go template, and its own first message
    PARAMETER stop "..."        for each piece that ends an answer

A model's Jinja template is recognised by the pieces it writes. One that is not leaves TEMPLATE out:
Ollama then looks at the template inside the GGUF file itself.
"""

import json
import re
from collections.abc import Sequence
from typing import NamedTuple

NAME = "Modelfile"


class _Form(NamedTuple):
    """A format of conversations: what its Jinja template contains, and the Go template."""

    name: str
    marks: tuple[str, ...]
    template: str
    stops: tuple[str, ...] = ()  # ends that are text, not one piece


# The first whose marks all appear is taken, so that the more special ones come first.
_FORMS = (
    _Form(
        "chatml",
        ("<|im_start|>", "<|im_end|>"),
        "{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ end }}"
        "{{ if .Prompt }}<|im_start|>user\n{{ .Prompt }}<|im_end|>\n{{ end }}"
        "<|im_start|>assistant\n{{ .Response }}<|im_end|>\n",
        ("<|im_start|>", "<|im_end|>"),
    ),
    _Form(
        "llama3",
        ("<|start_header_id|>", "<|eot_id|>"),
        "{{ if .System }}<|start_header_id|>system<|end_header_id|>\n\n{{ .System }}<|eot_id|>"
        "{{ end }}{{ if .Prompt }}<|start_header_id|>user<|end_header_id|>\n\n{{ .Prompt }}"
        "<|eot_id|>{{ end }}<|start_header_id|>assistant<|end_header_id|>\n\n{{ .Response }}"
        "<|eot_id|>",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    _Form(
        "llama2",
        ("[INST]", "<<SYS>>"),
        "[INST] {{ if .System }}<<SYS>>\n{{ .System }}\n<</SYS>>\n\n{{ end }}{{ .Prompt }} [/INST]"
        "{{ if .Response }} {{ .Response }} </s>{{ end }}",
        ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"),
    ),
    _Form(
        "mistral",
        ("[INST]", "[/INST]"),
        "[INST] {{ if .System }}{{ .System }}\n\n{{ end }}{{ .Prompt }} [/INST]"
        "{{ if .Response }} {{ .Response }}</s>{{ end }}",
        ("[INST]", "[/INST]"),
    ),
    _Form(
        "zephyr",
        ("<|user|>", "<|assistant|>"),
        "{{ if .System }}<|system|>\n{{ .System }}</s>\n{{ end }}"
        "{{ if .Prompt }}<|user|>\n{{ .Prompt }}</s>\n{{ end }}"
        "<|assistant|>\n{{ .Response }}</s>\n",
        ("<|system|>", "<|user|>", "<|assistant|>"),
    ),
    _Form(
        "alpaca",
        ("### Instruction:", "### Response:"),
        "{{ if .System }}{{ .System }}\n\n{{ end }}{{ if .Prompt }}### Instruction:\n{{ .Prompt }}"
        "\n\n{{ end }}### Response:\n{{ .Response }}\n\n",
        ("### Instruction:",),
    ),
    _Form(
        "vicuna",
        ("USER:", "ASSISTANT:"),
        "{{ if .System }}{{ .System }} {{ end }}{{ if .Prompt }}USER: {{ .Prompt }} {{ end }}"
        "ASSISTANT: {{ .Response }}</s>",
        ("USER:", "ASSISTANT:"),
    ),
)
# A first message that the template itself writes, as text between its pieces.
_SYSTEM = re.compile(
    r"(?:<\|im_start\|>system|<\|start_header_id\|>system<\|end_header_id\|>|<<SYS>>)"
    r"(?:\\n|\n)+([^<>{}'\"]+?)(?:\\n|\n)*(?:<\|im_end\|>|<\|eot_id\|>|<</SYS>>)"
)


def modelfile(
    source: str | None,
    template: str | None,
    stops: Sequence[str],
    *,
    adapter: str | None = None,
) -> str:
    """The text of a Modelfile for a GGUF file beside it, named `source`.

    template: the model's Jinja template, if it has one; stops: the pieces that end an answer.
    Without a source, the reader writes the base's name.
    """
    form = None if template is None else _form(template)
    lines = [
        f"FROM ./{source}"
        if source is not None
        else "# Write here the model that the adapter was trained on.\nFROM ./model.gguf"
    ]
    if adapter is not None:
        lines.append(f"ADAPTER ./{adapter}")
    if form is not None:
        lines.append(f'TEMPLATE """{form.template}"""')
    if template is not None and (system := _SYSTEM.search(template)):
        lines.append(f'SYSTEM """{system[1].strip()}"""')
    ends = dict.fromkeys((*stops, *(form.stops if form else ())))
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in ends]
    return "\n".join(lines) + "\n"


def _form(template: str) -> _Form | None:
    return next((f for f in _FORMS if all(mark in template for mark in f.marks)), None)
