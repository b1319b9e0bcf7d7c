import os as _os
import signal as _signal
import sys as _sys

if _sys.argv[0] == "-m":  # a launch that begins: until it listens itself, a signal ends it without a traceback
    for _sent in (_signal.SIGINT, _signal.SIGTERM):
        _signal.signal(_sent, lambda number, _: (_os.write(2, b"Stopped before it began.\n"), _os._exit(128 + number)))

# A stream that whoever started this has closed: without one of its number, the next file opened would take its place.
for _number, _name in enumerate(("stdin", "stdout", "stderr")):
    if getattr(_sys, _name) is None:
        try:
            _os.fstat(_number)
        except OSError:
            _os.set_inheritable(_os.open(_os.devnull, _os.O_RDWR), True)  # the least number that is free: this one
        setattr(_sys, _name, open(_os.devnull, "r" if _number == 0 else "w", encoding="utf-8"))  # noqa: SIM115
