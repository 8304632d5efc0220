"""The highest speed that was measured on this machine, which a run's own is compared with.

`tinyllama profile` measures it where it writes files, and keeps it per device and number of
threads; measuring in each run would make its start later.
"""

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tinygrad import Device

from tinyllama.errors import CheckpointError
from tinyllama.system import device
from tinyllama.system.files import atomic_write, make_folder
from tinyllama.system.untrusted import read_json_file


def _file() -> Path:
    name = Device.DEFAULT.replace(":", "-")
    return device.cache_folder() / f"ceilings-{name}-{device.threads()}.json"


def keep_ceilings(ceilings: Mapping[str, float]) -> None:
    """Keep what was measured for the runs to come; a folder that cannot be written is no error."""
    with suppress(OSError):
        make_folder(_file().parent, 0o700)
        atomic_write(_file(), f"{json.dumps(dict(ceilings))}\n".encode())


def known_gflops(dtype: str) -> float | None:
    """Billions of operations per second of products of `dtype` on this device; None where nobody
    measured them."""
    file = _file()
    if not file.is_file():
        return None
    try:
        found = read_json_file(file, dict[str, Any], CheckpointError)
    except CheckpointError:  # it only saves measuring again
        return None
    value = found.get(f"{dtype}_gflops")
    is_speed = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_speed and 0 < value < math.inf else None  # type: ignore[operator,arg-type]
