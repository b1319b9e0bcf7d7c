"""Checkpoints: a run's state on disk, whole or not at all, to be gone on with bit for bit.

    with checkpoint.open("runs/mine/checkpoints", settings={"window": 16, "lanes": 32}) as store:
        saved = store.restore(like)  # None at first
        ...
        store.save(update, state, {"history": history})

Orbax writes a checkpoint beside its place, in a thread of its own, and moves it there when it is complete. Checksums of all
that is in it are kept with it, and compared when it is read.
"""

import contextlib
import json
import logging
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

from tbptt_jax.window import quoted

PyTree = Any


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
      may be donated at once; its leaves are arrays or single numbers. ``data`` is anything JSON can hold. ValueError: a leaf
      is something else, or was donated. OSError: this or the one before could not be written.
    restore: ``(like) -> Saved | None``: the newest that is whole, None if there is none at all. ``like`` has the state's
      tree; its leaves are arrays, numbers or ``jax.ShapeDtypeStruct``, and where they have shardings, the state is placed
      so. What is a NumPy array or a Python number in ``like`` is one in the state; a JAX array of a dtype that JAX does not
      hold now (64 bits without ``jax_enable_x64``) is a NumPy array, bit for bit.
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
      ValueError: now, if ``keep`` is below 1; from ``restore``, if the checkpoint is of a run with other settings or another
        state, or if all are broken. If only the newest are, a warning says so, they are set aside, and the one before them
        is restored.
      OSError: from ``save`` and on leaving, if one could not be written, as on a full disk. Those before it are intact.
    """
    directory = pathlib.Path(directory).absolute()
    settings = json.loads(json.dumps(settings))
    if keep < 1:
        raise ValueError(f"`keep` is {keep}; it needs to be at least 1 checkpoint.")

    def written(write: Callable[..., Any], *args: Any, **options: Any) -> None:
        try:
            write(*args, **options)
        except Exception as error:  # Orbax and TensorStore have many kinds
            manager.reload()
            good = max(manager.all_steps(), default=None)
            left = "There is none before it" if good is None else f"The one of update {good} is intact"
            raise OSError(
                f"A checkpoint could not be written to {directory}: {_reason(error)} {left}; make room, then run again."
            ) from error

    def save(update: int, state: PyTree, data: Any) -> None:
        arrays, leaves = _pack(state)
        # By way of text: what is written later, in another thread, is what `data` is now.
        content = json.loads(json.dumps({"update": update, "settings": settings, "leaves": leaves, "data": data}))
        run = {"content": content, "checksum": _checksum_of_json(content)}
        stored = {"arrays": ocp.args.StandardSave(arrays)} if arrays else {}  # Orbax refuses a tree of nothing
        args = ocp.args.Composite(**stored, run=ocp.args.JsonSave(run))
        written(manager.save, update, args=args, force=True)

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
        _check_same_run(directory, content, settings, like)
        for each, sentence in broken.items():  # Orbax would not write in their place
            if jax.process_index() == 0:
                aside = directory / f"{each}.broken"
                shutil.rmtree(aside, ignore_errors=True)
                (directory / str(each)).rename(aside)
                warnings.warn(f"{sentence} It is set aside as {aside.name}; update {update} is used.", stacklevel=2)
        _agree(True)  # the first process has set them aside
        manager.reload()
        return Saved(update, _unpack(arrays, content["leaves"], like), content["data"])

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
      state: a tree of arrays or numbers.

    Raises:
      ValueError: if a leaf is neither, or what is there is another state, such as a training run's: it is not written over.
      OSError: if it could not be written; the one before is intact.
    """
    with open(directory, {}, keep=2) as store:
        before = store.restore(state)
        store.save(before.update + 1 if before else 0, state, None)


def load(directory: str | pathlib.Path, like: PyTree) -> PyTree:
    """The state that :func:`save` wrote last. Nothing is changed on disk, so others may be writing the next.

    Args:
      directory: where it is.
      like: the state's tree, of arrays, numbers or ``jax.ShapeDtypeStruct``, as ``jax.eval_shape`` makes them.

    Returns:
      The state, bit for bit: NumPy arrays and Python numbers where ``like`` has them, and NumPy arrays where JAX does not
      hold the dtype now (64 bits without ``jax_enable_x64``). If it is broken, a warning says so, and it is the one before, which ``save`` keeps.

    Raises:
      ValueError: if there is none, all are broken, or it is another.
    """
    directory = pathlib.Path(directory).absolute()
    if not directory.is_dir():
        raise ValueError(f"There is no directory {directory}: give one that `checkpoint.save` has written.")
    options = ocp.CheckpointManagerOptions(
        read_only=True, save_interval_steps=0, create=False
    )  # as it would set them, and say so
    with _quiet(), ocp.CheckpointManager(directory, options=options) as manager:
        found, broken = _newest(manager, directory, bool)  # whichever process asks
    if found is None:
        raise ValueError(
            f"{' '.join(broken.values())} No other is left: write it again with `checkpoint.save`, in another directory."
            if broken
            else f"{directory} holds no checkpoint: give a directory that `checkpoint.save` has written."
        )
    update, content, arrays = found
    _check_same_run(directory, content, {}, like)
    for sentence in broken.values():
        warnings.warn(f"{sentence} The one before it, {update}, is used.", stacklevel=2)
    return _unpack(arrays, content["leaves"], like)


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


def _pack(state: PyTree) -> tuple[dict[str, np.ndarray], list[dict[str, Any]]]:
    """The leaves as host arrays that are copies, and what is to be known of each."""
    arrays, leaves = {}, []
    for i, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(state)):
        kind = _kind(path, leaf)
        if isinstance(leaf, jax.Array) and leaf.is_deleted():
            raise ValueError(
                f"`{kind['path']}` was given to a function that wrote into it, as `train_windows` does: save the state that it "
                "returned, or a copy made before, `jax.tree.map(jnp.copy, state)`."
            )
        is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) if isinstance(leaf, jax.Array) else False
        array = _whole(jax.random.key_data(leaf) if is_key else leaf)
        leaf_of = {"key": str(jax.random.key_impl(leaf)) if is_key else None, "checksum": zlib.crc32(array.tobytes())}
        leaves.append({**kind, **leaf_of, "stored": [list(array.shape), str(array.dtype)]})
        if array.size:  # Orbax refuses those without; as bytes, since it has not all of the dtypes
            arrays[str(i)] = np.frombuffer(array.tobytes(), np.uint8)
    return arrays, leaves


def _whole(leaf: Any) -> np.ndarray:
    """All of an array, as a copy in this host's memory, wherever its parts are."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    return np.array(leaf)


def _read(manager: ocp.CheckpointManager, update: int) -> tuple[dict[str, Any], list[np.ndarray]]:
    """The JSON and the arrays of a checkpoint, or an exception of any kind if something is wrong with it."""
    run = manager.restore(update, args=ocp.args.Composite(run=ocp.args.JsonRestore())).run
    content = run["content"]
    if _checksum_of_json(content) != run["checksum"]:
        raise ValueError("its JSON does not have its checksum")
    if content["update"] != update:
        raise ValueError(f"it is that of update {content['update']}, moved here")
    well_formed = isinstance(content["settings"], dict) and all(
        isinstance(leaf["path"], str)
        and (isinstance(leaf["key"], str) or (leaf["key"] is None and leaf["stored"] == [leaf["shape"], leaf["dtype"]]))
        for leaf in content["leaves"]
    )
    if not well_formed or "data" not in content:
        raise ValueError("its JSON is not of the form that `save` writes")
    like = [np.empty(shape, jax.numpy.dtype(dtype)) for shape, dtype in (leaf["stored"] for leaf in content["leaves"])]
    wanted = {str(i): np.empty(array.nbytes, np.uint8) for i, array in enumerate(like) if array.size}
    stored = {}
    if wanted:
        stored = manager.restore(update, args=ocp.args.Composite(arrays=ocp.args.StandardRestore(wanted))).arrays
    arrays = []
    for i, (leaf, array) in enumerate(zip(content["leaves"], like, strict=True)):
        data = np.asarray(stored.get(str(i), np.empty(0, np.uint8))).tobytes()
        if zlib.crc32(data) != leaf["checksum"]:
            raise ValueError(f"`{leaf['path']}` does not have its checksum")
        arrays.append(np.frombuffer(data, array.dtype).reshape(array.shape).copy())
        if leaf["key"] is not None:
            jax.random.wrap_key_data(jax.numpy.array(arrays[-1]), impl=leaf["key"])  # raises if it is none
    return content, arrays


def _unpack(arrays: list[np.ndarray], leaves: list[dict[str, Any]], like: PyTree) -> PyTree:
    def place(array: np.ndarray, leaf: dict[str, Any], like: Any) -> Any:
        if isinstance(like, bool | int | float | complex):  # np.float64 is a float, and np.bool is no bool
            return array[()] if isinstance(like, np.generic) else type(like)(array[()])
        if isinstance(like, np.ndarray | np.generic):
            return array if isinstance(like, np.ndarray) else array[()]
        if not leaf["key"] and jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
            return array
        own = jax.numpy.array(array)  # not the host's memory: a train step may be given it to write into
        value = jax.random.wrap_key_data(own, impl=leaf["key"]) if leaf["key"] else own
        return jax.device_put(value, getattr(like, "sharding", None))

    likes, tree = jax.tree.flatten(like)
    return jax.tree.unflatten(tree, [place(*each) for each in zip(arrays, leaves, likes, strict=True)])


def _check_same_run(directory: pathlib.Path, content: dict[str, Any], settings: dict[str, Any], like: PyTree) -> None:
    old, nothing = content["settings"], "nothing"
    differ = [
        f"{name} {old.get(name, nothing)!r}, here {settings.get(name, nothing)!r}"
        for name in {**old, **settings}
        if old.get(name, nothing) != settings.get(name, nothing)
    ]
    if not differ:
        kinds = [_kind(path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(like)]
        then = {leaf["path"]: f"{leaf['dtype']}{leaf['shape']}" for leaf in content["leaves"]}
        now = {kind["path"]: f"{kind['dtype']}{kind['shape']}" for kind in kinds}
        differ = [
            f"`{path}` {then.get(path, nothing)}, here {now.get(path, nothing)}"
            for path in {**then, **now}
            if then.get(path) != now.get(path)
        ]
        devices = _devices(content["leaves"], kinds)
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


def _devices(then: list[dict[str, Any]], now: list[dict[str, Any]]) -> tuple[int, int] | None:
    """How many devices there were and are, if the states differ in this alone (see :func:`tbptt_jax.sharding.over_lanes`)."""
    if [leaf["path"] for leaf in then] != [leaf["path"] for leaf in now]:
        return None
    pairs = [(a, b) for a, b in zip(then, now, strict=True) if (a["dtype"], a["shape"]) != (b["dtype"], b["shape"])]
    numbers = {(a["shape"][0], b["shape"][0]) for a, b in pairs if a["shape"] and b["shape"]}
    same = all(
        ".influence" in a["path"] and (a["dtype"], a["shape"][1:]) == (b["dtype"], b["shape"][1:]) for a, b in pairs
    )
    return numbers.pop() if same and len(numbers) == 1 else None


def _kind(path: tuple, leaf: Any) -> dict[str, Any]:
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    array = leaf if hasattr(leaf, "dtype") and hasattr(leaf, "shape") else np.asarray(leaf)
    number = isinstance(leaf, bool | int | float | complex | np.generic | np.ndarray | jax.Array | jax.ShapeDtypeStruct)
    kept = jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key) or (
        jax.numpy.issubdtype(array.dtype, jax.numpy.number) or array.dtype == bool
    )
    if not number or not kept or isinstance(leaf, np.ma.MaskedArray):
        raise ValueError(
            f"`{name}` is {quoted(leaf)}, a {type(leaf).__name__} of {array.dtype}; a checkpoint holds arrays of numbers, numbers "
            "and keys: give `np.asarray(x)` of one of these, and what is none beside the state, in `data` or a file of its own."
        )
    return {"path": name, "dtype": str(array.dtype), "shape": list(array.shape)}


def _checksum_of_json(content: Any) -> int:
    return zlib.crc32(json.dumps(content).encode())


def _reason(error: Exception) -> str:
    """What others' exceptions say, without the pages that TensorStore adds."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    if code:
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
