"""A training run that measures its own memory: python memory_run.py RESULT train CONFIG ...

Writes the highest of tinygrad's counter of allocated bytes, and of resident memory, as JSON.
"""

import json
import sys
from pathlib import Path

from tinygrad.device import Buffer
from tinygrad.helpers import GlobalCounters

from tinyllama.cli import app
from tinyllama.system import memory

highest = 0
allocate = Buffer.allocate


def counting(buffer, *args, **options):
    global highest
    result = allocate(buffer, *args, **options)
    highest = max(highest, GlobalCounters.mem_used)
    return result


Buffer.allocate = counting
try:
    app.main(sys.argv[2:])
finally:
    found = {"tensors": highest, "resident": memory.resident_bytes(peak=True)}
    Path(sys.argv[1]).write_text(json.dumps(found))
