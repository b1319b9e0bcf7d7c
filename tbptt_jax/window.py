"""Windows: a stream cut along time, and the pure functions that cut it.

Everything that is trained on is one type, :class:`Window`. A batch of whole sequences is a window as long as the
sequences; :func:`lanes` folds one long corpus into such a batch; :func:`slide` and :func:`split` cut it. They set
``resets``, so what they return is right by construction: a carry never crosses from one sequence into another.

Statelessness is data too: :func:`stateless` asks every window to begin from the initial carry.
"""

import functools
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


def same_tree(one: PyTree, other: PyTree) -> bool:
    return bool(jax.tree.structure(one) == jax.tree.structure(other))  # type: ignore[operator]


def is_leaf(tree: PyTree) -> bool:
    return jax.tree_util.treedef_is_leaf(jax.tree.structure(tree))


def at_least_float32(dtype: Any) -> Any:
    """The dtype in which numbers of this one are added up: sums of half precision overflow, or stand still."""
    return jnp.promote_types(dtype, jnp.float32)


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
        _check_array(field, leaf)
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


def _check_array(field: str, leaf: Any) -> None:
    """Raises a ``ValueError`` unless ``leaf`` is an array whose every entry means what it says."""
    kind, owner = type(leaf).__name__, type(leaf).__module__.partition(".")[0]
    if isinstance(leaf, np.ma.MaskedArray):
        raise ValueError(
            f"`{field}` is a masked array, and its mask would be lost: give `x.filled(0)`, and say with `valid` which steps are "
            "there, or with `weights` (0 where it is masked) which are scored."
        )
    if not isinstance(leaf, np.ndarray | np.generic | jax.Array | jax.ShapeDtypeStruct) or isinstance(leaf, np.matrix):
        of = "a Python" if owner == "builtins" else f"of {owner}, a"
        raise ValueError(f"`{field}` holds {quoted(leaf)}, {of} {kind}; give arrays of numbers, as `np.asarray` makes.")
    key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    if not (key or jnp.issubdtype(leaf.dtype, jnp.number) or leaf.dtype == bool):
        raise ValueError(
            f"`{field}` has dtype {leaf.dtype}, which nothing can be computed with; give numbers: `np.asarray(x, np.float32)`, "
            "or, of names or dates, numbers that stand for them."
        )


def quoted(x: Any) -> str:
    """``repr(x)`` on one line of at most 80 characters."""
    text = " ".join(repr(x).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


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


def split(window: Window, length: int, *, lanes: int | None = None, drop_padding: bool = False) -> Window:
    """Cuts contiguous windows, so that each continues the one before it: what a carried state needs.

    Resets are data: those of ``window`` go with their steps, and cutting adds none, so that a stream cut in its middle goes
    on. Only where one row follows another in a lane is the lane reset. Rows of a window without ``resets`` are taken
    for whole sequences, each reset at its first step.

    Args:
      window: whole sequences or lanes ``[n, time, ...]``.
      length: steps in each cut. The last is padded to it (``valid`` is False there), so that its mean is of its own steps.
      lanes: how many rows run side by side, default all n. The rows then come in groups, one group after another,
        the last one filled up with empty lanes.
      drop_padding: leave out the windows at the end of a group in which every lane has ended, as there are where
        sequences are ragged. How many are left then depends on ``valid``, which has to be in the host's memory.

    Returns:
      Windows stacked on a leading axis, ``[ceil(n / lanes) * ceil(time / length), lanes, length, ...]``, or fewer.

    Raises:
      ValueError: if the window's shapes, data or weights are not as :class:`Window` describes, ``length`` is not a whole
        number from 1 to time, ``lanes`` not one from 1 to n, in the host's memory no step is scored, or padding is to
        be dropped and ``valid`` is not there.
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

    starts: Array = _first_step(n, time)
    if window.resets is not None:
        starts = window.resets | (starts & (np.arange(n) >= lanes)[:, None])
    valid = np.ones((n, time), bool) if (more_rows or more_steps) and window.valid is None else window.valid
    edges = None if window.edges is None else cut(window.edges, 1)  # the gradient passes through padding as it is
    windows = jax.tree.map(cut, window._replace(resets=starts, valid=valid, edges=None))._replace(edges=edges)
    if not drop_padding or windows.valid is None:
        return windows
    if not on_host(windows.valid):
        raise ValueError("`drop_padding` needs `valid` in the host's memory: cut before the data is put on a device.")
    lives = (np.asarray(windows.valid) | np.asarray(windows.resets)).any((1, 2)).reshape(-1, -(-time // length))
    lives = np.logical_or.accumulate(lives[:, ::-1], 1)[
        :, ::-1
    ].ravel()  # up to the last of its group in which a lane lives
    return jax.tree.map(lambda x: x[lives], windows)


def overlap(window: Window, length: int, burn_in: int) -> Window:
    """Cuts windows that begin anew and read ``burn_in`` steps before those they score, to find their state.

    Every step is scored once. The steps of a burn-in weigh nothing, and no gradient flows back into them: their weight
    alone would not keep it out (``edges`` is 0 where they end). The first window begins where the stream does, and has
    nothing to burn in.

    Args:
      window: whole sequences or lanes ``[n, time, ...]``.
      length: steps in each cut, the burn-in among them; the last is padded to it.
      burn_in: steps from a window's first to the first that it scores, less than ``length``.

    Returns:
      Windows stacked on a leading axis, ``[windows, n, length, ...]``, ``length - burn_in`` steps apart, each reset at its
      first step.

    Raises:
      ValueError: as from :func:`split`, or if ``burn_in`` is not a whole number from 0 to ``length - 1``.

    Reference: Kapturowski et al. 2019, *Recurrent experience replay in distributed reinforcement learning* (R2D2), section 3;
    for a state that was stored there is :func:`burn_in`.
    """
    n, time = time_shape(window)
    _check_length(length, time)
    _check_burn_in("burn_in", burn_in, length)
    check(window)
    check_scored(window)
    first = np.arange(1 + max(0, -(-(time - length) // (length - burn_in)))) * (length - burn_in)
    steps = first[:, None] + np.arange(length)
    cut = jax.tree.map(lambda x: x[:, np.minimum(steps, time - 1)].swapaxes(0, 1), window)
    inside = np.broadcast_to((steps < time)[:, None], (len(first), n, length))
    if not inside.all():
        cut = cut._replace(valid=inside if cut.valid is None else inside & cut.valid)
    resets = np.zeros(inside.shape, bool) if cut.resets is None else cut.resets & inside
    return stateless(_burnt_in(cut._replace(resets=resets), np.where(first > 0, burn_in, 0)[:, None, None]))


def burn_in(windows: Window, steps: int) -> Window:
    """The same windows, their first ``steps`` steps read only to find the state: they weigh nothing, and no gradient
    flows back into them.

    A weight of 0 alone would let the gradient of later steps flow through them. A state that was stored with the windows
    is given to the estimator: ``estimate.init(key, params, window)._replace(carry=stored)``.

    Args:
      windows: ``[lanes, time, ...]``, or stacked on leading axes and with resets, as :func:`split` makes them.
      steps: a whole number from 0 to ``time - 1``.

    Raises:
      ValueError: if ``steps`` is not as described.

    Reference: Kapturowski et al. 2019, *Recurrent experience replay in distributed reinforcement learning* (R2D2), section 3.
    """
    masks = jax.tree.leaves((windows.resets, windows.valid, windows.weights, windows.edges))
    time = masks[0].shape[-1] if masks else time_shape(windows)[1]
    _check_burn_in("steps", steps, time)
    return _burnt_in(windows, steps)


def _burnt_in(windows: Window, steps: int | Array) -> Window:
    """``steps`` is a number or has the windows' axes."""
    masks = jax.tree.leaves((windows.resets, windows.valid, windows.weights, windows.edges))
    shape = masks[0].shape if masks else time_shape(windows)
    t = np.arange(shape[-1])
    scored, within = np.broadcast_to(t >= steps, shape), np.broadcast_to((t != steps) | (t == 0), shape)
    ones = np.ones(shape, np.float32)
    weights, edges = (ones if x is None else x for x in (windows.weights, windows.edges))
    return windows._replace(
        weights=jax.tree.map(lambda w: w * scored.astype(at_least_float32(w.dtype)), weights),
        edges=edges * within.astype(at_least_float32(edges.dtype)),
    )


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


def _check_burn_in(name: str, steps: int, time: int) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or not 0 <= steps < time:
        raise ValueError(
            f"`{name}` is {steps!r}, and the windows have {time} steps: choose a whole number from 0 to {time - 1}, so that "
            "some are left to score."
        )


def pad(x: Array, axis: int, amount: int, value: float = 0) -> Array:
    """``x`` with ``amount`` more entries of ``value`` at the end of ``axis``; typed keys are filled up with zeros."""
    if not amount:
        return x
    xp = np if isinstance(x, np.ndarray) else jnp
    shape = (*x.shape[:axis], amount, *x.shape[axis + 1 :])
    more = xp.full(shape, value, x.dtype) if value else xp.zeros(shape, x.dtype)
    return xp.concatenate([x, more], axis)


def on_host(x: Array) -> bool:
    if isinstance(x, jax.core.Tracer):
        return False
    return not isinstance(x, jax.Array) or (
        x.is_fully_addressable and all(device.platform == "cpu" for device in x.devices())
    )
