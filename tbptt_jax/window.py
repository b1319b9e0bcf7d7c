"""Windows: a stream cut along time, and the pure functions that cut it.

Everything that is trained on is one type, :class:`Window`. A batch of whole sequences is a window as long as the
sequences; :func:`lanes` folds one long corpus into such a batch; :func:`slide` and :func:`split` cut it. They set
``resets``, so what they return is right by construction: a carry never crosses from one sequence into another.

Statelessness is data too: :func:`stateless` asks every window to begin from the initial carry.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any
Array = jax.Array | np.ndarray


class Window(NamedTuple):
    """A stretch of time of several lanes. A lane is one row of the batch: one continuous stream.

    Attributes:
      inputs: pytree of arrays ``[lanes, time, ...]``.
      targets: pytree of arrays ``[lanes, time, ...]``, or None.
      weights: ``[lanes, time]``, the weight of each step's loss; 0 is not scored. None: every step weighs 1.
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


def step_weights(window: Window) -> jax.Array:
    """The weight of each step's loss, ``[lanes, time]`` float: 0 where it is padding or not scored."""
    shape = time_shape(window)
    weights = jnp.ones(shape) if window.weights is None else jnp.asarray(window.weights)
    return weights if window.valid is None else jnp.where(window.valid, weights, 0)


_LANES, _WINDOWS = ("lanes", "time"), ("windows", "lanes", "time")
_HINTS = {
    _LANES: " To take the first of windows that are stacked: `jax.tree.map(lambda x: x[0], windows)`.",
    _WINDOWS: " `split` stacks windows so; a single one is `jax.tree.map(lambda x: x[None], window)`.",
}


def time_shape(window: Window, axes: tuple[str, ...] = _LANES) -> tuple[int, ...]:
    """The leading shape that every array of ``window`` shares, named by ``axes``.

    Raises:
      ValueError: if it is no window, there are no inputs, an array has too few axes, the arrays disagree, or an axis has
        length 0.
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
    for field in (*masks, "inputs", "targets"):
        for leaf in jax.tree.leaves(getattr(window, field)):
            if not hasattr(leaf, "shape"):
                raise ValueError(
                    f"`{field}` holds {leaf!r}, a Python {type(leaf).__name__}; give arrays, as `np.asarray` makes."
                )
            if len(leaf.shape) < len(axes) or (field in masks and len(leaf.shape) != len(axes)):
                rest = "" if field in masks else ", ..."
                raise ValueError(
                    f"`{field}` has shape {list(leaf.shape)}; it needs the axes [{', '.join(axes)}{rest}].{hint}"
                )
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
    if not all(map(_on_host, jax.tree.leaves(window))):
        return
    valid = True if window.valid is None else np.asarray(window.valid)
    scored = valid if window.weights is None else valid & (np.asarray(window.weights) != 0)
    for field, matters in (("weights", valid), ("inputs", valid), ("targets", scored)):
        for leaf in jax.tree.leaves(getattr(window, field)):
            if jnp.issubdtype(leaf.dtype, jnp.inexact):
                finite = np.isfinite(np.asarray(leaf, np.float64 if leaf.dtype == jnp.bfloat16 else None))
                if finite.all():  # nearly always, and a tenth of the time of finding where
                    continue
                bad = np.argwhere(~finite.reshape(*shape, -1).all(-1) & matters)
                if len(bad):
                    where = ", ".join(f"{name} {i}" for name, i in zip(axes, bad[0], strict=True))
                    raise ValueError(
                        f"`{field}` is not finite at {where} ({len(bad)} such steps): fill or drop it, mark the step as "
                        "padding with `valid`, or, if it is a target that is missing, give the step weight 0."
                    )
    if window.weights is not None and (np.where(valid, window.weights, 0) < 0).any():
        raise ValueError("`weights` holds a negative weight; each needs to be 0 (not scored) or more.")


def check_scored(window: Window) -> None:
    """Raises a ``ValueError`` if a whole stream, in the host's memory, has no step to score. One window may have none."""
    if not all(map(_on_host, jax.tree.leaves((window.weights, window.valid)))):
        return
    valid = True if window.valid is None else np.asarray(window.valid)
    if not np.any(np.where(valid, 1 if window.weights is None else window.weights, 0)):
        raise ValueError("`weights` is 0 at every valid step: nothing would be scored. Give one step a weight.")


def sequences(inputs: PyTree, targets: PyTree = None, lengths: Array | None = None) -> Window:
    """A batch of whole sequences as one window, with a reset at each start.

    Args:
      inputs: pytree of arrays ``[n, time, ...]``, padded at the end to one length.
      targets: pytree of arrays ``[n, time, ...]``, or None.
      lengths: ``[n]`` int, the steps of each sequence, 0 included; None: all are as long as the arrays.

    Returns:
      A window ``[n, time, ...]``.

    Raises:
      ValueError: if there are no inputs, the arrays do not share ``[n, time]`` or are empty, the lengths are not as
        described, or data in the host's memory is not finite at a valid step.
    """
    whole = Window(inputs, targets)
    n, time = time_shape(whole, ("sequences", "time"))
    if lengths is not None:
        lengths = np.asarray(lengths)
        whole_numbers = np.issubdtype(lengths.dtype, np.integer)
        if lengths.shape != (n,) or not whole_numbers or (lengths < 0).any() or (lengths > time).any():
            raise ValueError(
                f"`lengths` needs one whole number from 0 to {time} for each of {n} sequences; got {lengths}."
            )
        whole = whole._replace(valid=np.arange(time) < lengths[:, None])
    whole = whole._replace(resets=_first_step(n, time))
    check(whole, ("sequences", "time"))
    return whole


def lanes(inputs: PyTree, targets: PyTree = None, *, lanes: int) -> Window:
    """Folds one long corpus into continuous lanes: lane i holds the i-th stretch, of ``ceil(time / lanes)`` steps.

    Args:
      inputs: pytree of arrays ``[time, ...]``.
      targets: pytree of arrays ``[time, ...]``, or None.
      lanes: how many streams to read side by side.

    Returns:
      A window ``[lanes, ceil(time / lanes), ...]``, reset at each lane's start. Every step of the corpus is in it
      once; where the corpus does not fill the lanes, the end is padding (``valid`` is False).

    Raises:
      ValueError: if there are no inputs, the arrays do not share ``[time]`` or are empty, ``lanes`` is not a whole number
        from 1 to time, or data in the host's memory is not finite.
    """
    (time,) = time_shape(Window(inputs, targets), ("time",))
    check_whole("lanes", lanes)
    if lanes > time:
        raise ValueError(f"A corpus of {time} steps cannot be laid out as {lanes} lanes: choose from 1 to {time}.")
    length = -(-time // lanes)
    padding = lanes * length - time

    def fold(x: Array) -> Array:
        return pad(x, 0, padding).reshape(lanes, length, *x.shape[1:])

    valid = fold(np.ones(time, bool)) if padding else None
    inputs, targets = jax.tree.map(fold, (inputs, targets))
    window = Window(inputs, targets, resets=_first_step(lanes, length), valid=valid)
    check(window)
    return window


def slide(window: Window, length: int, stride: int = 1) -> Window:
    """Cuts overlapping windows that each stand alone, as stateless training on sliding windows does.

    This is ``prepare_sequences`` of P. Remy, *Stateful LSTM in Keras* (2016), for any stride: 1000 sequences of 20
    steps become 11,000 of 10.

    Args:
      window: whole sequences ``[n, time, ...]``, without padding.
      length: steps in each cut.
      stride: steps from the start of one cut to the start of the next.

    Returns:
      A window ``[n * cuts, length, ...]`` with ``cuts = (time - length) // stride + 1``, sequence by sequence, each
      row reset at its first step: rows are sequences of their own, since row i of one batch of overlapping cuts does
      not continue row i of the batch before.

    Raises:
      ValueError: if the window's shapes, data or weights are not as :class:`Window` describes, ``length`` is not a whole
        number from 1 to time, ``stride`` not one from 1, or the window has ``valid``.
    """
    n, time = time_shape(window)
    _check_length(length, time)
    check(window)
    check_whole("stride", stride)
    if window.valid is not None:
        raise ValueError("`slide` cuts sequences of one length, and this window has padding: use `split`.")
    steps = np.arange(0, time - length + 1, stride)[:, None] + np.arange(length)
    cut = jax.tree.map(lambda x: x[:, steps].reshape(-1, length, *x.shape[2:]), window)
    starts = _first_step(n * len(steps), length)
    return cut._replace(resets=starts if cut.resets is None else starts | cut.resets)


def split(window: Window, length: int, *, lanes: int | None = None) -> Window:
    """Cuts contiguous windows, so that each continues the one before it: what a carried state needs.

    Args:
      window: whole sequences or lanes ``[n, time, ...]``.
      length: steps in each cut. The last is padded to it (``valid`` is False there), and so keeps its true weight.
      lanes: how many rows run side by side, default all n. The rows then come in groups, one group after another,
        the last one filled up with empty lanes.

    Returns:
      Windows stacked on a leading axis, ``[ceil(n / lanes) * ceil(time / length), lanes, length, ...]``. The rows are
      reset where they start, besides where ``window`` resets them.

    Raises:
      ValueError: if the window's shapes, data or weights are not as :class:`Window` describes, ``length`` is not a whole
        number from 1 to time, ``lanes`` not one from 1 to n, or, in the host's memory, no step is scored.
    """
    n, time = time_shape(window)
    _check_length(length, time)
    lanes = n if lanes is None else lanes
    check_whole("lanes", lanes)
    if lanes > n:
        raise ValueError(f"{n} sequences cannot be run in {lanes} lanes: choose from 1 to {n}.")
    check(window)
    check_scored(window)
    more_rows, more_steps = -n % lanes, -time % length

    def cut(x: Array, padding: float = 0) -> Array:
        x = pad(pad(x, 0, more_rows, padding), 1, more_steps, padding)
        groups, windows = x.shape[0] // lanes, x.shape[1] // length
        x = x.reshape(groups, lanes, windows, length, *x.shape[2:])
        return x.swapaxes(1, 2).reshape(groups * windows, lanes, length, *x.shape[4:])

    starts = _first_step(n, time)
    resets = starts if window.resets is None else starts | window.resets
    valid = np.ones((n, time), bool) if (more_rows or more_steps) and window.valid is None else window.valid
    edges = None if window.edges is None else cut(window.edges, 1)  # the gradient passes through padding as it is
    return jax.tree.map(cut, window._replace(resets=resets, valid=valid, edges=None))._replace(edges=edges)


def stateless(window: Window) -> Window:
    """The same windows, ``[..., lanes, time, ...]``, each begun from the initial carry, with nothing known before.

    Raises:
      ValueError: if the window has no ``resets``.
    """
    if window.resets is None:
        raise ValueError("`stateless` adds to the resets that `split`, `slide` and `lanes` set; this window has none.")
    return window._replace(resets=window.resets | (np.arange(window.resets.shape[-1]) == 0))


def where_lanes(condition: Array, yes: PyTree, no: PyTree) -> PyTree:
    """``jnp.where`` on trees: ``condition`` ``[lanes]`` or ``[lanes, time]`` chooses whole rows of leaves that begin so."""

    def choose(yes: jax.Array, no: jax.Array) -> jax.Array:
        return jnp.where(condition.reshape(condition.shape + (1,) * (yes.ndim - condition.ndim)), yes, no)

    return jax.tree.map(choose, yes, no)


def _first_step(rows: int, time: int) -> np.ndarray:
    return np.broadcast_to(np.arange(time) == 0, (rows, time))


def _check_length(length: int, time: int) -> None:
    check_whole("length", length)
    if length > time:
        raise ValueError(f"A window of {length} steps is longer than the stream of {time}: choose at most {time}.")


def check_whole(name: str, value: int, hint: str = "") -> None:
    """Raises a ``ValueError`` unless ``value`` is a whole number, at least 1."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"`{name}` is {value!r}; it needs to be a whole number, at least 1.{hint}")


def pad(x: Array, axis: int, amount: int, value: float = 0) -> Array:
    """``x`` with ``amount`` more entries of ``value`` at the end of ``axis``."""
    if not amount:
        return x
    xp = np if isinstance(x, np.ndarray) else jnp
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, amount)
    return xp.pad(x, widths, constant_values=value)


def _on_host(x: Array) -> bool:
    if isinstance(x, jax.core.Tracer):
        return False
    return not isinstance(x, jax.Array) or (
        x.is_fully_addressable and all(device.platform == "cpu" for device in x.devices())
    )
