"""Models and adapters for other programs: Hugging Face's, llama.cpp and Ollama, mlx-lm.

    hf      a folder that transformers, PEFT and this package load
    gguf    one file (F32, F16, BF16, Q8_0, Q4_0) with its tokenizer, and a Modelfile for Ollama;
            of an adapter a LoRA file, of its base the very blocks that it was trained on
    mlx     a folder that mlx-lm loads

A tensor is written at a time, beside the place where the export will be. It is read back, compared
with its source (check.py), and only then given its name: there is never half an export, or a wrong
one. Blocks of a GGUF source stay as they are unless another type is chosen.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tinyllama.convert.export_adapter import write_adapter
from tinyllama.convert.export_model import (
    KINDS,
    Exported,
    Job,
    Place,
    Target,
    modelfile_path,
    write_whole,
)
from tinyllama.errors import ConfigError, WeightsError
from tinyllama.formats.dtypes import FLOATS
from tinyllama.formats.gguf import SUFFIX
from tinyllama.formats.modelfile import NAME as MODELFILE
from tinyllama.formats.peft import is_adapter
from tinyllama.system.files import atomic_directory, fsync_path, remove_partials
from tinyllama.system.partials import unfinished

__all__ = ["KINDS", "Exported", "Job", "Target", "export"]


def export(job: Job) -> Exported:
    """Write one export. Raises ConfigError, TokenizerError and WeightsError, and then leaves
    nothing behind."""
    _check_options(job)
    try:
        with _placing(job.out) as place:
            if is_adapter(job.source):
                return write_adapter(job, place)
            return write_whole(job, place)
    except OSError as error:
        name = error.filename or job.out
        raise WeightsError(f"{name}: cannot be written: {error.strerror or error}") from error


def _check_options(job: Job) -> None:
    """Refuse what does not fit together, before anything is read."""
    adapter = is_adapter(job.source)
    _refuse_existing(job.out)
    if job.dtype is not None and job.dtype not in FLOATS and job.target != "gguf":
        raise ConfigError(
            f"--dtype: got {job.dtype.lower()}, must be float32, float16 or bfloat16: only "
            "--to gguf has quantised types"
        )
    if not adapter and (given := _options_of_adapters(job)):
        raise ConfigError(f"{given}: must be left out: {job.source} holds a whole model")
    if job.with_base and (job.merged or job.target != "gguf"):
        raise ConfigError("--with-base: goes with --to gguf, and without --merged")
    alone = adapter and not job.merged and not job.with_base
    if alone and job.dtype is not None and job.dtype not in FLOATS:
        raise ConfigError(
            f"--dtype: got {job.dtype.lower()}, must be float32, float16 or bfloat16 for an "
            "adapter alone: type --with-base to write its base too, or --merged"
        )
    if job.target != "gguf" and job.out.suffix == SUFFIX:
        raise ConfigError(f"{job.out}: is the name of a GGUF file: type --to gguf")
    if job.with_base and job.out.suffix == SUFFIX:
        raise ConfigError(f"{job.out}: must be a folder with --with-base, which writes two files")


def _refuse_existing(out: Path) -> None:
    if os.path.lexists(out):
        raise WeightsError(f"{out}: exists already: name a new one")


def _options_of_adapters(job: Job) -> str:
    given = {"--base": job.base is not None, "--merged": job.merged, "--with-base": job.with_base}
    return ", ".join(option for option, is_given in given.items() if is_given)


# ---- where it goes


@contextmanager
def _placing(out: Path) -> Iterator[Place]:
    """Give what was written its name when the block ends without error."""
    if out.parent.is_dir():
        remove_partials(out.parent)  # of exports that were killed
    if out.suffix != SUFFIX:
        with atomic_directory(out) as folder:
            yield Place(folder, None)
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with unfinished(out, Path.mkdir) as folder:
        try:
            yield Place(folder, out.name)
            beside = modelfile_path(out)
            for path in folder.iterdir():
                fsync_path(path)
            _refuse_existing(out)  # it may have appeared since
            os.rename(folder / MODELFILE, beside)
            os.rename(folder / out.name, out)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    fsync_path(out.parent)
