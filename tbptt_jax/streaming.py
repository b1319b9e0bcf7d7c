"""Streaming: a trained model read step by step, as it is served.

    predict = tb.streaming(model, params)
    carry = model.initial_carry(params, lanes=1)
    for x in arriving:  # [1, features]
        carry, y = predict(carry, x)

Parameters and a carry that goes on from where training, or an earlier process, left it are kept together:

    tb.checkpoint.save("served", (params, carry))
    params, carry = tb.checkpoint.load("served", like=(params, carry))
"""

import functools
from collections.abc import Callable
from typing import Any

import jax

from tbptt_jax.recurrence import Recurrence

PyTree = Any


def streaming(model: Recurrence, params: PyTree) -> Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]:
    """One step at a time: ``(carry, x [lanes, ...]) -> (carry, y [lanes, ...])``, compiled once for each number of lanes.

    The outputs are those of ``model.unroll`` over windows of any length. The carry is not donated: it can be kept, to go
    back to or to try several futures from.

    Args:
      model: the recurrence.
      params: its parameters. They stay where they are: on a device, once they have been put there.

    Raises:
      ValueError: from the function returned, when it is traced, if ``x`` has no axis of lanes or the carry belongs to
        another number of them.
    """
    return functools.partial(_step, model, params)


@functools.partial(jax.jit, static_argnames="model")
def _step(model: Recurrence, params: PyTree, carry: PyTree, x: PyTree) -> tuple[PyTree, PyTree]:
    for leaf in jax.tree.leaves(x):
        if not leaf.ndim:
            raise ValueError("`x` has a number without axes; it needs [lanes, ...], such as `x[None]` for one lane.")
    carry, y = model.unroll(params, carry, jax.tree.map(lambda x: x[:, None], x), None, None)
    return carry, jax.tree.map(lambda y: y[:, 0], y)
