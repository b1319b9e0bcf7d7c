"""One launch, one workdir: a lock that dies with its process, and tells who holds it."""

import contextlib
import fcntl
import os
import pathlib
import socket
from typing import Any

NAME = ".lock"
_held: dict[pathlib.Path, tuple[Any, bool]] = {}  # the open lock file, and whether the directory was made for it


def take(directory: pathlib.Path) -> None:
    """Makes the directory if it is missing, and this process its only writer until :func:`release`.

    The system's lock on ``.lock`` in it ends with its process, however that ends. Where a directory is shared by hosts it
    may hold for one of them alone, so a file that names another host counts as held; so it does on drives without locks,
    where the process that it names is looked for.

    Raises:
      BlockingIOError: if another process holds it; its text is a sentence.
      OSError: if the directory cannot be made or written to.
    """
    directory = directory.absolute()
    if directory in _held:
        return
    made = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    path, here = directory / NAME, socket.gethostname()
    while True:
        file = path.open("a+", encoding="utf-8", errors="replace")
        locked = _locked(file)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        file.close()  # its owner has just removed it
    file.seek(0)
    host, _, pid = file.read(1000).strip().rpartition(" ")
    who = f"process {pid} on {host}" if host else "just started"
    if locked is False or (locked is None and host == here and _is_alive(pid)):
        file.close()
        raise BlockingIOError(
            f"another launch is at work there, {who}: wait for it, stop it, or give another --workdir."
        )
    if host and host != here:
        file.close()
        raise BlockingIOError(
            f"another launch is at work there, {who}, or was killed: if it is gone, remove the file {NAME} in it and run this "
            "again; else wait for it, or give another --workdir."
        )
    file.truncate(0)
    file.write(f"{here} {os.getpid()}\n")
    file.flush()
    _held[directory] = file, made


def release() -> None:
    """Gives up all that this process holds. A directory that was made for it, and has nothing in it, is removed."""
    while _held:
        directory, (file, made) = _held.popitem()
        with contextlib.suppress(OSError):
            (directory / NAME).unlink()
            if made:
                directory.rmdir()
        file.close()


def _locked(file: Any) -> bool | None:
    """Whether the lock could be had; None where there are no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        return True
    return True
