"""Windows: a stretch of time of several lanes, and what has to hold of one before anything is computed with it.

Everything that is trained on is one type, :class:`Window`. A batch of whole sequences is a window as long as the
sequences; :mod:`tbptt_jax.cutting` makes windows of data, and cuts them.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tbptt_jax.arrays import Array, PyTree, at_least_float32, check_array, on_host, same_tree


class Window(NamedTuple):
    """A stretch of time of several lanes. A lane is one row of the batch: one continuous stream.

    Attributes:
      inputs: pytree of arrays ``[lanes, time, ...]``.
      targets: pytree of arrays ``[lanes, time, ...]``, or None.
      weights: ``[lanes, time]``, the weight of each step's loss, of any real kind of number; 0 is not scored. A tree of such
        arrays for a loss that is a tree of this shape: each of its losses then has weights of its own. None: every step
        weighs 1.
      resets: ``[lanes, time]`` bool; True: this lane's carry returns to the initial carry *before* the step is
        consumed, also where the step is padding. None: never.
      valid: ``[lanes, time]`` bool; False: padding. The carry stands still and the step is not scored. None: all valid.
      edges: ``[lanes, time]``, by how much the gradient is multiplied where it goes back over the edge into this step,
        for estimators that reweight what they did not cut (:mod:`tbptt_jax.schedules`). None: 1.

    Windows of a stream are stacked on a leading axis: ``[windows, lanes, time, ...]``. What is None costs nothing.
    """

    inputs: PyTree
    targets: PyTree = None
    weights: Array | None = None
    resets: Array | None = None
    valid: Array | None = None
    edges: Array | None = None


class Layout(NamedTuple):
    """Where a window has the steps of what it was laid out from.

    Attributes:
      shape: the window's leading axes, ``[lanes, time]`` or ``[windows, lanes, time]``.
      places: of each step before, the place in the window, counted over its leading axes; -1: it is not there. Of a window
        that was cut ``[n, time]``; of sequences that were packed ``[sum(lengths)]``, one after another.
      lengths: ``[n]``, the steps of the sequences that were packed; None: it was cut.
    """

    shape: tuple[int, ...]
    places: np.ndarray
    lengths: np.ndarray | None = None


class LaidOut(Window):
    """A window that remembers how it was laid out, for :func:`tbptt_jax.join`.

    The layout belongs to this object: ``_replace`` keeps it, and what makes another window of it, ``jax.tree.map`` for instance,
    has ``layout`` None. It never enters a computation.
    """

    layout: Layout | None = None

    def _replace(self, **changes: Any) -> "LaidOut":
        return laid_out(super()._replace(**changes), self.layout)


def laid_out(window: Window, layout: Layout | None) -> LaidOut:
    """The same window, with its layout."""
    window = LaidOut(*window)
    window.layout = layout
    return window


def step_weights(window: Window) -> PyTree:
    """The weight of each step's loss, ``[lanes, time]``, 0 where it is padding or not scored; a tree if the weights are one.

    At least float32: of bool or int8 a sum would have no more room than one step, and of float16 than 65,504.
    """
    weights = jnp.ones(time_shape(window)) if window.weights is None else window.weights

    def at_valid(w: Array) -> jax.Array:
        w = jnp.asarray(w, at_least_float32(w.dtype))
        return w if window.valid is None else jnp.where(window.valid, w, 0)

    return jax.tree.map(at_valid, weights)


def is_scored(window: Window) -> jax.Array:
    """Whether a step's loss counts, ``[lanes, time]`` bool; with a tree of weights, whether one of its losses does."""
    return functools.reduce(jnp.logical_or, (w > 0 for w in jax.tree.leaves(step_weights(window))))


_LANES, _WINDOWS = ("lanes", "time"), ("windows", "lanes", "time")
_HINTS = {
    _LANES: " To take the first of windows that are stacked: `jax.tree.map(lambda x: x[0], windows)`.",
    _WINDOWS: " `split` stacks windows so; a single one is `jax.tree.map(lambda x: x[None], window)`.",
}


def time_shape(window: Window, axes: tuple[str, ...] = _LANES) -> tuple[int, ...]:
    """The leading shape that every array of ``window`` shares, named by ``axes``.

    Raises:
      ValueError: if it is no window, there are no inputs, a leaf is no NumPy or JAX array of numbers, bool or keys, or is
        masked, an array has too few axes, the arrays disagree, or an axis has length 0.
    """
    if not isinstance(window, Window):
        raise ValueError(
            f"A {type(window).__name__} was given for a window; it needs to be a `tb.Window`, as `split` and `lanes` make."
        )
    leaves = jax.tree.leaves(window.inputs)
    if not leaves:
        raise ValueError(f"The window has no inputs: give at least one array of shape [{', '.join(axes)}, ...].")
    masks = ("resets", "valid", "weights", "edges")  # these have no axes beyond, and so tell most about a mistake
    hint = _HINTS.get(axes, "")
    of_fields = [(f, leaf) for f in (*masks, "inputs", "targets") for leaf in jax.tree.leaves(getattr(window, f))]
    for field, leaf in of_fields:
        check_array(field, leaf)
        if len(leaf.shape) < len(axes) or (field in masks and len(leaf.shape) != len(axes)):
            rest = "" if field in masks else ", ..."
            raise ValueError(
                f"`{field}` has shape {list(leaf.shape)}; it needs the axes [{', '.join(axes)}{rest}].{hint}"
            )
    for field, leaf in of_fields:
        if leaf.shape[: len(axes)] != leaves[0].shape[: len(axes)]:
            raise ValueError(
                f"`{field}` has shape {list(leaf.shape)}, but `inputs` begins with {list(leaves[0].shape[: len(axes)])}: "
                f"every array of a window needs the same [{', '.join(axes)}].{hint}"
            )
    shape = leaves[0].shape[: len(axes)]
    for name, size in zip(axes, shape, strict=True):
        if size == 0:
            raise ValueError(f"The window has shape {list(shape)}: its `{name}` axis is empty; it needs at least 1.")
    return shape


def check(window: Window, axes: tuple[str, ...] = _LANES) -> None:
    """Raises a ``ValueError`` for what can be known before compute to be wrong with ``window``.

    Shapes and dtypes are checked always; values (non-finite data, negative weights) only where the arrays are in the
    host's memory: what is traced has none, and an accelerator is not made to wait.
    """
    shape = time_shape(window, axes)
    for field in ("resets", "valid"):
        flags = getattr(window, field)
        if flags is not None and flags.dtype != bool:
            raise ValueError(f"`{field}` has dtype {flags.dtype}; it needs bool: True or False for each lane and step.")
    for field in ("weights", "edges"):
        for leaf in jax.tree.leaves(getattr(window, field)):
            if not (
                jnp.issubdtype(leaf.dtype, jnp.integer)
                or jnp.issubdtype(leaf.dtype, jnp.floating)
                or leaf.dtype == bool
            ):
                raise ValueError(f"`{field}` has dtype {leaf.dtype}; it needs real numbers, such as float32.")
    if not all(map(on_host, jax.tree.leaves(window))):
        return
    valid = True if window.valid is None else np.asarray(window.valid)
    weights = [np.asarray(w) != 0 for w in jax.tree.leaves(window.weights)]
    scored = valid & functools.reduce(np.logical_or, weights) if weights else valid
    own = same_tree(window.targets, window.weights)  # each target has weights of its own
    for field, matters in (("weights", valid), ("inputs", valid), ("targets", scored)):
        for i, leaf in enumerate(jax.tree.leaves(getattr(window, field))):
            if field == "targets" and own:
                matters = valid & weights[i]
            if jnp.issubdtype(leaf.dtype, jnp.inexact):
                native = leaf.dtype.kind in "fc"
                finite = np.isfinite(np.asarray(leaf, None if native else np.float32))
                if finite.all():  # nearly always, and a tenth of the time of finding where
                    continue
                bad = np.argwhere(~finite.reshape(*shape, -1).all(-1) & matters)
                if len(bad):
                    where = ", ".join(f"{name} {i}" for name, i in zip(axes, bad[0], strict=True))
                    raise ValueError(
                        f"`{field}` is not finite at {where} ({len(bad)} such steps): fill or drop it, mark the step as "
                        "padding with `valid`, or, if it is a target that is missing, give the step weight 0; of several "
                        "targets some may be missing where `targets` and `weights` are trees of one shape."
                    )
    if any((np.where(valid, w, 0) < 0).any() for w in jax.tree.leaves(window.weights)):
        raise ValueError("`weights` holds a negative weight; each needs to be 0 (not scored) or more.")


def check_scored(window: Window) -> None:
    """Raises a ``ValueError`` if a whole stream, in the host's memory, has no step to score. One window may have none."""
    if not all(map(on_host, jax.tree.leaves((window.weights, window.valid)))):
        return
    valid = True if window.valid is None else np.asarray(window.valid)
    if not any(np.any(np.where(valid, w, 0)) for w in jax.tree.leaves(1 if window.weights is None else window.weights)):
        raise ValueError("`weights` is 0 at every valid step: nothing would be scored. Give one step a weight.")
