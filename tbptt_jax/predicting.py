"""Predicting: what a trained model says at every step of a stream, and the way back to the sequences that it was cut from.

packed = tb.pack(flat, lengths=lengths, lanes=32)
carry, outputs = tb.predict(model, params, tb.split(packed, 64))
answers = tb.join(outputs, like=packed)  # one array a sequence, in the order of `lengths`
"""

import functools
from typing import Any

import jax
import numpy as np
from jax import lax

from tbptt_jax.arrays import check_array
from tbptt_jax.cutting import slide, split
from tbptt_jax.ranges import check_ranges
from tbptt_jax.recurrence import Recurrence, check_carry, unroll_window
from tbptt_jax.window import LaidOut, Layout, Window, check, time_shape

PyTree = Any
AXES = ("windows", "lanes", "time")


def predict(model: Recurrence, params: PyTree, windows: Window, carry: PyTree | None = None) -> tuple[PyTree, PyTree]:
    """The outputs at every step of a stream, its windows read one after another with the carry, in one compiled call.

    Targets, weights and edges are not looked at. Of steps that are padding the outputs mean nothing; :func:`join` drops them.

    Args:
      model: the recurrence.
      params: its parameters.
      windows: consecutive windows ``[windows, lanes, time, ...]``, as :func:`tbptt_jax.split` cuts them, on a device or in the
        host's memory.
      carry: what to begin from where the windows have no reset, every leaf ``[lanes, ...]``: that which training, or the
        call for the windows before, ended with. None: the initial carry.

    Returns:
      ``(carry, outputs)``: the carry after the last window, to go on with, and the outputs ``[windows, lanes, time, ...]``.

    Raises:
      ValueError: before any compute, if the windows' shapes or data are not as described, the carry does not fit the lanes, or,
        in the host's memory, a token is not in the model's table.
    """
    if isinstance(windows, Window):
        windows = Window(windows.inputs, resets=windows.resets, valid=windows.valid)
    check(windows, AXES)
    check_ranges(model, None, params, windows, AXES)
    check_start(model, params, windows, carry)
    return _predict(model, params, windows, carry)


@functools.partial(jax.jit, static_argnames="model")
def _predict(model: Recurrence, params: PyTree, windows: Window, carry: PyTree | None) -> tuple[PyTree, PyTree]:
    if carry is None:
        carry = model.initial_carry(params, time_shape(windows, AXES)[1])
    return lax.scan(lambda carry, window: unroll_window(model, params, carry, window), carry, windows)


def check_start(model: Recurrence, params: PyTree, windows: Window, carry: PyTree | None) -> None:
    """Raises a ``ValueError`` if windows ``[windows, lanes, time, ...]`` cannot be read from this carry on."""
    _, lanes, _ = time_shape(windows, AXES)
    if carry is not None:
        check_carry(carry, jax.eval_shape(lambda p: model.initial_carry(p, lanes), params), lanes)


def join(outputs: PyTree, like: Window) -> PyTree:
    """Undoes the cutting of a stream: the outputs of its windows, joined to one answer for each step of what was cut.

    ``like`` is what was given to ``split``; what ``slide``, ``overlap`` and ``pack`` returned is undone too, as it remembers
    its layout:

    - ``windows = split(whole, k)``, with ``lanes`` and ``drop_padding`` or without: ``like=whole`` gives ``[n, time, ...]``, a
      row for each of its rows.
    - ``slid = slide(whole, k, stride)``, ``windows = split(slid, k)``: ``like=slid`` gives the same, and so does
      ``like=whole`` where the number of cuts tells the stride. Of ``split(slid, k, lanes=...)`` only ``like=slid`` is right.
    - ``windows = overlap(whole, k, burn_in)``: ``like=windows`` gives the same.
    - ``packed = pack(...)``, ``windows = split(packed, k)``: ``like=packed`` gives a list, one ``[length, ...]`` for each
      sequence, in the order of ``lengths``, whatever order a key has drawn.

    Where windows overlap, a step's answer is that of the window which has read the most steps before it. Padding is 0. The
    lanes of a corpus, ``whole = lanes(corpus, lanes=32)``, are its stretches one after another: the answers for the corpus
    are ``joined.reshape(-1, *joined.shape[2:])[: len(corpus)]``.

    Args:
      outputs: pytree of arrays ``[windows, lanes, time, ...]``, of all windows of the stream, as :func:`predict` returns them;
        on a device or in the host's memory.
      like: the window, as above. One that has a layout itself: ``_replace`` keeps it, a copy by ``jax.tree.map`` does not.

    Returns:
      The tree of ``outputs`` with NumPy arrays, in the host's memory; of packed sequences a list of such trees.

    Raises:
      ValueError: if the outputs do not share their first three axes, are traced, or are not of all windows that ``like`` is
        cut into, its layout was lost, or, of ``slide``, a step is in no window.
    """
    leaves, tree = jax.tree.flatten(outputs)
    shape, layout = _leading(leaves), _layout(like)
    if layout is None:
        at = _cut_from(like, shape)
    elif len(layout.shape) == 2:
        at = _cut_from(like, shape).ravel()[layout.places]
    elif layout.shape == shape:
        there = like.valid is None or np.asarray(like.valid).ravel()[layout.places]
        at = np.where(there, layout.places, -1)
    else:
        raise ValueError(_others(shape, f"were cut to overlap, {list(layout.shape)}"))

    def pick(x: Any) -> np.ndarray:
        x = np.asarray(x)
        joined = x.reshape(-1, *x.shape[3:])[at]
        joined[at < 0] = 0
        return joined

    joined = [pick(x) for x in leaves]
    if layout is None or layout.lengths is None:
        return jax.tree.unflatten(tree, joined)
    ends = np.cumsum(layout.lengths)[:-1]
    return [jax.tree.unflatten(tree, of_one) for of_one in zip(*(np.split(x, ends) for x in joined), strict=True)]


def _leading(leaves: list) -> tuple[int, int, int]:
    """``(windows, lanes, time)`` of outputs."""
    for x in leaves:
        check_array("outputs", x)
    if any(isinstance(x, jax.core.Tracer) for x in leaves):
        raise ValueError("`outputs` is traced, and `join` needs numbers: call it on what the jitted function returns.")
    shapes = {x.shape[:3] for x in leaves}
    if len(shapes) != 1 or len(min(shapes)) != 3 or 0 in min(shapes):
        raise ValueError(
            f"`outputs` holds arrays of shape {[list(x.shape) for x in leaves]}; all of them need the same first axes, "
            "[windows, lanes, time, ...], as `tb.predict` returns them. Those of one window get the first by `x[None]`."
        )
    return shapes.pop()


def _layout(like: Window) -> Layout | None:
    """How ``like`` was laid out, if it was, after a look at whether it is what can be gone back to."""
    if not isinstance(like, LaidOut):
        if isinstance(like, Window) and like.resets is not None and len(like.resets.shape) == len(AXES):
            raise ValueError(
                "`like` is windows; it needs to be the window that they were cut from: `split(like, length)`."
            )
        time_shape(like)
        return None
    layout = like.layout
    if layout is None or jax.tree.leaves(like.inputs)[0].shape[: len(layout.shape)] != layout.shape:
        raise ValueError(
            "`like` is a copy or a part of a window that was packed or cut to overlap, and its layout was lost on the way: give "
            "the window itself that `tb.pack`, `tb.slide` or `tb.overlap` returned."
        )
    if (layout.places < 0).any():
        raise ValueError(
            f"{(layout.places < 0).sum()} of {layout.places.size} steps are in no window that `slide` cut, and so have no "
            "answer: choose a stride of at most the windows' length that the steps after the first window are a multiple of."
        )
    return layout


def _cut_from(like: Window, shape: tuple[int, int, int]) -> np.ndarray:
    """Of each step of ``like``, its place in the windows of this shape that `split` cuts; -1 for padding."""
    windows, lanes, length = shape
    n, time = time_shape(like)
    resets, valid = (None if x is None else np.asarray(x) for x in (like.resets, like.valid))
    numbered = Window(np.arange(n * time).reshape(n, time), resets=resets, valid=valid)
    if windows == 1 and lanes > n and lanes % n == 0 and length <= time and valid is None:
        strides = [s for s in range(1, time - length + 1) if (time - length) // s + 1 == lanes // n]
        if len(strides) > 1:
            raise ValueError(
                f"`outputs` has {lanes // n} cuts for each of {n} sequences, which strides from {strides[0]} to {strides[-1]} "
                "make: give as `like` the window that `slide` returned, which knows its own."
            )
        if strides:
            return _layout(slide(numbered, length, strides[0])).places  # type: ignore[union-attr]
    for drop_padding in (False, True) if lanes <= n and length <= time else ():
        cut = split(numbered, length, lanes=lanes, drop_padding=drop_padding)
        if len(cut.inputs) == windows:
            break
    else:
        raise ValueError(_others(shape, f"`split` cuts of `like`, which is [{n}, {time}]"))
    there = np.ones(shape, bool) if cut.valid is None else cut.valid
    at = np.full((n, time), -1)
    at.ravel()[cut.inputs[there]] = np.flatnonzero(there)
    return at


def _others(shape: tuple[int, int, int], those: str) -> str:
    return (
        f"`outputs` begins with the axes {list(shape)}, [windows, lanes, time], and these are not the windows that {those}: give "
        "the outputs of all windows of the stream (those of several calls by `np.concatenate`), and as `like` what was given "
        "to `split`, or what `overlap` returned."
    )
