"""A launch's process: streams that last as long as it does, signals that are heard at once, an exit that waits for nothing."""

import contextlib
import io
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax

from tbptt_jax.study.process import lock

STOP = signal.SIGTERM, signal.SIGINT


class _Lasting(io.FileIO):
    """A stream whose reader may go away, or whose disk may fill up: the run goes on without it, and says so."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            number = self.fileno()
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
            if number == 1:
                print(
                    f"Standard output cannot be written to ({error.strerror}): going on without it. What is kept in files is.",
                    file=sys.stderr,
                )
            return len(data)


def keep_streams() -> None:
    """Makes standard output and error such that no text, no reader and no disk can end the run."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
        raw = io.BufferedWriter(_Lasting(stream.fileno(), "w", closefd=False))
        lines = stream.line_buffering or stream.write_through
        setattr(sys, name, io.TextIOWrapper(raw, stream.encoding, "backslashreplace", line_buffering=lines))


@contextlib.contextmanager
def heard(tell: Callable[[int], None]) -> Iterator[None]:
    """Calls ``tell(number)`` at each SIGTERM and SIGINT, in another thread, instead of what they did.

    Python runs its handlers between two instructions of the main thread, so not while a call compiles or runs. A thread
    therefore listens, woken by what the interpreter writes the moment a signal comes.
    """
    if threading.current_thread() is not threading.main_thread():  # to which alone signals come
        yield
        return
    here, there = socket.socketpair()
    there.setblocking(False)

    def listen() -> None:
        while number := here.recv(1):
            if number[0] in STOP:
                tell(number[0])

    before = {number: signal.signal(number, lambda *_: None) for number in STOP}
    waker = signal.set_wakeup_fd(there.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(waker)
        for number, handler in before.items():
            signal.signal(number, handler)
        there.close()
        thread.join()
        here.close()


@contextlib.contextmanager
def stop_asked(after: str = "after this call, saved") -> Iterator[Callable[[], int]]:
    """Yields ``asked() -> int``: the first SIGTERM or SIGINT that has come, or 0. A second one ends the process at once.

    Args:
      after: when it stops and what becomes of the work, as it is told.
    """
    told: list[int] = []

    def tell(number: int) -> None:
        told.append(number)
        if len(told) > 1:
            leave(told[0])
        print(f"{signal.Signals(number).name}: stopping {after}. Again: at once.", file=sys.stderr)

    with heard(tell):
        yield lambda: told[0] if told else 0


def leave(number: int | None = None) -> None:
    """Ends the process by a signal's number, or with status 2, now, whatever its threads are at."""
    lock.release()
    if number is None:
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(2 if number is None else 128 + number)


def end(main: Callable[[], None]) -> None:
    """Runs ``main`` and ends the process with its exit status.

    What the interpreter waits for at its own exit (threads of XLA, of Orbax and of executors) is not waited for: all that
    is written is on disk by then.
    """
    status: Any = 0
    try:
        main()
    except SystemExit as asked:
        status = asked.code or 0
        if not isinstance(status, int):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        traceback.print_exc()
        status = 1
    lock.release()
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()  # waits for the other processes
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)
