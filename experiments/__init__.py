"""The launches. Each needs standard streams: where one was closed (``>&-``), the next file opened would take its place."""

import os as _os
import sys as _sys

for _number in (0, 1, 2):
    try:
        _os.fstat(_number)
    except OSError:
        _os.open(_os.devnull, _os.O_RDWR)  # takes the lowest number that is free: this one
_sys.stdout = _sys.stdout or open(_os.devnull, "w")  # noqa: SIM115
_sys.stderr = _sys.stderr or open(_os.devnull, "w")  # noqa: SIM115
