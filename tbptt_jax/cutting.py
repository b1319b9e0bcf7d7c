"""Cutting a stream along time: the pure functions that make windows of data.

:func:`sequences` takes whole sequences, :func:`lanes` folds one long corpus into lanes; :func:`slide` and :func:`split` cut
them. They set ``resets``, so what they return is right by construction: a carry never crosses from one sequence into another.

Statelessness is data too: :func:`stateless` asks every window to begin from the initial carry.
"""

import jax
import jax.numpy as jnp
import numpy as np

from tbptt_jax.arrays import Array, PyTree, at_least_float32, check_whole, on_host, pad
from tbptt_jax.per_sequence import over_steps
from tbptt_jax.window import Layout, Window, check, check_scored, laid_out, time_shape


def sequences(
    inputs: PyTree,
    targets: PyTree = None,
    lengths: Array | None = None,
    *,
    static: PyTree = None,
    label: PyTree = None,
) -> Window:
    """A batch of whole sequences as one window, with a reset at each start.

    Args:
      inputs: pytree of arrays ``[n, time, ...]``, padded at the end to one length.
      targets: pytree of arrays ``[n, time, ...]``, or None.
      lengths: ``[n]`` int, the steps of each sequence, 0 included; None: all are as long as the arrays.
      static: pytree of arrays ``[n, ...]``, features that are the same at all steps of a sequence. The window's inputs are then
        ``{"inputs": inputs, "static": static}``, with the features at every step: views of ``static`` where that is in the
        host's memory.
      label: pytree of arrays ``[n, ...]``, scored once, at the last step of a sequence. The window's targets are the
        label at every step, and its weights are 0 at all steps but the last; a sequence of length 0 has none. With
        ``targets`` besides, targets and weights are ``{"targets": ..., "label": ...}``, and the loss a dict of these
        names, whose two means are added up.

    Returns:
      A window ``[n, time, ...]``.

    Raises:
      ValueError: if there are no inputs, the arrays do not share ``[n, time]`` or are empty, ``static`` or ``label`` does not
        begin with n, the lengths are not as described, or data in the host's memory is not finite at a valid step.
    """
    n, time = time_shape(Window(inputs, targets), ("sequences", "time"))
    valid, ends = None, np.full(n, time)
    if lengths is not None:
        lengths = np.asarray(lengths)
        whole_numbers = np.issubdtype(lengths.dtype, np.integer)
        if lengths.shape != (n,) or not whole_numbers or (lengths < 0).any() or (lengths > time).any():
            raise ValueError(
                f"`lengths` needs one whole number from 0 to {time} for each of {n} sequences; got {lengths}."
            )
        valid, ends = np.arange(time) < lengths[:, None], lengths

    def spread(x: Array) -> Array:
        xp = np if isinstance(x, np.ndarray) else jnp
        return xp.broadcast_to(x[:, None], (n, time, *x.shape[1:]))

    last = np.arange(time) == ends[:, None] - 1
    inputs, targets, weights = over_steps(inputs, targets, static, label, n, spread, last)
    whole = Window(inputs, targets, weights, _first_step(n, time), valid)
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
      not continue row i of the batch before. It remembers its cuts, for :func:`tbptt_jax.join`.

    Raises:
      ValueError: if the window's shapes, data or weights are not as :class:`tbptt_jax.Window` describes, ``length`` is not a whole
        number from 1 to time, ``stride`` not one from 1, or the window has ``valid``.
    """
    n, time = time_shape(window)
    _check_length(length, time)
    check(window)
    check_whole("stride", stride)
    if window.valid is not None:
        raise ValueError("`slide` cuts sequences of one length, and this window has padding: use `split`.")
    first = np.arange(0, time - length + 1, stride)
    steps = first[:, None] + np.arange(length)
    cut = jax.tree.map(lambda x: x[:, steps].reshape(-1, length, *x.shape[2:]), Window(*window))
    starts = _first_step(n * len(steps), length)
    cut = cut._replace(resets=starts if cut.resets is None else starts | cut.resets)
    which, step = _earliest(first, length, time)
    places = np.where(which < 0, -1, (np.arange(n)[:, None] * len(first) + which) * length + step)
    return laid_out(cut, Layout((n * len(first), length), places))


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
      ValueError: if the window's shapes, data or weights are not as :class:`tbptt_jax.Window` describes, ``length`` is not a whole
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
    window = Window(*window)
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
      first step. They remember their cuts, for :func:`tbptt_jax.join`.

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
    cut = jax.tree.map(lambda x: x[:, np.minimum(steps, time - 1)].swapaxes(0, 1), Window(*window))
    inside = np.broadcast_to((steps < time)[:, None], (len(first), n, length))
    if not inside.all():
        cut = cut._replace(valid=inside if cut.valid is None else inside & cut.valid)
    resets = np.zeros(inside.shape, bool) if cut.resets is None else cut.resets & inside
    cut = stateless(_burnt_in(cut._replace(resets=resets), np.where(first > 0, burn_in, 0)[:, None, None]))
    which, step = _earliest(first, length, time)
    return laid_out(cut, Layout(inside.shape, (which * n + np.arange(n)[:, None]) * length + step))


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


def _earliest(first: np.ndarray, length: int, time: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each of ``time`` steps the cut, of those that begin at ``first``, in which most comes before it, and its step there;
    -1 where no cut has it."""
    t = np.arange(time)
    which = np.searchsorted(first, t - length, side="right")  # the first to end after t
    step = t - first[np.minimum(which, len(first) - 1)]
    return np.where((step < 0) | (step >= length), -1, which), step


def _first_step(rows: int, time: int) -> np.ndarray:
    return np.broadcast_to(np.arange(time) == 0, (rows, time))


def _check_length(length: int, time: int) -> None:
    check_whole("length", length)
    if length > time:
        raise ValueError(f"A window of {length} steps is longer than the stream of {time}: choose at most {time}.")


def _check_burn_in(name: str, steps: int, time: int) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or not 0 <= steps < time:
        raise ValueError(
            f"`{name}` is {steps!r}, and the windows have {time} steps: choose a whole number from 0 to {time - 1}, so that "
            "some are left to score."
        )
