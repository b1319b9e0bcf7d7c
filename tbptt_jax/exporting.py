"""Exporting: a trained model as one file that serves without the code it was made by.

    tb.export(model, params, x, "served.zip")  # x [lanes, ...], the inputs of one step

    served = tb.load_exported("served.zip")  # elsewhere: on a CPU, a GPU or a TPU
    carry = served.initial_carry(lanes=1)
    for x in arriving:  # [1, features]
        carry, y = served.step(carry, x)

The file is a zip archive, to be read without this package too:

    header.json      {"format": 1, "jax": version, "params": [{"dtype", "shape", "stored", "key", ...} of each array]}
    params/0, 1, …   their bytes, one array after another
    initial_carry    what ``jax.export`` makes of  (params, lanes) -> carry
    step             likewise of  (params, carry, x, resets, valid) -> (carry, y)

where ``params`` is the list of arrays; lanes, resets and valid are ``[lanes]`` bool, of any number. The parameters are in the
file and not in the functions: a program is compiled for each number of lanes, and they all read one copy; as constants each
would hold its own, and XLA would compute with them while it compiles. So the programs are also those of
:func:`tbptt_jax.streaming`, and their numbers too.
"""

import io
import json
import pathlib
import zipfile
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

from tbptt_jax.arrays import PyTree, check_array, check_whole, is_leaf, quoted, same_tree
from tbptt_jax.checkpoint_leaves import pack, stored_of, unpack, write_whole
from tbptt_jax.recurrence import Recurrence
from tbptt_jax.streaming import streaming

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


class Served(NamedTuple):
    """A model that was exported.

    Attributes:
      initial_carry: ``(lanes) -> carry``, every leaf ``[lanes, ...]``.
      step: ``(carry, x, resets=None, valid=None) -> (carry, y)``, as :func:`tbptt_jax.streaming` returns it. ValueError: what
        was given does not fit what was exported.
    """

    initial_carry: Callable[[int], PyTree]
    step: Callable[..., tuple[PyTree, PyTree]]


def export(
    model: Recurrence,
    params: PyTree,
    inputs: PyTree,
    path: str | pathlib.Path,
    *,
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
) -> None:
    """Writes one file with the step of :func:`tbptt_jax.streaming`, for any number of lanes, its parameters and initial carry.

    Any machine can export for all platforms. ``tb.lstm`` is exported as its fused scan, whatever trained it. Carry, x and y
    may be any trees; where these have nodes other than dicts with strings for keys, lists, tuples and None, such as
    NamedTuples, the exported functions return tuples of what is in them, and take either.

    Args:
      model: the recurrence.
      params: its parameters.
      inputs: the inputs of one step, a tree of ``[lanes, ...]``: arrays, or ``jax.ShapeDtypeStruct``, of which shapes and
        dtypes are read, and the number of lanes is not.
      path: the file, which is written whole or not at all.
      platforms: those it is to run on, of "cpu", "cuda", "rocm" and "tpu".

    Raises:
      ValueError: if a platform is unknown, an input has no axis of lanes, the parameters are no arrays or numbers, or the
        model cannot be traced for a number of lanes that is not known, or not for these platforms.
      ImportError: without ``flatbuffers`` (``pip install 'tbptt_jax[serve]'``).
      OSError: if the file cannot be written.
    """
    if isinstance(platforms, str) or not platforms or set(platforms) - set(PLATFORMS):
        raise ValueError(f"`platforms` is {quoted(platforms)}; it needs to be a tuple of some of {PLATFORMS}.")
    (lanes,) = jax_export.symbolic_shape("lanes")

    def of_lanes(leaf: Any) -> jax.ShapeDtypeStruct:
        check_array("inputs", leaf)
        if not leaf.shape:
            raise ValueError("`inputs` has shape []; it needs the axes [lanes, ...], those of one step.")
        return jax.ShapeDtypeStruct((lanes, *leaf.shape[1:]), jax.dtypes.canonicalize_dtype(leaf.dtype))

    x, mask = jax.tree.map(of_lanes, inputs), jax.ShapeDtypeStruct((lanes,), bool)
    params = jax.tree.map(lambda p: jnp.asarray(p) if isinstance(p, np.ndarray | np.generic) else p, params)
    arrays, about = pack(params)
    kept = [i for i, leaf in enumerate(about) if "value" not in leaf]  # a Python number is a constant, of weak type
    leaves, tree = jax.tree.flatten(params)

    def whole(given: list) -> PyTree:
        at = dict(zip(kept, given, strict=True))
        return jax.tree.unflatten(tree, [at.get(i, leaf) for i, leaf in enumerate(leaves)])

    def initial_carry(given: list, mask: jax.Array) -> PyTree:
        return _plain(model.initial_carry(whole(given), mask.shape[0]))

    def step(given: list, carry: PyTree, x: PyTree, resets: jax.Array, valid: jax.Array) -> PyTree:
        carry, x = _like(carry, own_carry), _like(x, inputs)
        # With `valid` there, `tb.lstm` chooses no implementation that is one platform's own.
        return _plain(streaming(model, whole(given))(carry, x, resets, valid))

    # Without the devices they are on: what is exported runs on one.
    given = [jax.ShapeDtypeStruct(p.shape, p.dtype, weak_type=p.weak_type) for p in (leaves[i] for i in kept)]
    try:
        own_carry = jax.eval_shape(lambda g, m: model.initial_carry(whole(g), m.shape[0]), given, mask)
        functions: dict[str, tuple[Callable, tuple]] = {
            "initial_carry": (initial_carry, (given, mask)),
            "step": (step, (given, _plain(own_carry), _plain(x), mask, mask)),
        }
        parts = {
            name: jax_export.export(jax.jit(function), platforms=tuple(platforms))(*arguments).serialize()
            for name, (function, arguments) in functions.items()
        }
    except (ValueError, ImportError):
        raise
    except Exception as error:  # of any kind: what JAX, Flax or the model say of a number of lanes that is not known
        raise ValueError(
            f"The model cannot be exported for any number of lanes on {', '.join(platforms)}: it needs to use the number of "
            "lanes as `jnp` functions take it, a symbol and no int, and to compute with what every one of these platforms "
            f"has. ({type(error).__name__}: {str(error).strip().splitlines()[0]})"
        ) from error
    header = {"format": 1, "jax": jax.__version__, "params": [about[i] for i in kept]}
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as archive:
        archive.writestr("header.json", json.dumps(header))
        for n, i in enumerate(kept):
            archive.writestr(f"params/{n}", arrays[str(i)].tobytes() if str(i) in arrays else b"")
        for name, data in parts.items():
            archive.writestr(name, bytes(data))
    write_whole(path, buffer.getvalue())


def load_exported(path: str | pathlib.Path) -> Served:
    """The model of a file that :func:`export` wrote; neither the model's code nor the library of its cell is needed.

    The parameters are put on the default device, once. A program is compiled for each number of lanes.

    Args:
      path: the file.

    Raises:
      ValueError: if there is no such file, it is not as ``export`` writes it, this JAX cannot read it, or it is of 64-bit
        numbers, and ``jax_enable_x64`` is off.
      ImportError: without ``flatbuffers`` (``pip install 'tbptt_jax[serve]'``).
    """
    try:
        with zipfile.ZipFile(path) as archive:
            header = json.loads(archive.read("header.json"))
            about = header["params"]
            stored = [
                np.frombuffer(archive.read(f"params/{n}"), dtype).reshape(shape)
                for n, (shape, dtype) in enumerate(map(stored_of, about))
            ]
            initial, step = (
                jax_export.deserialize(bytearray(archive.read(name))) for name in ("initial_carry", "step")
            )
    except FileNotFoundError as error:
        raise ValueError(f"There is no file {path}: give one that `tb.export` has written.") from error
    except ImportError:
        raise
    except Exception as error:  # of any kind: a broken archive, or one of others
        raise ValueError(
            f"{path} cannot be read as what `tb.export` writes, by JAX {jax.__version__}: {error!r}. Export it again."
        ) from error
    if any(
        not jnp.issubdtype(x.dtype, jax.dtypes.prng_key) and jax.dtypes.canonicalize_dtype(x.dtype) != x.dtype
        for x in (*step.in_avals, *step.out_avals)
    ):
        raise ValueError(
            f"{path} computes with 64-bit numbers: set `jax.config.update('jax_enable_x64', True)` first, or export it "
            "without."
        )
    params = unpack(stored, about, [object()] * len(about), list(range(len(about))))
    (_, *takes), _ = jax.tree.unflatten(step.in_tree, step.in_avals)

    @jax.jit
    def compiled(params: list, carry: PyTree, x: PyTree, resets: Any, valid: Any) -> tuple[PyTree, PyTree]:
        lanes = _lanes(x)
        resets = jnp.zeros(lanes, bool) if resets is None else resets
        valid = jnp.ones(lanes, bool) if valid is None else valid
        of_carry, of_x, *of_masks = takes
        x = _fitting("x", of_x, x, lanes)
        carry = _fitting("carry", of_carry, carry, lanes)
        resets, valid = map(_fitting, ("resets", "valid"), of_masks, (resets, valid), (lanes, lanes))
        return step.call(params, carry, x, resets, valid)

    def one_step(carry: PyTree, x: PyTree, resets: Any = None, valid: Any = None) -> tuple[PyTree, PyTree]:
        try:
            return compiled(params, carry, x, resets, valid)
        except TypeError as error:  # what JAX says of that which is no array
            raise ValueError(f"The step needs arrays of numbers. ({str(error).splitlines()[0]})") from error

    def initial_carry(lanes: int) -> PyTree:
        check_whole("lanes", lanes)
        return begin(params, jnp.ones(lanes, bool))

    begin = jax.jit(initial.call)
    return Served(initial_carry, one_step)


def _plain(tree: PyTree) -> PyTree:
    """The same leaves in the same order, in dicts with strings for keys, lists, tuples and None; any other node is a tuple."""
    if tree is None or is_leaf(tree):
        return tree
    if type(tree) is dict and all(isinstance(key, str) for key in tree):
        return {key: _plain(value) for key, value in tree.items()}
    if type(tree) is list:
        return [_plain(value) for value in tree]
    children, _ = jax.tree_util.default_registry.flatten_one_level(tree)
    return tuple(map(_plain, children))


def _like(tree: PyTree, other: PyTree) -> PyTree:
    """The leaves of ``tree`` in the nodes of ``other``."""
    return jax.tree.unflatten(jax.tree.structure(other), jax.tree.leaves(tree))


def _lanes(x: PyTree) -> int:
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(x)]
    return shapes[0][0] if shapes and shapes[0] else 0


def _fitting(name: str, wanted: PyTree, given: PyTree, lanes: int) -> PyTree:
    """``given`` in the dtypes of what was exported, if it is the same but for the width of its numbers."""
    given = _plain(given)

    def fits(x: Any, want: Any) -> bool:
        kind = next(k for k in (jnp.bool_, jnp.integer, jnp.inexact, jax.dtypes.extended) if _is(want, k))
        real = not _is(x, jnp.complexfloating) or _is(want, jnp.complexfloating)
        return jnp.shape(x) == (lanes, *want.shape[1:]) and _is(x, kind) and real

    if not same_tree(given, wanted) or not all(jax.tree.leaves(jax.tree.map(fits, given, wanted))):
        has, needs = (
            jax.tree.map(lambda x: f"{jnp.result_type(x)}{list(jnp.shape(x))}".replace("'", ""), tree)
            for tree in (given, wanted)
        )
        raise ValueError(
            f"`{name}` is {has}, and what was exported needs {needs}, here of {lanes} lanes as `x` has them: at least 1, and "
            "as many in carry, resets and valid."
        )
    return jax.tree.map(lambda x, want: x if _is(x, jax.dtypes.extended) else jnp.asarray(x, want.dtype), given, wanted)


def _is(x: Any, kind: Any) -> bool:
    return jax.dtypes.issubdtype(jnp.result_type(x), kind)
