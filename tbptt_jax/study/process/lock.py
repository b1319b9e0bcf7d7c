"""One launch, one workdir: a lock that dies with its process, and tells who holds it."""

import contextlib
import fcntl
import os
import pathlib
import re
import socket
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from tbptt_jax.study.process.writing import short

NAME = ".lock"
_held: dict[pathlib.Path, tuple[Any, bool]] = {}  # the open lock file, and whether the directory was made for it


def workdir(path: str | pathlib.Path, flag: str = "workdir") -> pathlib.Path:
    """The directory to write into, made if it is missing, and this launch's alone until it ends.

    Of several processes of one launch, the first holds it for all. A ``ValueError`` if it cannot be made or written to, or
    another launch is at work there.
    """
    directory, given, refused = expanded(path, flag), f"--{flag}={short(path)}", ""
    if re.search("[\n\r\ud800-\udfff]", str(directory.absolute())):
        raise ValueError(f"{given}: its path has a line's end in it, or is not UTF-8. Name another directory.")
    try:
        if jax.process_index() == 0:
            take(directory)
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except BlockingIOError as error:
        refused = f"{given}: {error}"
    except OSError as error:
        refused = f"{given} cannot be written to ({error.strerror}): name a directory that can."
    if jax.process_count() > 1 and multihost_utils.process_allgather(np.bool_(bool(refused))).any():
        refused = refused or f"{given} was refused to another of the processes, which says why."
    if refused:
        raise ValueError(refused)
    return directory


def expanded(path: str | pathlib.Path, flag: str = "workdir") -> pathlib.Path:
    """The path that a flag names, ``~`` as the home directory; a ``ValueError`` if it names none."""
    if not str(path):
        raise ValueError(f"--{flag} is empty: name a directory; . is the one you are in.")
    try:
        return pathlib.Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"--{flag}={short(path)}: no such home directory. Write it out, or ./~ for a name.") from error


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
        raise BlockingIOError(f"another launch is at work there, {who}: wait for it, stop it, or give another workdir.")
    if host and host != here:
        file.close()
        raise BlockingIOError(
            f"another launch is at work there, {who}, or was killed: if it is gone, remove the file {NAME} in it and run this "
            "again; else wait for it, or give another workdir."
        )
    file.truncate(0)
    file.write(f"{here} {os.getpid()}\n")
    file.flush()
    _held[directory] = file, made


@contextlib.contextmanager
def holding(path: str | pathlib.Path | None) -> Iterator[pathlib.Path | None]:
    """The :func:`workdir`, given up at the end unless this process had it before; None for None."""
    if path is None:
        yield None
        return
    had = expanded(path).absolute() in _held
    directory = workdir(path)
    try:
        yield directory
    finally:
        if not had:
            release(directory)


def release(directory: pathlib.Path | None = None) -> None:
    """Gives up a directory, or all that this process holds. One that was made for it, and has nothing in it, is removed."""
    for held in list(_held):
        if directory is not None and held != directory.absolute():
            continue
        file, made = _held.pop(held)
        with contextlib.suppress(OSError):
            (held / NAME).unlink()
            if made:
                held.rmdir()
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
        pass  # it is another user's
    return True
