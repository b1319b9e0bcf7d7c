"""Checkpoints: a run's state on disk, whole or not at all, to be gone on with bit for bit.

    with checkpoint.open("runs/mine/checkpoints", settings={"window": 16, "lanes": 32}) as store:
        saved = store.restore(like)  # None at first
        ...
        store.save(update, state, {"history": history})

Orbax writes a checkpoint beside its place, in a thread of its own, and moves it there when it is complete. Checksums of all
that is in it are kept with it, and compared when it is read.

A state is a tree whose leaves are arrays, typed keys among them, or Python numbers and strings. Bits are kept whatever the
dtype. What comes back is, leaf by leaf, of the kind of ``like``: a NumPy array where that is one, a number or a string where
that is one, and else a JAX array; or a NumPy array, if JAX as it is configured would change the bits: 64-bit numbers without
``jax_enable_x64``, dates, strings, another byte order.
"""

import contextlib
import errno
import json
import logging
import operator
import os
import pathlib
import re
import shutil
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from tbptt_jax.arrays import PyTree, check_whole, quoted, shortened
from tbptt_jax.checkpoint_leaves import (
    as_json,
    devices_of,
    is_packed,
    is_whole,
    kinds_of,
    names_of,
    pack,
    stored_of,
    unpack,
)


class Saved(NamedTuple):
    """Attributes:
    update: the update after which it was saved.
    state: the state, bit for bit.
    data: what was saved beside it.
    """

    update: int
    state: PyTree
    data: Any


class Store(NamedTuple):
    """Attributes:
    save: ``(update, state, data)``: begins to write, once the save before it is done. The state is copied first, so it
      may be donated at once. ``data`` is anything JSON can hold. ValueError, before anything is written: a leaf of the state
      or ``data`` cannot be kept, or ``update`` is not after those on disk. OSError: this or the one before could not be
      written.
    restore: ``(like) -> Saved | None``: the newest that is whole, None if there is none at all. ``like`` has the state's
      tree; its leaves are the state's or ``jax.ShapeDtypeStruct``, and where they have shardings, the state is placed so.
    """

    save: Callable[[int, PyTree, Any], None]
    restore: Callable[[PyTree], Saved | None]


@contextlib.contextmanager
def open(directory: str | pathlib.Path, settings: dict[str, Any], keep: int = 3) -> Iterator[Store]:
    """The checkpoints of one run. On leaving, the last one is on disk.

    A state is saved by its global shapes, so that it can be placed on any number of devices and processes; only what has an
    axis of devices, such as the sketch of ``uoro`` (see :func:`tbptt_jax.sharding.over_lanes`), needs as many of them. All
    processes save and restore.

    Args:
      directory: where they are, each in a directory named by its update; made if missing.
      settings: what makes it this run and no other, as JSON.
      keep: how many to keep, the newest.

    Returns:
      A context manager that gives the :class:`Store`.

    Raises:
      ValueError: now, if ``keep`` is not a whole number, at least 1, or ``settings`` no dict that JSON can hold; from
        ``restore``, if the checkpoint is of a run with other settings or another state, or if all are broken. If only the
        newest are, a warning says so, they are set aside, and the one before them is restored.
      OSError: now, if the directory cannot be made; from ``save`` and on leaving, if one could not be written, as on a full
        disk. Those before it are intact.
    """
    directory = pathlib.Path(directory).absolute()
    if not isinstance(settings, dict):
        raise ValueError(f"`settings` is a {type(settings).__name__}; it needs to be a dict, such as {{'window': 16}}.")
    settings = as_json("settings", settings)
    check_whole("keep", keep)

    def written(write: Callable[..., Any], *args: Any, **options: Any) -> None:
        try:
            write(*args, **options)
        except Exception as error:  # Orbax and TensorStore have many kinds
            manager.reload()
            good = max(manager.all_steps(), default=None)
            left = "There is none before it" if good is None else f"The one of update {good} is intact"
            cure = "make room" if _code(error) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else "see to that"
            raise OSError(
                f"A checkpoint could not be written to {directory}: {_reason(error)} {left}; {cure}, then run again."
            ) from error

    def save(update: int, state: PyTree, data: Any) -> None:
        update, latest = _update(update), max(manager.all_steps(), default=-1)
        if update <= latest:
            raise ValueError(
                f"`update` is {update}, and {directory} holds update {latest}: give a later one, or use another directory."
            )
        arrays, leaves = pack(state)
        # By way of text: what is written later, in another thread, is what `data` is now.
        content = {"update": update, "settings": settings, "leaves": leaves, "data": as_json("data", data)}
        run = {"content": content, "checksum": _checksum_of_json(content)}
        items: dict[str, Any] = (
            {"arrays": ocp.args.StandardSave(arrays)} if arrays else {}
        )  # Orbax refuses an empty one
        written(manager.save, update, args=ocp.args.Composite(run=ocp.args.JsonSave(run), **items), force=True)

    def restore(like: PyTree) -> Saved | None:
        written(manager.wait_until_finished)
        found, broken = _newest(manager, directory, _agree)
        if found is None:
            if broken:
                raise ValueError(
                    f"{' '.join(broken.values())} No other is left: begin in another directory, or remove this one."
                )
            return None
        update, content, arrays = found
        places = _check_same_run(directory, content, settings, like)
        for each, sentence in broken.items():  # Orbax would not write in their place
            if jax.process_index() == 0:
                aside = directory / f"{each}.broken"
                shutil.rmtree(aside, ignore_errors=True)
                (directory / str(each)).rename(aside)
                warnings.warn(f"{sentence} It is set aside as {aside.name}; update {update} is used.", stacklevel=2)
        _agree(True)  # the first process has set them aside
        manager.reload()
        return Saved(update, unpack(arrays, content["leaves"], like, places), content["data"])

    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"There can be no directory {directory}: {error.strerror}. Give another.") from error
    with _quiet():
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        manager = ocp.CheckpointManager(directory, options=options)
        try:
            yield Store(save, restore)
            written(manager.wait_until_finished)
        finally:
            manager.close()


def save(directory: str | pathlib.Path, state: PyTree) -> None:
    """Writes a state, such as ``(params, carry)`` of a model to be served, in the place of the one there was before.

    The one before is kept until the next, for those who are reading it.

    Args:
      directory: where to; made if missing.
      state: a tree of arrays, or of Python numbers and strings.

    Raises:
      ValueError: if what is there is another state, such as a training run's: it is not written over; or a leaf cannot be
        kept: an array that is masked, structured, of Python objects, or donated.
      OSError: if it could not be written; the one before is intact.
    """
    with open(directory, {}, keep=2) as store:
        before = store.restore(state)
        store.save(before.update + 1 if before else 0, state, None)


def load(directory: str | pathlib.Path, like: PyTree) -> PyTree:
    """The state that :func:`save` wrote last. Nothing is changed on disk, so others may be writing the next.

    Args:
      directory: where it is.
      like: the state's tree, of its leaves or ``jax.ShapeDtypeStruct``, as ``jax.eval_shape`` makes them. A leaf that is a
        Python number, a string or a NumPy array comes back as one.

    Returns:
      The state, bit for bit. If it is broken, a warning says so, and it is the one before, which ``save`` keeps.

    Raises:
      ValueError: if there is none, all are broken, or it is another.
    """
    return newest(directory, like).state


def newest(directory: str | pathlib.Path, like: PyTree, *, partial: bool = False) -> Saved:
    """The newest checkpoint that is whole, as :func:`load` reads it, with its update and data.

    Args:
      directory: where it is.
      like: the state's tree, of its leaves or ``jax.ShapeDtypeStruct``.
      partial: of any run, whatever its settings, only those leaves that ``like`` has; subtrees that are not wanted are None.

    Raises:
      ValueError: if there is none, all are broken, or it is another.
    """
    directory = pathlib.Path(directory).absolute()
    if not directory.is_dir():
        raise ValueError(f"There is no directory {directory}: give one that `checkpoint.save` has written.")
    # What goes with `read_only`: Orbax warns of what it has to set itself.
    options = ocp.CheckpointManagerOptions(read_only=True, save_interval_steps=0, create=False)
    with _quiet(), ocp.CheckpointManager(directory, options=options) as manager:
        found, broken = _newest(manager, directory, bool)  # whichever process asks
    if found is None:
        raise ValueError(
            f"{' '.join(broken.values())} No other is left: write it again with `checkpoint.save`, in another directory."
            if broken
            else f"{directory} holds no checkpoint: give a directory that `checkpoint.save` has written."
        )
    update, content, arrays = found
    places = _check_same_run(directory, content, content["settings"] if partial else {}, like, partial)
    for sentence in broken.values():
        warnings.warn(f"{sentence} The one before it, {found[0]}, is used.", stacklevel=2)
    return Saved(update, unpack(arrays, content["leaves"], like, places), content["data"])


def _newest(
    manager: ocp.CheckpointManager, directory: pathlib.Path, agree: Callable[[bool], bool]
) -> tuple[tuple[int, dict[str, Any], list[np.ndarray]] | None, dict[int, str]]:
    """``(update, JSON, arrays)`` of the newest checkpoint that could be read, and what is wrong with those after it."""
    broken: dict[int, str] = {}
    for update in sorted(manager.all_steps(), reverse=True):
        found, reason = None, "Another process could not read it."
        try:
            found = (update, *_read(manager, update))
        except Exception as error:  # of any kind
            reason = _reason(error)
        if agree(found is not None):
            return found, broken
        broken[update] = f"The checkpoint {directory / str(update)} is broken: {reason}"
    return None, broken


def _agree(fine: bool) -> bool:
    """Whether it is fine in all processes, which wait for each other."""
    return fine if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.bool_(fine)).all())


def _read(manager: ocp.CheckpointManager, update: int) -> tuple[dict[str, Any], list[np.ndarray]]:
    """The JSON and the arrays of a checkpoint, or an exception of any kind if something is wrong with it."""
    run = manager.restore(update, args=ocp.args.Composite(run=ocp.args.JsonRestore())).run
    if not isinstance(run, dict) or {"content", "checksum"} - set(run):
        raise ValueError("its JSON is not what is written here")
    content = run["content"]
    if _checksum_of_json(content) != run["checksum"]:
        raise ValueError("its JSON does not have its checksum")
    _check_content(content)
    if content.get("update", update) != update:  # those of before do not say
        raise ValueError(f"it is of update {content['update']}, under another's number")
    templates = [np.broadcast_to(np.empty((), jax.numpy.dtype(d)), s) for s, d in map(stored_of, content["leaves"])]
    wanted = {str(i): array for i, array in enumerate(templates) if array.size}
    items: dict[str, Any] = {"arrays": ocp.args.StandardRestore(wanted)} if wanted else {}
    stored = manager.restore(update, args=ocp.args.Composite(**items)).arrays if wanted else {}
    arrays = [stored.get(str(i), array) for i, array in enumerate(templates)]
    for leaf, array in zip(content["leaves"], arrays, strict=True):
        if "value" not in leaf and zlib.crc32(array.tobytes()) != leaf["checksum"]:
            raise ValueError(f"`{shortened(str(leaf['path']))}` does not have its checksum")
    return content, arrays


def _check_content(content: Any) -> None:
    """Raises a ``ValueError`` unless it is as ``save`` writes it: a checksum that fits does not say so."""

    try:
        fine = (
            isinstance(content, dict)
            and is_whole(content.get("update", 0))
            and isinstance(content.get("settings"), dict)
            and isinstance(content.get("leaves"), list)
            and "data" in content
            and all(map(is_packed, content["leaves"]))
        )
    except Exception:  # a dtype or an implementation of keys that there is not
        fine = False
    if not fine:
        raise ValueError("its JSON is not what is written here")


def _check_same_run(
    directory: pathlib.Path, content: dict[str, Any], settings: dict[str, Any], like: PyTree, partial: bool = False
) -> list[int]:
    """Where each leaf of ``like`` is among those of the checkpoint, if it is of this run and state, or ``partial`` of it."""
    old, nothing = content["settings"], "nothing"

    def shown(settings: dict[str, Any], name: str) -> str:
        return quoted(settings[name]) if name in settings else nothing

    differ = [
        f"{shortened(str(name))} {shown(old, name)}, here {shown(settings, name)}"
        for name in {**old, **settings}
        if name not in old or name not in settings or not _same(old[name], settings[name])
    ]
    if not differ:
        kinds = kinds_of("like", like)
        then, now = (
            dict(zip(names_of(leaves), (f"{leaf['dtype']}{leaf['shape']}" for leaf in leaves), strict=True))
            for leaves in (content["leaves"], kinds)
        )
        differ = [
            f"`{shortened(str(path))}` {then.get(path, nothing)}, here {now.get(path, nothing)}"
            for path in (now if partial else {**then, **now})
            if then.get(path) != now.get(path)
        ]
        devices = None if partial else devices_of(content["leaves"], kinds)
        if devices:
            raise ValueError(
                f"The checkpoints in {directory} hold {differ[0]}: of what the influence knows, every device has its own, "
                f"{devices[0]} then and {devices[1]} here: run with {devices[0]} devices, or begin in another directory."
            )
    if differ:
        more = f" (and {len(differ) - 3} more)" if len(differ) > 3 else ""
        raise ValueError(
            f"The checkpoints in {directory} are of another run: there {'; '.join(differ[:3])}{more}. Run with the "
            "settings of then to go on with it, or begin in another directory."
        )
    order = {name: i for i, name in enumerate(then)}  # a dict has its keys sorted, a NamedTuple its fields as written
    return [order[name] for name in now]


def _same(a: Any, b: Any) -> bool:
    return a == b or json.dumps(a) == json.dumps(b)  # a NaN is not equal to itself


def _update(update: Any) -> int:
    try:
        number = operator.index(update)
    except TypeError:
        number = -1
    if number < 0:
        raise ValueError(f"`update` is {quoted(update)}; it needs to be a whole number, at least 0.")
    return number


def _checksum_of_json(content: Any) -> int:
    return zlib.crc32(json.dumps(content).encode())


def _code(error: Exception) -> int | None:
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return int(code[1]) if code else getattr(error, "errno", None)


def _reason(error: Exception) -> str:
    """What others' exceptions say, without the pages that TensorStore adds."""
    if code := re.search(r"os_error_code='(\d+)'", str(error)):
        return f"{os.strerror(int(code[1]))}."
    said = str(error).strip().partition("\n")[0].partition(" [tensorstore_spec")[0].rstrip(".")
    return f"{said}." if said and isinstance(error, ValueError | OSError) else f"{error!r}."


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Orbax raises what went wrong, and besides logs it several times as pages, and leaves TensorStore calling back into
    an event loop that is closed. The exception is enough."""
    log, hook = logging.getLogger("absl"), sys.unraisablehook

    def not_orbax(record: logging.LogRecord) -> bool:
        return f"{os.sep}orbax{os.sep}" not in record.pathname

    def not_closed(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    log.addFilter(not_orbax)
    sys.unraisablehook = not_closed
    yield
    sys.unraisablehook = hook  # not after an exception: writes that it cut short come back later
    log.removeFilter(not_orbax)
