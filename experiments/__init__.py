import os as _os
import sys as _sys

# A stream that whoever started this has closed: without one of its number, the next file opened would take its place.
for _number, _name in enumerate(("stdin", "stdout", "stderr")):
    if getattr(_sys, _name) is None:
        try:
            _os.fstat(_number)
        except OSError:
            _os.set_inheritable(_os.open(_os.devnull, _os.O_RDWR), True)  # the least number that is free: this one
        setattr(_sys, _name, open(_os.devnull, "r" if _number == 0 else "w", encoding="utf-8"))  # noqa: SIM115
