"""Links in a model's folder that lead out of it: what they lead to is not given away in a copy."""

from collections.abc import Iterable
from pathlib import Path

from tinyllama.errors import WeightsError
from tinyllama.formats.hub import leads_out


def refuse_links_out(paths: Iterable[Path]) -> None:
    """Raise WeightsError for a link out of its folder: in a folder from somebody else it may lead
    to any file of this user."""
    for path in paths:
        if leads_out(path):
            raise WeightsError(
                f"{path}: is a link out of its folder, which is not followed when a model is "
                "copied: put the file itself there"
            )
