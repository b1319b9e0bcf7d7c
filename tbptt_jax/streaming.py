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
from flax.errors import FlaxError

from tbptt_jax.recurrence import Recurrence
from tbptt_jax.window import Window, check

PyTree = Any


def streaming(model: Recurrence, params: PyTree) -> Callable[..., tuple[PyTree, PyTree]]:
    """One step at a time: ``(carry, x, resets=None, valid=None) -> (carry, y)``, compiled once for each number of lanes.

    The outputs are those of ``model.unroll`` over windows of any length. ``x`` and ``y`` are pytrees ``[lanes, ...]``: those
    of training without their time axis. The carry is not donated: it can be kept, to go back to or to try several futures
    from. Where lanes are clients, ``resets`` ``[lanes]`` bool begins one anew before the step, as for the next client, and
    where ``valid`` ``[lanes]`` bool is False nothing has come: the carry stands still, and that lane's y means nothing.

    Values are not looked at. One that is not finite spoils its own lane, until that is reset, and no other.

    Args:
      model: the recurrence.
      params: its parameters. They stay where they are: on a device, once they have been put there.

    Raises:
      ValueError: from the function returned, when it is traced, if ``x`` has no axis of lanes, is no tree of numbers or
        does not fit the model, or the carry belongs to another number of lanes.
    """

    def step(
        carry: PyTree, x: PyTree, resets: jax.Array | None = None, valid: jax.Array | None = None
    ) -> tuple[PyTree, PyTree]:
        try:
            return _step(model, params, carry, x, resets, valid)
        except (TypeError, FlaxError) as error:  # what others say of that which is no array, or does not fit
            given = jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}" if hasattr(x, "shape") else repr(x), x)
            raise ValueError(
                f"The model cannot take the step `x`, {given}: it needs numbers or bool, [lanes, ...], the inputs of "
                f"training without their time axis. ({str(error).splitlines()[0]})"
            ) from error

    return step


@functools.partial(jax.jit, static_argnames="model")
def _step(
    model: Recurrence, params: PyTree, carry: PyTree, x: PyTree, resets: jax.Array | None, valid: jax.Array | None
) -> tuple[PyTree, PyTree]:
    check(Window(x, resets=resets, valid=valid), ("lanes",))
    x, resets, valid = jax.tree.map(lambda leaf: leaf[:, None], (x, resets, valid))
    carry, y = model.unroll(params, carry, x, resets, valid)
    return carry, jax.tree.map(lambda y: y[:, 0], y)
