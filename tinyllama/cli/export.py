"""Write a model or an adapter for other programs: Hugging Face's, llama.cpp and Ollama, mlx-lm.

tinyllama export SRC DST [--to hf|gguf|mlx] [--dtype float32|float16|bfloat16|q8_0|q4_0]

SRC is what opens as a model: a folder, a run, an adapter, a .gguf file, a name on the hub. What was
written is read back and compared with SRC before it gets its name. Of an adapter the adapter alone
is written; --merged makes one model of it and its base, --with-base writes the base beside it.
"""

import argparse
from pathlib import Path

from tinyllama.cli.arguments import path
from tinyllama.cli.shared import model_folder, select_device, verify_model
from tinyllama.system.notices import to_stdout

TARGETS = ("hf", "gguf", "mlx")
DTYPES = ("float32", "float16", "bfloat16", "q8_0", "q4_0")
ALIASES = {"f32": "float32", "fp32": "float32", "f16": "float16", "fp16": "float16"}
ALIASES |= {"bf16": "bfloat16", "q8": "q8_0", "q4": "q4_0"}


def dtype(word: str) -> str:
    """A type's name, or another one of it."""
    name = ALIASES.get(word.lower(), word.lower())
    if name not in DTYPES:
        raise argparse.ArgumentTypeError(f"got {word!r}, must be one of {', '.join(DTYPES)}")
    return name


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command line."""
    parser.add_argument("source", metavar="SRC", type=path, help="the model or adapter")
    parser.add_argument(
        "out",
        metavar="DST",
        type=path,
        help="folder to write, or the name of a .gguf file; must not exist",
    )
    parser.add_argument(
        "--to",
        choices=TARGETS,
        help="hf: a Hugging Face folder; gguf: a file for llama.cpp, with a Modelfile for Ollama;"
        " mlx: a folder for mlx-lm (default: gguf if DST ends in .gguf, else hf)",
    )
    parser.add_argument(
        "--dtype",
        type=dtype,
        metavar="|".join(DTYPES),
        help="type to store weights in; q8_0 and q4_0 go with --to gguf (default: as they are"
        " stored in SRC)",
    )
    parser.add_argument(
        "--base",
        type=path,
        metavar="FOLDER",
        help="where an adapter's base is (default: where it was in training)",
    )
    parser.add_argument(
        "--merged", action="store_true", help="write an adapter and its base as one model"
    )
    parser.add_argument(
        "--with-base",
        action="store_true",
        help="write an adapter's base beside it, in the very 4 bits that a QLoRA run trained it on"
        " (goes with --to gguf)",
    )


def run(options: argparse.Namespace) -> None:
    """Write the export; print what it is, and how far it is from its source."""
    out: Path = options.out
    source = model_folder(options.source)
    verify_model(source, options.base, remembered=False)
    select_device(None)  # before tinygrad chooses one, by its own reading of the environment
    from tinyllama.convert.export import KINDS, Job, export

    done = export(
        Job(
            source,
            out,
            options.to or ("gguf" if out.suffix == ".gguf" else "hf"),
            None if options.dtype is None else KINDS[options.dtype],
            base=options.base,
            merged=options.merged,
            with_base=options.with_base,
        )
    )
    for note in done.notes:
        to_stdout(note)
    print(f"checked: {done.check}")
    beside = "".join(f", {file.name}" for file in done.files[1:])
    print(f"{done.files[0]}{beside}: {done.size_bytes:,} bytes, {done.kind}")
