"""Tokens that files beside the vocabulary name: their ids, in which texts they are found, what
decoding shows of them, and files that contradict each other."""

import json

import pytest
from texts_helpers import lines
from tokenizers_helpers import byte_level_files, chatml_files, reference, spm

from tinyllama.errors import TokenizerError
from tinyllama.tokenizers.files import read_settings
from tinyllama.tokenizers.opening import from_files
from tinyllama.tokenizers.sentencepiece_model import with_space
from tinyllama.tokenizers.special import Finder
from tinyllama.tokenizers.tokenizer import SpecialToken

TURN = "<|im_start|>user\nhello<|im_end|>\n"


@pytest.fixture(params=[chatml_files, byte_level_files], ids=["tokenizer.model", "tokenizer.json"])
def chat(request):
    return from_files(request.param(), "t")


def changed(files, name, **values):
    given = json.loads(files.get(name, b"{}"))
    merged = {k: v for k, v in (given | values).items() if v != "absent"}
    return {**files, name: json.dumps(merged).encode()}


def test_a_special_token_in_a_prompt_is_one_id_and_in_a_text_is_text(chat):
    start, end = (chat.special_tokens[name] for name in ("<|im_start|>", "<|im_end|>"))
    marked = chat.encode(TURN, special=True)
    assert [marked[0], marked.count(start), marked.count(end)] == [start, 1, 1]
    plain = chat.encode(TURN)
    assert not {start, end} & set(plain) and len(plain) > len(marked) + 4
    assert chat.decode(plain) == TURN
    assert chat.decode(marked) == "user\nhello\n"
    assert chat.decode(marked, special=True) == TURN


def test_no_text_of_any_script_gives_a_special_token(chat):
    special = set(chat.special_tokens.values())
    for line in lines():
        assert not special & set(chat.encode(line)), line


def test_files_of_a_chat_model_name_its_ends_and_template(chat):
    assert chat.eos_id == chat.special_tokens["<|im_end|>"]
    assert chat.chat_template.startswith("{% for m in messages %}")
    assert chat.has_markup


def test_tokens_beyond_the_model_have_the_ids_of_their_file():
    chat, size = from_files(chatml_files(), "t"), reference(spm()).get_piece_size()
    assert chat.vocab_size == size + 3
    assert [*chat.pieces[size:]] == ["[PAD]", "<|im_start|>", "<|im_end|>"]
    assert chat.eos_ids == (size + 2, 2)
    assert chat.begin == (1,)
    alone = from_files({"tokenizer.model": spm()}, "t")
    assert not alone.has_markup
    assert chat.fingerprint != alone.fingerprint
    assert chat.older_digests == (alone.vocabulary_digest,) != (chat.vocabulary_digest,)
    for line in lines()[::5]:
        assert chat.encode(line) == reference(spm()).encode(line)


def test_tokens_of_each_file_are_found():
    size = reference(spm()).get_piece_size()
    model = {"tokenizer.model": spm()}
    plain = changed(model, "added_tokens.json", **{"<think>": size})
    tokenizer = from_files(plain, "t")
    # Not special: found in every text.
    assert tokenizer.encode("a<think>")[-1] == size and "<think>" not in tokenizer.special_tokens
    assert tokenizer.decode(tokenizer.encode("a<think> b")) == "a<think> b"
    entry = {"content": "<think>", "special": True}
    for files in (
        changed(plain, "special_tokens_map.json", additional_special_tokens=["<think>"]),
        changed(plain, "special_tokens_map.json", additional_special_tokens=[{**entry}]),
        changed(plain, "tokenizer_config.json", extra_special_tokens={"thinks": "<think>"}),
        changed(model, "tokenizer_config.json", added_tokens_decoder={str(size): entry}),
    ):
        tokenizer = from_files(files, "t")
        assert tokenizer.special_tokens["<think>"] == size, files
        assert size not in tokenizer.encode("a<think>")
        assert tokenizer.encode("a<think>", special=True)[-1] == size


def test_the_space_before_a_text_follows_special_tokens_in_legacy_tokenizers_only():
    files = chatml_files()
    new = from_files(files, "t")
    old = from_files(changed(files, "tokenizer_config.json", legacy=True), "t")
    own = reference(spm())
    end = new.eos_id
    assert old.encode("a<|im_end|>user", special=True) == [
        *own.encode("a"), end, *own.encode("user")
    ]  # fmt: skip
    assert new.encode("a<|im_end|>user", special=True) == [
        *own.encode("a"), end, *new.encode("user", continued=True)
    ]  # fmt: skip
    assert old.fingerprint != new.fingerprint


def test_settings_of_the_files_act():
    files, own = {"tokenizer.model": spm()}, reference(spm())
    no_space = from_files(changed(files, "tokenizer_config.json", add_prefix_space=False), "t")
    without = reference(with_space(spm(), False))
    assert no_space.encode("user") == without.encode("user") != own.encode("user")
    assert no_space.decode(no_space.encode(" user")) == " user"
    with_one = {"tokenizer.model": spm("Yi's")}
    with_one = from_files(changed(with_one, "tokenizer_config.json", add_prefix_space=True), "t")
    assert with_one.encode("user") == reference(with_space(spm("Yi's"), True)).encode("user")
    no_begin = from_files(changed(files, "tokenizer_config.json", add_bos_token=False), "t")
    assert (no_begin.begin, no_begin.bos_id) == ((), 1)
    alone = from_files(files, "t")
    assert len({alone.fingerprint, no_space.fingerprint, no_begin.fingerprint}) == 3


def test_names_that_no_piece_has_are_not_taken():
    """Checkpoints of earlier versions called begin and end <s> and </s> whatever the model said."""
    yi = spm("Yi's")
    config = json.dumps({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}).encode()
    tokenizer = from_files({"tokenizer.model": yi, "tokenizer_config.json": config}, "t")
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, (2,))
    assert tokenizer.fingerprint == from_files({"tokenizer.model": yi}, "t").fingerprint
    written = json.loads(tokenizer.files["tokenizer_config.json"])
    assert (written["bos_token"], written["eos_token"]) == ("<|startoftext|>", "<|endoftext|>")


def test_generation_ids_may_be_a_number_a_list_null_or_negative():
    for value, ends in ((2, (2,)), ([2, 3], (2, 3)), (None, (2,)), ([2, -1], (2,)), (-1, (2,))):
        files = {"tokenizer.model": spm()}
        files["generation_config.json"] = json.dumps({"eos_token_id": value}).encode()
        assert from_files(files, "t").eos_ids == ends, value


BAD = {
    "added_tokens.json": [
        (b"[1]", "t: added_tokens.json: must be a JSON object"),
        (b'{"a": "b"}', "t: the added token 'a': id 'b': must be 0 or more"),
        (b'{"a": 1e99}', "t: the added token 'a': id 1e+99: must be 0 or more"),
        (b'{"a": 1152921504606846976}', "has id 1152921504606846976, and there are"),
        (b'{"a": -1}', "t: the added token 'a': id -1: must be"),
        (b"{", "t: added_tokens.json: not JSON, so damaged: "),
    ],
    "tokenizer_config.json": [
        (b'{"bos_token": 3}', "t: bos_token: got 3, must be a text"),
        (b'{"add_bos_token": 1}', "tokenizer_config.json: add_bos_token: got 1, must be true or"),
        (b'{"added_tokens_decoder": []}', ""),
        (b'{"added_tokens_decoder": 7}', "added_tokens_decoder: must be an object"),
        (
            b'{"added_tokens_decoder": {"x": {"content": "a"}}}',
            "the added token 'a': id 'x': must be",
        ),
        (b'{"added_tokens_decoder": {"1": {}}}', "t: an added token has no text: {}"),
        (b'{"chat_template": 7}', "tokenizer_config.json: chat_template: must be a text"),
        (b'{"extra_special_tokens": 7}', "t: extra_special_tokens: got 7, must be a list of texts"),
        (b"[" * 100_000, "t: tokenizer_config.json: not JSON, so damaged: "),
    ],
    "chat_template.jinja": [(b"\xff", "t: chat_template.jinja: is not UTF-8")],
    "generation_config.json": [
        (
            b'{"eos_token_id": "2"}',
            "generation_config.json: bos_token_id None, eos_token_id '2'",
        ),
        (b'{"eos_token_id": [2, null]}', "eos_token_id [2, None]: must be integers"),
    ],
}


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [(name, data, message) for name, cases in BAD.items() for data, message in cases],
)
def test_a_damaged_file_is_one_line_that_names_it(name, data, message):
    files = {"tokenizer.model": spm(), name: data}
    if not message:
        from_files(files, "t")
        return
    with pytest.raises(TokenizerError) as caught:
        from_files(files, "t")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_templates_by_name_and_in_a_file_of_their_own():
    several = [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]
    config = json.dumps({"chat_template": several}).encode()
    assert read_settings({"tokenizer_config.json": config}, "t").chat_template == "d"
    files = {"tokenizer_config.json": config, "chat_template.jinja": b"j"}
    assert read_settings(files, "t").chat_template == "j"


def test_the_leftmost_and_then_the_longest_token_is_found_with_the_spaces_it_takes():
    tokens = [
        SpecialToken("<a>", 1),
        SpecialToken("<a><b>", 2),
        SpecialToken("[l]", 3, lstrip=True),
        SpecialToken("[r]", 4, rstrip=True),
        SpecialToken("word", 5, single_word=True),
    ]
    found = Finder(tokens)
    assert [*found.split("x<a><b>y<a>")] == [("x", 2), ("y", 1), ("", None)]
    assert [*found.split("x [l] y [r] z")] == [("x", 3), (" y ", 4), ("z", None)]
    assert [*found.split("swords word")] == [("swords ", 5), ("", None)]
    assert [*Finder([]).split("text")] == [("text", None)]
