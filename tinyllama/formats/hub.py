"""Models by their name on a hub: fetched into the cache of huggingface_hub, and opened from there.

    OWNER/NAME               the files of a model or an adapter in safetensors, and its tokenizer's
    OWNER/NAME:FILE.gguf     that one file
    OWNER/NAME@REVISION      of a branch, a tag or a commit; @REVISION comes before :FILE
    OWNER/NAME:PART          of a data set the files of one part ("train" where none is named)

Where the hub is (HF_ENDPOINT), the cache, the token and whether there is a network at all
(HF_HUB_OFFLINE) are huggingface_hub's own rules. Files that could run code are never fetched.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tinyllama.errors import WeightsError
from tinyllama.system.untrusted import printable, read_json

_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_NAME = re.compile(
    rf"(?P<repository>{_PART}/{_PART})(@(?P<revision>[^@:\s]{{1,200}}))?"
    r"(:(?P<file>[^:@\s]{1,200}\.gguf))?"
)
_DATA = re.compile(
    rf"(?P<repository>{_PART}/{_PART})(@(?P<revision>[^@:\s]{{1,200}}))?(:(?P<part>[\w.-]{{1,99}}))?"
)
# The first of these that a repository has decides what it is, and which weights belong to it.
_KINDS = ("config.json", "adapter_config.json", "params.json")
_BESIDE = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "LICENSE",
)
_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


class HubName(NamedTuple):
    """A repository, its revision, and a file of it or None."""

    repository: str
    revision: str | None
    file: str | None


def parse(text: str) -> HubName | None:
    """A name on the hub; None for text that is none."""
    match = _NAME.fullmatch(text)
    if match is None or ".." in text or match["repository"].endswith((".", "-")):
        return None
    return HubName(match["repository"], match["revision"], match["file"])


def name_of(path: Path) -> str | None:
    """OWNER/NAME@COMMIT of what lies in the cache of a hub; None for any other place."""
    for folder in (path, *path.parents):
        kind, *owner_and_name = folder.parent.parent.name.split("--")
        if folder.parent.name == "snapshots" and kind == "models" and len(owner_and_name) == 2:
            inside = path.relative_to(folder).as_posix()
            file = "" if inside == "." else f":{inside}"
            return f"{'/'.join(owner_and_name)}@{folder.name}{file}"
    return None


def leads_out(path: Path) -> bool:
    """Whether a file is a link to one that lies neither in its folder nor, where that is a snapshot
    in the cache of a hub, in the same repository there."""
    # Not Path.resolve, which raises RuntimeError for a link to itself.
    folder, target = (Path(os.path.realpath(place)) for place in (path.parent, path))
    if folder.parent.name == "snapshots":
        folder = folder.parent.parent
    return path.is_symlink() and not target.is_relative_to(folder)


def fetch(text: str) -> Path:
    """The folder or the file that a name on the hub stands for, fetched if need be.

    Raises WeightsError: no such name, no access, no network, or huggingface_hub is missing.
    """
    name = parse(text)
    assert name is not None
    hub = _library(text)
    with _in_one_line(text, hub):
        if name.file is not None:
            return Path(hub.hf_hub_download(name.repository, name.file, revision=name.revision))
        return _fetch_folder(hub, name)


def fetch_data(text: str, suffixes: Sequence[str]) -> list[Path]:
    """The files of a data set on the hub with one of these suffixes: those of its part "train", or
    all of them where none is named so; of OWNER/NAME:PART those of that part.

    Raises WeightsError: no such name, no access, no network, or huggingface_hub is missing.
    """
    match = _DATA.fullmatch(text)
    assert match is not None
    repository, revision, part = match["repository"], match["revision"], match["part"]
    hub = _library(text)
    with _in_one_line(text, hub, "data set"):
        if hub.constants.HF_HUB_OFFLINE:
            folder = Path(
                hub.snapshot_download(
                    repository, repo_type="dataset", revision=revision, local_files_only=True
                )
            )
            names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
        else:
            # Asked once first: listing tries five times for 23 s where there is no network.
            from huggingface_hub.utils import get_session

            get_session().head(hub.constants.ENDPOINT, timeout=10)
            names = hub.list_repo_files(repository, repo_type="dataset", revision=revision)
        wanted = _data_files(names, suffixes, part)
        if not wanted:
            what = f'for the part "{part}"' if part else f"that ends in {', '.join(suffixes)}"
            raise WeightsError(f"{text}: the data set has no file {what}")
        return [
            Path(hub.hf_hub_download(repository, name, repo_type="dataset", revision=revision))
            for name in wanted
        ]


def names_data(text: str) -> bool:
    """Whether text is OWNER/NAME, OWNER/NAME@REVISION or OWNER/NAME:PART."""
    return _DATA.fullmatch(text) is not None and ".." not in text


def _data_files(names: Iterable[str], suffixes: Sequence[str], part: str | None) -> list[str]:
    """Those with a suffix whose name, or a folder of it, is that of the part."""
    found = sorted(name for name in names if name.lower().endswith(tuple(suffixes)))
    pattern = re.compile(rf"(^|[/_.-]){re.escape(part or 'train')}([/_.-]|$)")
    return [n for n in found if pattern.search(n)] or ([] if part else found)


def _fetch_folder(hub: Any, name: HubName) -> Path:
    def get(file: str, revision: str | None) -> Path | None:
        """A file; None if the repository has none of that name."""
        cached = hub.try_to_load_from_cache(name.repository, file, revision=revision)
        if cached is hub._CACHED_NO_EXIST and revision is not None:
            return None
        try:
            return Path(hub.hf_hub_download(name.repository, file, revision=revision))
        except hub.errors.LocalEntryNotFoundError:
            raise
        except hub.errors.EntryNotFoundError:
            return None

    found = ((kind, get(kind, name.revision)) for kind in _KINDS)
    kind, path = next(((kind, path) for kind, path in found if path), (None, None))
    if path is None or kind is None:
        raise WeightsError(f"{_label(hub, name)}: holds none of {', '.join(_KINDS)}")
    commit = path.parent.name  # of the snapshot: all files are of one state of the repository
    for file in _weights(kind, lambda file: get(file, commit)):
        if get(file, commit) is None:
            raise WeightsError(
                f"{_label(hub, name)}: holds no {file}: only weights in safetensors are read; "
                f"a GGUF file is named OWNER/NAME:FILE.gguf"
            )
    for file in _BESIDE:
        _optional(hub, get, file, commit)
    return path.parent


def _optional(hub: Any, get: Callable[[str, str], Path | None], file: str, commit: str) -> None:
    """Fetch a file that may be missing; without a network it is taken to be."""
    try:
        get(file, commit)
    except hub.errors.LocalEntryNotFoundError:
        return


def _weights(kind: str, get: Callable[[str], Path | None]) -> Iterator[str]:
    """Names of the files with weights."""
    if kind == "adapter_config.json":
        yield "adapter_model.safetensors"
    elif kind == "params.json":
        yield (
            "consolidated.safetensors"
            if get("consolidated.safetensors")
            else ("consolidated.00.safetensors")
        )
        for number in range(1, 1000):
            if get(f"consolidated.{number:02d}.safetensors") is None:
                return
    elif (index := get(_INDEX)) is None:
        yield _WHOLE
    else:
        shards = read_json(index).get("weight_map")
        values = shards.values() if isinstance(shards, dict) else ()
        names = {file for file in values if isinstance(file, str)}
        yield from sorted(file for file in names if file.endswith(".safetensors"))


def _label(hub: Any, name: HubName) -> str:
    revision = f"@{name.revision}" if name.revision else ""
    return f"{name.repository}{revision} on {hub.constants.ENDPOINT}"


def _library(text: str) -> Any:
    """huggingface_hub, imported when a name is met, since that takes a while."""
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError as error:
        raise WeightsError(
            f"{text}: no such file or folder; if it is a name on the hub: "
            "pip install 'tinyllama-trainer[hub]'"
        ) from error
    return huggingface_hub


@contextmanager
def _in_one_line(text: str, hub: Any, kind: str = "model") -> Iterator[None]:
    """Raise WeightsError, in one line, for what huggingface_hub raises."""
    errors, where = hub.errors, f"{text}: no such file or folder here, and"
    try:
        yield
    except errors.GatedRepoError as error:
        raise WeightsError(
            f"{text}: access is granted on its page, {hub.constants.ENDPOINT}/"
            f"{text.partition(':')[0].partition('@')[0]}; then type hf auth login"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise WeightsError(f"{text}: no such revision on {hub.constants.ENDPOINT}") from error
    except errors.RepositoryNotFoundError as error:
        raise WeightsError(
            f"{where} no {kind} of that name on {hub.constants.ENDPOINT} (if it is private, type "
            "hf auth login)"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        why = "HF_HUB_OFFLINE is set" if hub.constants.HF_HUB_OFFLINE else "no connection to "
        why += "" if hub.constants.HF_HUB_OFFLINE else hub.constants.ENDPOINT
        raise WeightsError(f"{where} not in the cache of the hub either ({why})") from error
    except errors.EntryNotFoundError as error:
        raise WeightsError(f"{text}: no such file on {hub.constants.ENDPOINT}") from error
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise WeightsError(f"{text}: cannot be fetched: {printable(lines[0])}") from error
    except Exception as error:
        if not _is_of_http(error):
            raise
        raise WeightsError(
            f"{where} no connection to {hub.constants.ENDPOINT}: {printable(error)}"
        ) from error


def _is_of_http(error: Exception) -> bool:
    """Whether the library for HTTP that this version of huggingface_hub uses raised it."""
    return type(error).__module__.partition(".")[0].startswith(("httpx", "requests"))
