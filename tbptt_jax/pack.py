"""Packing: sequences of any lengths laid end to end in a few lanes, so that almost every step that is computed counts."""

import heapq
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tbptt_jax.arrays import Array, check_whole, quoted
from tbptt_jax.per_sequence import over_steps
from tbptt_jax.window import Layout, Window, check, laid_out, time_shape

PyTree = Any


def pack(
    inputs: PyTree,
    targets: PyTree = None,
    *,
    lengths: Array,
    lanes: int,
    key: jax.Array | int | None = None,
    static: PyTree = None,
    label: PyTree = None,
) -> Window:
    """Lays sequences into lanes: the lane that ends first takes the next sequence at once, with its reset.

    The targets of a next-step task are each sequence's own: ``inputs[:-1], inputs[1:]`` of all of them together would make the
    first step of another sequence the target of a last one. :func:`tbptt_jax.streams.documents` lays them rightly.

    For epochs in different orders: ``pack(..., key=jax.random.fold_in(key, epoch))``.

    Args:
      inputs: pytree of arrays ``[sum(lengths), ...]``, the sequences one after another.
      targets: pytree of arrays ``[sum(lengths), ...]``, or None.
      lengths: ``[n]`` int, the steps of each sequence, 0 included.
      lanes: how many streams to fill side by side.
      key: draws the order of the sequences, from a JAX key or an integer seed. None: the order given.
      static: pytree of arrays ``[n, ...]``, features that are the same at all steps of a sequence: see
        :func:`tbptt_jax.sequences`.
      label: pytree of arrays ``[n, ...]``, scored once, at the last step of a sequence, likewise.

    Returns:
      A window ``[lanes, time, ...]``, each step of each sequence in it once, reset where a sequence begins, with padding
      where a lane has ended. ``valid.mean()`` is the occupancy. Without a key, ``time`` is that of the fullest lane;
      with one it is the most that any order needs, so that every epoch has one shape and compiles once. It remembers where
      each sequence lies, for :func:`tbptt_jax.join`.

    Raises:
      ValueError: if there is nothing to lay, the arrays differ in steps, the lengths are not whole numbers from 0 that add
        up to them, ``lanes`` is not a whole number, at least 1, ``static`` or ``label`` does not begin with n, or data in the
        host's memory is not finite.

    Reference: Graham 1966, *Bounds for certain multiprocessing anomalies*, for ``time`` with a key.
    """
    flat = Window(inputs, targets)
    (total,) = time_shape(flat, ("steps",))
    if isinstance(lengths, np.ma.MaskedArray) or np.asarray(lengths).dtype.kind not in "iu":
        raise ValueError(
            f"`lengths` is {quoted(lengths)}; it needs whole numbers from 0, as `np.asarray` makes, none of them masked."
        )
    lengths = np.asarray(lengths)
    if lengths.ndim != 1 or (lengths < 0).any() or lengths.sum() != total:
        raise ValueError(
            f"`lengths` is {lengths} ({lengths.dtype}), of sum {lengths.sum()}; it needs whole numbers from 0 that add up to "
            f"the arrays' {total} steps."
        )
    check_whole("lanes", lanes)
    order = np.arange(len(lengths))
    if key is not None:
        order = np.asarray(
            jax.random.permutation(jax.random.key(key) if isinstance(key, int | np.integer) else key, order)
        )

    lane, step = np.empty((2, len(lengths)), np.int64)  # where each sequence begins
    filled = [(0, i) for i in range(lanes)]  # a heap: the lane that ends first is at its head
    for i in order:
        step[i], lane[i] = filled[0]
        heapq.heapreplace(filled, (int(step[i] + lengths[i]), int(lane[i])))
    time = max(end for end, _ in filled)
    if key is not None:
        # What the lanes hold when the last to end takes its last sequence bounds greedy filling in any order
        # (Graham 1966, Bounds for certain multiprocessing anomalies), and a lane's fill is a multiple of the common divisor.
        longest, divisor = int(lengths.max()), int(np.gcd.reduce(lengths))
        time = (total + (lanes - 1) * longest) // lanes // divisor * divisor
    before = np.cumsum(lengths) - lengths  # where each begins in the flat arrays
    to = np.repeat(lane * time + step - before, lengths) + np.arange(total)  # in all lanes, one after another

    def lay(x: Array) -> Array:
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            data = jnp.asarray(lay(np.asarray(jax.random.key_data(x))))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
        laid = np.zeros((lanes * time, *x.shape[1:]), x.dtype)
        laid[to] = x
        return laid.reshape(lanes, time, *x.shape[1:])

    def spread(x: Array) -> Array:
        return x[np.repeat(np.arange(len(lengths)), lengths)]

    def marked(steps: np.ndarray) -> np.ndarray:
        marks = np.zeros(total, bool)
        marks[steps[lengths > 0]] = True
        return marks

    steps = over_steps(inputs, targets, static, label, len(lengths), spread, marked(before + lengths - 1))
    window = Window(*jax.tree.map(lay, (*steps, marked(before), np.ones(total, bool))))
    check(window)
    return laid_out(window, Layout((lanes, time), to, lengths))
