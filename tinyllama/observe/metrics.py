"""metrics.jsonl: what a run measures, one object per step."""

import json
import os
from pathlib import Path
from typing import Any

from tinyllama.errors import CheckpointError
from tinyllama.system.files import atomic_write, naming_file


class MetricsLog:
    """Writes metrics.jsonl of a run; each line is in the file before the next step begins."""

    def __init__(self, path: Path, first_step: int) -> None:
        """Open for steps from `first_step` on. Lines of these steps, left by a run that was killed
        after its last checkpoint, are removed."""
        self.path = path
        _drop_from(path, first_step)
        self._file = open(path, "a", encoding="utf-8")

    def write(self, values: dict[str, Any]) -> None:
        """Append one object. Raises OSError that names the file."""
        with naming_file(self.path):
            self._file.write(json.dumps(values) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file once everything is on disk."""
        with naming_file(self.path), self._file:
            self._file.flush()
            os.fsync(self._file.fileno())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The objects of metrics.jsonl, without a last line that a kill cut short.

    Raises CheckpointError, which names the file, if it holds something else.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        whole = [line for line in lines[:-1] if line]
        records = [json.loads(line) for line in whole]
        for number, values in enumerate(records, 1):
            if not isinstance(values, dict) or not isinstance(values.get("step"), int):
                raise ValueError(f"line {number} has no step")
    except ValueError as error:
        raise CheckpointError(f"{path}: not a metrics file: {error}") from error
    return records


def _drop_from(path: Path, first_step: int) -> None:
    if not path.exists():
        return
    kept = [line for line in read_metrics(path) if line["step"] < first_step]
    text = "".join(json.dumps(line) + "\n" for line in kept)
    atomic_write(path, text.encode())
