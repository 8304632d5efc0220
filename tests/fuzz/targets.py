"""The parsers, each as a function of one file's bytes, and a first input for each.

A target is made in a folder of its own, where the other files of a model, a cache or a run lie
already; each call writes the one file anew and reads it as a command does.
"""

import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import numpy as np

from tinyllama.config import LlamaConfig
from tinyllama.config.loader import config_from_toml, load_config
from tinyllama.convert.export import Job, export
from tinyllama.data import corpus, files
from tinyllama.errors import DataError
from tinyllama.formats import hub, peft
from tinyllama.formats.expressions import Expression
from tinyllama.formats.gguf import open_gguf, read_metadata
from tinyllama.formats.huggingface import llama_shapes, open_folder, save_folder
from tinyllama.formats.meta import MetaFolder
from tinyllama.formats.models import open_model
from tinyllama.formats.peft import AdapterConfig, AdapterFolder, Placement
from tinyllama.formats.safetensors import SafetensorsFile, write_safetensors
from tinyllama.generate.protocol import ChatWanted, CompletionWanted, parse_request, prompt_ids
from tinyllama.generate.sampling import Sampling
from tinyllama.observe.metrics import read_metrics
from tinyllama.reports.page import data as drawn
from tinyllama.reports.page import embedded, sections
from tinyllama.reports.runs import read_run
from tinyllama.runtime import kernel_cache
from tinyllama.system import checked
from tinyllama.system.untrusted import read_json_file
from tinyllama.tokenizers.gguf import files_of_gguf
from tinyllama.tokenizers.opening import from_files
from tinyllama.tokenizers.sentencepiece import SentencePieceTokenizer, train_tokenizer
from tinyllama.tokenizers.templates import NAMED, ChatTemplate, named_template
from tinyllama.train import checkpoint, manifest

Parse = Callable[[bytes], None]
WORDS = "It was the best of times, it was the worst of times\n"
MODEL = LlamaConfig(
    vocab_size=300, hidden_size=8, num_layers=1, num_heads=2, num_kv_heads=1, intermediate_size=8,
    max_seq_len=16, tie_word_embeddings=True,
)  # fmt: skip


# Parts of templates that take long or make much.
LOOPS = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{{ 'x'|center(10**9) }}{{ '%9999d' % 1 }}{{ 'a'|replace('', 'b' * 9)|join(',')|tojson }}",
    "{{ [1, (2, 3), {'a': messages}]|tojson(indent=2) }}{{ messages[::-1]|map('length')|list }}",
)


def new_folder() -> Path:
    """A folder for files, in memory where that can be; removed when the process ends."""
    fast = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    held = TemporaryDirectory(prefix="fuzz-", dir=fast)
    _folders.append(held)
    return Path(held.name)


_folders: list[TemporaryDirectory[str]] = []


@cache
def tokenizer() -> SentencePieceTokenizer:
    """A small real one."""
    return train_tokenizer([WORDS * 20], 290)


@cache
def model() -> Path:
    """A tiny model's folder, with a tokenizer.model; not to be written to."""
    folder = new_folder() / "model"
    zeros = {
        name: (lambda shape=shape: np.full(shape, 0.125, np.float32))
        for name, shape in llama_shapes(MODEL).items()
    }
    held = tokenizer()
    save_folder(folder, MODEL, zeros, dtype="bfloat16", files=dict(held.files),
                bos_id=held.bos_id, eos_id=held.eos_id)  # fmt: skip
    return folder


@cache
def adapter() -> Path:
    """An adapter of that model."""
    folder = new_folder()
    paths = [f"model.layers.0.self_attn.{name}" for name in ("q_proj", "v_proj")]
    config = AdapterConfig(dict.fromkeys(paths, Placement(2, 4.0)), base=str(model()))
    shapes = {p: llama_shapes(MODEL)[f"{p}.weight"] for p in paths}
    arrays = {}
    for path, (rows, columns) in shapes.items():
        arrays[path, "lora_A"] = np.ones((2, columns), np.float32)
        arrays[path, "lora_B"] = np.zeros((rows, 2), np.float32)
    names = {f"base_model.model.{path}.{part}.weight": a for (path, part), a in arrays.items()}
    folder.joinpath(peft.ADAPTER_CONFIG).write_text(
        json.dumps(peft.to_peft(config, paths) | {"base_model_name_or_path": str(model())})
    )
    write_safetensors(folder / peft.ADAPTER_WEIGHTS, names)
    return folder


@cache
def gguf() -> bytes:
    """That model as a GGUF file, tokenizer and all."""
    out = new_folder() / "m.gguf"
    export(Job(model(), out, "gguf", None))
    return out.read_bytes()


def prepare() -> None:
    """Make what the targets share, before a process is forked for each."""
    model(), adapter(), gguf()


def beside(folder: Path, source: Path, but: str) -> Path:
    """Links in `folder` to the files of another folder, all but one; that one's place."""
    for file in source.iterdir():
        if file.name != but:
            (folder / file.name).symlink_to(file)
    return folder / but


def toml(folder: Path) -> Parse:
    file = folder / "config.toml"

    def parse(data: bytes) -> None:
        file.write_bytes(data)
        load_config(file).to_toml()

    return parse


def overrides(folder: Path) -> Parse:
    def parse(data: bytes) -> None:
        words = data.decode(errors="surrogateescape").split("\n")
        config_from_toml("", "config.toml", words[:20]).to_toml()

    return parse


def safetensors(folder: Path) -> Parse:
    file = folder / "model.safetensors"

    def parse(data: bytes) -> None:
        file.write_bytes(data)
        opened = SafetensorsFile(file)
        for name in opened.names[:50]:
            opened.array(name)

    return parse


def part_of_a_model(name: str) -> Callable[[Path], Parse]:
    """A file of a model's folder."""

    def make(folder: Path) -> Parse:
        file = beside(folder, model(), name)

        def parse(data: bytes) -> None:
            file.write_bytes(data)
            opened = open_model(folder)
            opened.rows("model.norm.weight", slice(None))

        return parse

    return make


def adapter_config(folder: Path) -> Parse:
    file = beside(folder, adapter(), peft.ADAPTER_CONFIG)

    def parse(data: bytes) -> None:
        file.write_bytes(data)
        opened = AdapterFolder(folder)
        opened.config(MODEL)
        if hub.parse(str(opened._entries.get("base_model_name_or_path"))) is None:  # no network
            opened.check_base(open_folder(opened.base_folder()))

    return parse


def adapter_weights(folder: Path) -> Parse:
    file = beside(folder, adapter(), peft.ADAPTER_WEIGHTS)

    def parse(data: bytes) -> None:
        file.write_bytes(data)
        AdapterFolder(folder).config(MODEL)

    return parse


def gguf_model(folder: Path) -> Parse:
    file = folder / "m.gguf"

    def parse(data: bytes) -> None:
        file.write_bytes(data)
        opened = open_gguf(file)
        opened.check()
        opened.float32("model.norm.weight")

    return parse


def gguf_tokenizer(folder: Path) -> Parse:
    file = folder / "m.gguf"

    def parse(data: bytes) -> None:
        file.write_bytes(data)
        made = from_files(files_of_gguf(read_metadata(file), str(file)), str(file))
        made.decode(made.encode(WORDS))

    return parse


def tokenizer_file(name: str, *others: str) -> Callable[[Path], Parse]:
    """A file of a tokenizer, with some of the other ones."""

    def make(folder: Path) -> Parse:
        rest = {other: tokenizer().files[other] for other in others}

        def parse(data: bytes) -> None:
            made = from_files({**rest, name: data}, str(folder))
            made.decode(made.encode(WORDS, special=True))

        return parse

    return make


def rendered_template(folder: Path) -> Parse:
    """A chat template of a stranger, and what it makes of a conversation."""
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " hello </s> "},
        {"role": "assistant", "content": "yes", "tool_calls": [{"name": "f", "arguments": {}}]},
    ]

    def parse(data: bytes) -> None:
        template = ChatTemplate(data.decode(errors="replace"), tokenizer())
        template.render(messages, tools=[{"name": "f"}], prompt=True)
        template.encode(messages, {2})

    return parse


def texts(name: str) -> Callable[[Path], Parse]:
    """A file of text or of rows."""

    def make(folder: Path) -> Parse:
        file = folder / name

        def parse(data: bytes) -> None:
            file.write_bytes(data)
            for _ in files.read_texts(files.find_sources(str(file))):
                pass

        return parse

    return make


def checkpoint_manifest(folder: Path) -> Parse:
    for name in ("model.safetensors", "training_state.json"):
        (folder / name).write_bytes(b"{}")

    def parse(data: bytes) -> None:
        (folder / manifest.MANIFEST).write_bytes(data)
        manifest.verify_loaded(folder, remembered=False)

    return parse


def summed_manifest(folder: Path) -> Parse:
    """The same with the right sum of itself: what lies behind that check."""
    parse = checkpoint_manifest(folder)

    def summed(data: bytes) -> None:
        try:
            value = json.loads(data)
            parse(manifest._spelled(value))
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
            return

    return summed


def training_state(folder: Path) -> Parse:
    def parse(data: bytes) -> None:
        (folder / checkpoint.STATE).write_bytes(data)
        checkpoint.read_state(folder)

    return parse


def metrics(folder: Path) -> Parse:
    file = folder / "metrics.jsonl"

    def parse(data: bytes) -> None:
        file.write_bytes(data)
        read_metrics(file)

    return parse


def reported(name: str) -> Callable[[Path], Parse]:
    """A file of a run's folder, up to what its page says and draws."""

    def make(folder: Path) -> Parse:
        for other in RUN_FILES:
            (folder / other).write_bytes(RUN_FILES[other])

        def parse(data: bytes) -> None:
            (folder / name).write_bytes(data)
            run = read_run(folder)
            embedded(drawn([run]))
            sections([run])

        return parse

    return make


RUN_FILES = {
    "metrics.jsonl": b'{"step": 1, "loss": 6.2, "lr": 0.1, "tokens_per_second": 9.5}\n{"step": 2, '
    b'"loss": 6.1, "anomalies": [{"kind": "spike", "series": "loss", "action": "note", "value": 9, '
    b'"usual": null, "documents": ["a row 1"], "layer": "head"}], "update_ratios": {"head": 0.1}, '
    b'"rolled_back": {"from": 2, "to": 1, "anomalies": []}}\n',
    "config.toml": b'[training]\nbatch_size = 2\n[data]\ncontext_length = 8\ntrain_path = ["a"]\n',
    "machine.json": b'{"device": "CPU", "threads": 2}',
    "samples.jsonl": b'{"step": 1, "prompt": "def ", "text": "def f"}\n',
    "roofline.json": b'{"float32_gflops": 90, "bfloat16_gflops": 120, "gb_per_second": 20}',
    "profile.json": b'{"step_seconds": 0.1, "operations": [{"name": "a", "source": ["b.py:1"], '
    b'"calls": 2, "seconds": 0.1, "share": 0.5, "gflops": 3, "gb_per_second": 2}]}',
}


def dataset(folder: Path) -> Path:
    """A folder of tokens, as a run keeps it."""
    (folder / "text.txt").write_text(WORDS * 3)
    return corpus.prepare(
        str(folder / "text.txt"), tokenizer(), folder / "cache", progress=False, workers=1
    ).path


def token_cache(name: str) -> Callable[[Path], Parse]:
    """A file of a folder of tokens."""

    def make(folder: Path) -> Parse:
        file = dataset(folder) / name

        def parse(data: bytes) -> None:
            file.write_bytes(data)
            corpus._open(file.parent, tokenizer())

        return parse

    return make


def summed_meta(folder: Path) -> Parse:
    """meta.json with the right sum of itself: a stranger can write one."""
    file = dataset(folder) / "meta.json"

    def parse(data: bytes) -> None:
        file.write_bytes(data)
        meta = read_json_file(file, corpus._Meta, DataError)
        meta.sum = meta.summed()
        file.write_bytes(msgspec.json.encode(meta))
        corpus._open(file.parent, tokenizer())

    return parse


def text_digests(folder: Path) -> Parse:
    file = folder / "digests.json"

    def parse(data: bytes) -> None:
        file.write_bytes(data)
        read_json_file(file, files._Digests, DataError)

    return parse


def meta_params(folder: Path) -> Parse:
    half = {"tok_embeddings.weight": np.zeros((300, 8), np.float32), **{
        f"layers.0.{name}.weight": np.zeros(shape, np.float32)
        for name, shape in {
            "attention_norm": (8,), "ffn_norm": (8,), "attention.wq": (8, 8),
            "attention.wk": (4, 8), "attention.wv": (4, 8), "attention.wo": (8, 8),
            "feed_forward.w1": (8, 8), "feed_forward.w2": (8, 8), "feed_forward.w3": (8, 8),
        }.items()
    }, "norm.weight": np.zeros(8, np.float32), "output.weight": np.zeros((300, 8), np.float32),
    }  # fmt: skip
    write_safetensors(folder / "consolidated.safetensors", half)

    def parse(data: bytes) -> None:
        (folder / "params.json").write_bytes(data)
        MetaFolder(folder).check()

    return parse


def remembered_checks(folder: Path) -> Parse:
    def parse(data: bytes) -> None:
        file = checked._file()
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        file.write_bytes(data)
        checked._read()

    os.environ["XDG_CACHE_HOME"] = str(folder)
    return parse


def compiled_kernels(folder: Path) -> Parse:
    os.environ["TINYLLAMA_KERNEL_CACHE"] = str(folder / "kernels")
    (folder / "kernels").mkdir(mode=0o700)
    key = kernel_cache.digest("fuzz")

    def parse(data: bytes) -> None:
        (folder / "kernels" / key).write_bytes(data)
        kernel_cache.get(key)

    return parse


def expressions(folder: Path) -> Parse:
    def parse(data: bytes) -> None:
        text = data.decode(errors="surrogateescape")
        try:
            Expression(text).matches("model.layers.0.self_attn.q_proj")
        except ValueError:
            return

    return parse


def chat_request(folder: Path) -> Parse:
    """The body of /v1/chat/completions, up to the ids of its prompt in each named template."""
    templates = [named_template(name, tokenizer()) for name in NAMED]

    def parse(data: bytes) -> None:
        wanted = parse_request(data, ChatWanted)
        wanted.samplings(Sampling())
        for template in templates:
            template.encode_prompt(wanted.messages, tools=wanted.tools)

    return parse


def completion_request(folder: Path) -> Parse:
    """The body of /v1/completions, up to the ids of its prompt."""

    def parse(data: bytes) -> None:
        wanted = parse_request(data, CompletionWanted)
        wanted.samplings(Sampling())
        prompt_ids(wanted.prompt, tokenizer())

    return parse


def hub_names(folder: Path) -> Parse:
    def parse(data: bytes) -> None:
        hub.parse(data.decode(errors="surrogateescape"))

    return parse


MODEL_FILES = {
    "hf_config": "config.json",
    "hf_generation": "generation_config.json",
    "hf_index": "model.safetensors.index.json",
}
TARGETS: dict[str, Callable[[Path], Parse]] = {
    "toml": toml,
    "set": overrides,
    "safetensors": safetensors,
    **{name: part_of_a_model(file) for name, file in MODEL_FILES.items()},
    "adapter_config": adapter_config,
    "adapter_weights": adapter_weights,
    "expression": expressions,
    "gguf_model": gguf_model,
    "gguf_tokenizer": gguf_tokenizer,
    "tokenizer_model": tokenizer_file("tokenizer.model"),
    "tokenizer_json": tokenizer_file("tokenizer.json", "tokenizer_config.json"),
    "tokenizer_config": tokenizer_file("tokenizer_config.json", "tokenizer.model"),
    "rendered_template": rendered_template,
    "chat_template": tokenizer_file("chat_template.jinja", "tokenizer.model"),
    "jsonl": texts("rows.jsonl"),
    "json_array": texts("rows.json"),
    "csv": texts("rows.csv"),
    "tsv": texts("rows.tsv"),
    "txt": texts("text.txt"),
    "manifest": checkpoint_manifest,
    "manifest_summed": summed_manifest,
    "training_state": training_state,
    "metrics": metrics,
    **{f"run_{name.partition('.')[0]}": reported(name) for name in RUN_FILES},
    "cache_meta": token_cache("meta.json"),
    "cache_meta_summed": summed_meta,
    "cache_tokens": token_cache("tokens.bin"),
    "cache_documents": token_cache("documents.bin"),
    "text_digests": text_digests,
    "meta_params": meta_params,
    "remembered_checks": remembered_checks,
    "kernel_cache": compiled_kernels,
    "hub_name": hub_names,
    "chat_request": chat_request,
    "completion_request": completion_request,
}
# Those whose inputs are JSON, which the fuzzer then changes as JSON.
JSON = {
    "hf_config", "hf_generation", "hf_index", "adapter_config", "tokenizer_json",
    "tokenizer_config", "manifest", "manifest_summed", "training_state", "cache_meta",
    "cache_meta_summed", "text_digests", "meta_params", "remembered_checks",
    "chat_request", "completion_request", "run_machine", "run_profile", "run_roofline",
}  # fmt: skip


def seeds(name: str) -> list[bytes]:
    """Inputs to begin with: what we write ourselves, and what others do."""
    if name in MODEL_FILES:
        index = {"weight_map": dict.fromkeys(llama_shapes(MODEL), "model.safetensors")}
        file = model() / MODEL_FILES[name]
        return [file.read_bytes() if file.exists() else json.dumps(index).encode()]
    if name.startswith("run_"):
        return [data for file, data in RUN_FILES.items() if file.startswith(name[4:])]
    if name.startswith("cache_"):
        folder = dataset(new_folder())
        kept = {"tokens": "tokens.bin", "documents": "documents.bin"}
        return [(folder / kept.get(name.removeprefix("cache_"), "meta.json")).read_bytes()]
    made: dict[str, Callable[[], list[bytes]]] = {
        "toml": lambda: [b"", b'[model]\nvocab_size = 300\n[data]\ntrain_path = ["a", "b"]\n',
                         config_from_toml("", "x").to_toml().encode()],
        "set": lambda: [b"training.learning_rate=1e-3\nmodel.hidden_size=64", b"lora.rank=8"],
        "safetensors": lambda: [(adapter() / peft.ADAPTER_WEIGHTS).read_bytes()],
        "adapter_config": lambda: [(adapter() / peft.ADAPTER_CONFIG).read_bytes()],
        "adapter_weights": lambda: [(adapter() / peft.ADAPTER_WEIGHTS).read_bytes()],
        "expression": lambda: [rb"model\.layers\.(0|1)\..*(q|v)_proj", b"([a-z_.0-9]+)+!"],
        "gguf_model": lambda: [gguf()],
        "gguf_tokenizer": lambda: [gguf()],
        "tokenizer_model": lambda: [tokenizer().model],
        "tokenizer_json": lambda: [tokenizer().files["tokenizer.json"]],
        "tokenizer_config": lambda: [tokenizer().files["tokenizer_config.json"]],
        "rendered_template": lambda: [text.encode() for text in (*NAMED.values(), *LOOPS)],
        "chat_template": lambda: [b"{% for m in messages %}{{ m.content }}{% endfor %}"],
        "jsonl": lambda: [b'{"text": "a"}\n{"text": "b\\u00e9"}\n'],
        "json_array": lambda: [b'[{"text": "a"}, {"text": "b"}]'],
        "csv": lambda: [b'id,text\n1,"a, ""b"""\n2,c\n'],
        "tsv": lambda: [b"id\ttext\n1\ta\n"],
        "txt": lambda: ["\ufeffa\u00e9\U0001f600\n".encode()],
        "manifest": lambda: [_manifest()],
        "manifest_summed": lambda: [_manifest()],
        "training_state": lambda: [b'{"step": 4, "data": {"digest": "a", "cursor": 3}, '
                                   b'"schedule_anchor": {"step": 2, "share": 0.5}}'],
        "metrics": lambda: [b'{"step": 1, "loss": 6.2, "lr": 0.1}\n{"step": 2, "loss": 6.1}\n'],
        "text_digests": lambda: [_digests()],
        "meta_params": lambda: [b'{"dim": 8, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, '
                                b'"norm_eps": 1e-5, "vocab_size": 300, "use_scaled_rope": true}'],
        "remembered_checks": lambda: [b'{"entries": {"a": [[1, 2], "b", 3]}, "sum": ""}'],
        "kernel_cache": lambda: [kernel_cache._entry(kernel_cache.digest("fuzz"), b"kernel")],
        "chat_request": lambda: [
            b'{"model": "a", "messages": [{"role": "system", "content": "Be brief."}, '
            b'{"role": "user", "content": [{"type": "text", "text": "Hi <s>"}]}], "n": 2, '
            b'"max_tokens": 5, "stop": ["a", "b"], "temperature": 0.5, "top_p": 0.9, "seed": 3, '
            b'"stream": true, "stream_options": {"include_usage": true}, "logprobs": true, '
            b'"top_logprobs": 2, "tools": [{"type": "function", "function": {"name": "f"}}]}',
            b'{"messages": [{"role": "assistant", "content": null, "tool_calls": [{"id": "1"}]}, '
            b'{"role": "tool", "content": "4"}], "top_k": 3, "min_p": 0.1, "stop": "a", '
            b'"repetition_penalty": 1.1, "max_completion_tokens": 4}',
        ],
        "completion_request": lambda: [
            b'{"prompt": "It was", "max_tokens": 4, "logprobs": 2, "stop": ["x"], "echo": false}',
            b'{"prompt": [1, 2, 3], "temperature": 0, "n": 1}',
        ],
        "hub_name": lambda: [b"owner/name", b"owner/name@main:file.gguf", b"hf://a/b"],
    }  # fmt: skip
    return made[name]()


def _manifest() -> bytes:
    folder = new_folder()
    for name in ("model.safetensors", "training_state.json"):
        (folder / name).write_bytes(b"{}")
    manifest.write_manifest(folder, {})
    return (folder / manifest.MANIFEST).read_bytes()


def _digests() -> bytes:
    folder = new_folder()
    (folder / "text.txt").write_text(WORDS)
    os.utime(folder / "text.txt", (1, 1))
    files.content_digests(files.find_sources(str(folder / "text.txt")), folder)
    file = folder / "digests.json"
    return file.read_bytes() if file.exists() else b'{"files": {}, "sum": ""}'
