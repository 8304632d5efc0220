"""What is written opens in the real transformers with the ids that were trained.

The packages sentencepiece and protobuf are hidden from it, as they are not its own.
"""

import json
import subprocess
import sys
import textwrap

import pytest
from texts_helpers import lines
from tokenizers_helpers import (
    KINDS,
    byte_level_files,
    chatml_files,
    mistrals,
    smollm2,
    spm,
)

from tinyllama.tokenizers.opening import from_files, open_tokenizer
from tinyllama.tokenizers.tokenizer import write_files

pytest.importorskip("transformers", minversion="5")

TURNS = "<|im_start|>user\nhello there<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
SCRIPT = """
    import json, sys, warnings
    warnings.simplefilter("ignore")
    for hidden in ("sentencepiece", "google", "google.protobuf", "tiktoken"):
        sys.modules[hidden] = None
    import transformers
    transformers.logging.set_verbosity_error()
    found = {}
    for folder, texts in json.load(open(sys.argv[1])).items():
        made = transformers.AutoTokenizer.from_pretrained(folder)
        made.split_special_tokens = False
        found[folder] = {
            "ids": [made(text, add_special_tokens=False)["input_ids"] for text in texts],
            "whole": made("a")["input_ids"],
            "decoded": [made.decode(made(t, add_special_tokens=False)["input_ids"],
                                    clean_up_tokenization_spaces=False) for t in texts],
            "size": len(made), "bos": made.bos_token_id, "eos": made.eos_token_id,
            "template": made.chat_template,
        }
    json.dump(found, open(sys.argv[2], "w"))
"""


def transformers_says(folder, texts_of):
    """What transformers makes of folders, in a process where those packages cannot be imported."""
    (folder / "asked.json").write_text(json.dumps(texts_of))
    code = textwrap.dedent(SCRIPT)
    words = [sys.executable, "-c", code, folder / "asked.json", folder / "found.json"]
    subprocess.run([*map(str, words)], check=True)
    return json.loads((folder / "found.json").read_text())


def compared(folder, tokenizer, texts):
    """Write a tokenizer's files, and compare all that transformers makes of them."""
    write_files(tokenizer, folder / "model")
    found = transformers_says(folder, {str(folder / "model"): list(texts)})[str(folder / "model")]
    assert (found["bos"], found["eos"]) == (tokenizer.bos_id, tokenizer.eos_id)
    assert found["size"] == tokenizer.vocab_size
    assert found["whole"] == [*tokenizer.begin, *tokenizer.encode("a")]
    assert found["template"] == tokenizer.chat_template
    own = [tokenizer.encode(text, special=True) for text in texts]
    return [text for text, a, b in zip(texts, own, found["ids"], strict=True) if a != b]


# SentencePiece takes U+2581 for a space, we for what it is.
TEXTS = [line for line in lines() if "\u2581" not in line]


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_of_a_sentencepiece_model_have_its_ids(kind, tmp_path):
    differing = compared(tmp_path, from_files({"tokenizer.model": spm(kind)}, "t"), TEXTS)
    if "default" in kind:  # the library normalizes ligatures and marks by other rules
        differing = [text for text in differing if text.isascii()]
    if "unigram" in kind:  # of equally probable pieces it takes others
        differing = [text for text in differing if "  " not in text and "<0x" not in text]
    assert differing == []


@pytest.mark.parametrize("files", [chatml_files, byte_level_files], ids=["added", "json"])
def test_checkpoints_of_chat_models_have_the_ids_that_were_trained(files, tmp_path):
    assert compared(tmp_path, from_files(files(), "t"), [TURNS, *TEXTS]) == []


def test_checkpoints_of_real_models_have_their_ids(tmp_path):
    for number, model in enumerate([smollm2(tmp_path), *mistrals()]):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert compared(folder, open_tokenizer(model), [TURNS, *TEXTS]) == [], model
