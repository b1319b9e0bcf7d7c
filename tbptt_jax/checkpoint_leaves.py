"""The leaves of a state as bytes and JSON, and back.

The JSON of a leaf has its ``path``, ``dtype`` and ``shape``; of a Python number or string also the ``value``, of an array the
``checksum`` of its bytes, ``stored``, the shape and dtype of what Orbax is given for it, and ``key``, the implementation of
typed keys, else None.
"""

import collections
import json
import math
import os
import pathlib
import zlib
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from tbptt_jax.arrays import PyTree, quoted, shortened

_AS_ARRAY = "give an array, such as `np.asarray` makes, a Python number or a string."
_PYTHON = {f"Python {kind.__name__}": kind for kind in (bool, int, float, complex, str)}


def pack(state: PyTree) -> tuple[dict[str, np.ndarray], list[dict[str, Any]]]:
    """The leaves' bytes, as host arrays that are copies, and what is to be known of each."""
    arrays: dict[str, np.ndarray] = {}
    leaves: list[dict[str, Any]] = []
    for kind, leaf in zip(kinds_of("state", state), jax.tree.leaves(state), strict=True):
        if kind["dtype"] in _PYTHON:
            value = [leaf.real, leaf.imag] if isinstance(leaf, complex) else leaf
            leaves.append({**kind, "value": as_json(kind["path"], value)})
            continue
        if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) and leaf.is_deleted():
            raise ValueError(
                f"`{kind['path']}` was donated, as `train_windows` donates the state that it is given: save the state that "
                "it returned."
            )
        is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        array = on_this_host(kind["path"], jax.random.key_data(leaf) if is_key else leaf)
        data = array.tobytes()
        array = array if is_key else np.frombuffer(data, np.uint8)  # of which no store changes a bit
        impl = str(jax.random.key_impl(leaf)) if is_key else None
        leaves.append(
            {**kind, "key": impl, "checksum": zlib.crc32(data), "stored": [list(array.shape), str(array.dtype)]}
        )
        if array.size:  # Orbax refuses those without
            arrays[str(len(leaves) - 1)] = array
    return arrays, leaves


def unpack(arrays: list[np.ndarray], leaves: list[dict[str, Any]], like: PyTree, places: list[int]) -> PyTree:
    """The tree of ``like``, whose i-th leaf was saved as number ``places[i]``."""

    def place(stored: np.ndarray, leaf: dict[str, Any], like: Any) -> Any:
        if "value" in leaf:
            value = leaf["value"]
            return complex(*value) if _PYTHON[leaf["dtype"]] is complex else value
        own: Any
        if leaf["key"]:
            own = jax.random.wrap_key_data(jax.numpy.array(stored), impl=leaf["key"])
        else:
            dtype = jax.numpy.dtype(leaf["dtype"])
            array = np.frombuffer(bytearray(stored.tobytes()), dtype) if stored.size else np.empty(0, dtype)
            array = array.reshape(leaf["shape"])
            if isinstance(like, np.generic):
                return array[()]
            if isinstance(like, np.ndarray):
                return array
            try:
                own = jax.numpy.array(array)  # not the host's memory: a train step may be given it to write into
            except TypeError:  # of a dtype that JAX does not have
                return array
            if own.dtype != dtype:
                return array
        return jax.device_put(own, getattr(like, "sharding", None))

    likes, tree = jax.tree.flatten(like)
    return jax.tree.unflatten(tree, [place(arrays[i], leaves[i], x) for i, x in zip(places, likes, strict=True)])


def is_packed(x: Any) -> bool:
    """Whether JSON is of a leaf as :func:`pack` makes it; or an exception, of a dtype or keys that there are not."""
    if not isinstance(x, dict) or not isinstance(x.get("path"), str) or not isinstance(x.get("dtype"), str):
        return False
    if "value" in x or x["dtype"] in _PYTHON:
        return x["dtype"] in _PYTHON and x.get("shape") == [] and _is_value(x.get("value"), x["dtype"])
    stored = x.get("stored")
    if not _is_shape(x.get("shape")) or not isinstance(stored, list) or [type(part) for part in stored] != [list, str]:
        return False
    if not _is_shape(stored[0]) or not isinstance(x.get("key"), str | None) or type(x.get("checksum")) is not int:
        return False
    held = math.prod(stored[0]) * jax.numpy.dtype(stored[1]).itemsize
    if x["key"] is None:
        return held == math.prod(x["shape"]) * jax.numpy.dtype(x["dtype"]).itemsize
    words = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0, impl=x["key"])))
    return stored == [[*x["shape"], *words.shape], str(words.dtype)]


def _is_shape(x: Any) -> bool:
    return isinstance(x, list) and all(map(is_whole, x))


def _is_value(x: Any, dtype: str) -> bool:
    if _PYTHON[dtype] is complex:
        return isinstance(x, list) and [type(part) for part in x] == [float, float]
    return type(x) is _PYTHON[dtype]


def is_whole(x: Any) -> bool:
    return type(x) is int and x >= 0


def stored_of(leaf: dict[str, Any]) -> tuple[list[int], str]:
    """The shape and the dtype of what Orbax holds of a leaf."""
    return leaf.get("stored", ([0], "uint8"))


def kinds_of(name: str, tree: PyTree) -> list[dict[str, Any]]:
    """The path, dtype and shape of each leaf.

    Raises:
      ValueError: if one is of a kind whose bits cannot be kept.
    """
    return [
        {
            "path": (at := jax.tree_util.keystr(path, simple=True, separator=".")),
            "dtype": _dtype(f"`{at}`" if at else f"`{name}`", leaf),
            "shape": list(getattr(leaf, "shape", ())),
        }
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def names_of(leaves: list[dict[str, Any]]) -> list[str]:
    """The leaves' paths; where several have one, such as ``{"a.b": x, "a": {"b": y}}``, they are numbered."""
    seen: collections.Counter[str] = collections.Counter()
    names = []
    for path in (leaf["path"] for leaf in leaves):
        seen[path] += 1
        names.append(path if seen[path] == 1 else f"{path} ({seen[path]})")
    return names


def devices_of(then: list[dict[str, Any]], now: list[dict[str, Any]]) -> tuple[int, int] | None:
    """How many devices there were and are, if the states differ in this alone (see :func:`tbptt_jax.sharding.over_lanes`)."""
    if [leaf["path"] for leaf in then] != [leaf["path"] for leaf in now]:
        return None
    pairs = [(a, b) for a, b in zip(then, now, strict=True) if (a["dtype"], a["shape"]) != (b["dtype"], b["shape"])]
    numbers = {(a["shape"][0], b["shape"][0]) for a, b in pairs if a["shape"] and b["shape"]}
    same = all(
        ".influence" in a["path"] and (a["dtype"], a["shape"][1:]) == (b["dtype"], b["shape"][1:]) for a, b in pairs
    )
    return numbers.pop() if same and len(numbers) == 1 else None


def as_json(name: str, value: Any) -> Any:
    """What JSON makes of ``value``, a copy."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"`{name}` cannot be written as JSON: {shortened(str(error))}. Give dicts, lists, strings and Python numbers, "
            "such as `x.tolist()` makes of an array."
        ) from error


def _dtype(name: str, leaf: Any) -> str:
    """The dtype of a leaf, for a Python number or string its type."""
    if type(leaf) in _PYTHON.values():
        return f"Python {type(leaf).__name__}"
    if isinstance(leaf, np.ma.MaskedArray):
        raise ValueError(f"{name} is a masked array: give its `.data` and its `.mask`, as two arrays.")
    dtype: Any = getattr(leaf, "dtype", None)
    is_key = str(dtype).startswith("key<")
    if not hasattr(leaf, "shape") or not (isinstance(dtype, np.dtype) or is_key):
        raise ValueError(f"{name} is {quoted(leaf)}, a {type(leaf).__name__}; {_AS_ARRAY}")
    if not is_key and dtype.names is not None:
        raise ValueError(f"{name} is a structured array of {quoted(dtype.names)}: give its fields, one array each.")
    if not is_key and dtype.kind in "OT":
        raise ValueError(
            f"{name} has dtype {shortened(str(dtype))}, which only points to what it holds: give numbers or strings, such as "
            "`np.asarray(x.tolist())` makes of them."
        )
    return str(dtype)


def on_this_host(path: str, leaf: Any) -> np.ndarray:
    """All of an array in this host's memory, wherever its parts are."""
    if isinstance(leaf, jax.core.Tracer):
        raise ValueError(f"`{path}` is traced: it has no numbers yet. Save outside of `jax.jit` and its like.")
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    array = np.asarray(leaf)
    if array.dtype != leaf.dtype:  # numbers there are none, as in a `jax.ShapeDtypeStruct`
        raise ValueError(f"`{path}` is {quoted(leaf)}, which has no numbers; {_AS_ARRAY}")
    return array


def write_whole(path: str | pathlib.Path, data: bytes) -> None:
    """A file, whole or not at all: whoever reads it meanwhile reads the one before. Directories are made if missing."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
