"""Penalties on what a model computes on the way: the size of its activations, and their change from step to step.

    model = tb.with_activations(model, 64, of=lambda outputs: outputs["h"])
    penalty = tb.activation_penalty(alpha=2.0, beta=1.0)

    def loss(outputs, window):
        return cross_entropy(outputs["outputs"]["logits"], window) + penalty(outputs, window)

A change is between two steps, and the one before a window's first is in the window before: the carry holds it.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tbptt_jax.arrays import PyTree, at_least_float32, check_whole, quoted, where_lanes
from tbptt_jax.noise import takes_key
from tbptt_jax.recurrence import Recurrence, from_step, unroll_window, windowed
from tbptt_jax.window import Window, time_shape


class ActivationCarry(NamedTuple):
    """Attributes:
    model: the carry of the model itself.
    activation: ``[lanes, units]``, that of the step before.
    begun: ``[lanes]`` bool; False: there was no step before.
    """

    model: PyTree
    activation: jax.Array
    begun: jax.Array


def with_activations(
    model: Recurrence,
    units: int,
    *,
    of: Callable[[PyTree], jax.Array] = lambda outputs: outputs,
    dropped: Callable[[PyTree], jax.Array] | None = None,
) -> Recurrence:
    """The same model, which hands out what :func:`activation_penalty` needs of each step.

    Its outputs are a dict: ``"outputs"``, those of the model; ``"activation"``; and ``"change"``, by how much the activation
    differs from that of the step before, 0 where there is none: at the first step of a stream, and after a reset. Padding is
    no step. The step before may be in an earlier window, so the changes are the same wherever the stream is cut; what of
    their gradient belongs to that window crosses the edge as all else does, by the influence.

    Its parameters are those of ``model``, which is what to evaluate and to serve.

    Args:
      model: a recurrence, among whose outputs the activations are, as where a readout returns ``{"logits": ..., "h": h}``.
      units: of an activation.
      of: ``outputs -> [lanes, time, units]``, the activations, real numbers. Default: the outputs are they.
      dropped: the same after dropout, which becomes ``"activation"``: Merity et al. penalise the size of what dropout has left,
        and the change of what was there before it. None: ``of``.

    Raises:
      ValueError: now, if ``model`` is none or ``units`` is no whole number from 1; from ``init`` and ``unroll``, before any
        compute, if the activations are not as described or the carry does not fit; and what the model raises.
    """
    if not isinstance(model, Recurrence):
        raise ValueError(
            f"`model` is {quoted(model)}; it needs to be a Recurrence, as `tb.lstm` and `tb.from_linen` make."
        )
    check_whole("units", units)

    def nothing_before(params: PyTree, lanes: int) -> tuple:
        return jnp.zeros((lanes, units)), jnp.zeros(lanes, bool)

    def initial_carry(params: PyTree, lanes: int) -> ActivationCarry:
        return ActivationCarry(model.initial_carry(params, lanes), *nothing_before(params, lanes))

    def init(key: jax.Array, inputs: PyTree) -> PyTree:
        params = model.init(key, inputs)
        lanes, _ = time_shape(Window(inputs))
        jax.eval_shape(
            lambda p, x: measured.unroll(p, initial_carry(p, lanes), x), params, inputs
        )  # raises what it would
        return params

    def read(
        params: PyTree, carry: ActivationCarry, window: Window, key: jax.Array | None
    ) -> tuple[ActivationCarry, PyTree]:
        lanes, time = time_shape(window)
        end, outputs = unroll_window(model, params, carry.model, window, key)
        activation = of(outputs)
        left = activation if dropped is None else dropped(outputs)
        for name, x in (("of", activation), ("dropped", left)):
            if getattr(x, "shape", None) != (lanes, time, units) or not jnp.issubdtype(x.dtype, jnp.floating):
                made = jax.tree.map(lambda x: f"{jnp.result_type(x)}{list(jnp.shape(x))}", x)
                raise ValueError(
                    f"`{name}` makes {made} of the model's outputs; it needs to make activations, real numbers "
                    f"[{lanes} lanes, {time} steps, {units} units]."
                )
        last, change = unroll_window(changes, (), carry[1:], window._replace(inputs=activation))
        return ActivationCarry(end, *last), {"outputs": outputs, "activation": left, "change": change}

    changes = from_step(_change, lambda key, inputs: (), nothing_before)
    measured = windowed(init, initial_carry, read, takes_key(model.unroll))
    return measured


def _change(params: PyTree, before: tuple, activation: jax.Array) -> tuple[tuple, jax.Array]:
    last, begun = before
    change = activation - last
    return (activation, jnp.ones_like(begun)), where_lanes(begun, change, jnp.zeros_like(change))


def activation_penalty(alpha: float = 2.0, beta: float = 1.0) -> Callable[[PyTree, Window], jax.Array]:
    """Activation regularisation (AR) and its temporal form (TAR): α·mean(a_t²) + β·mean((h_t − h_{t−1})²), means over units.

    Added to a loss, or one of a tree of losses, its mean is over the same scored steps, so that with α and β as in the paper it is
    what its authors' program computes, but for the edges of windows, over which they leave the change out. A step whose weight
    is 0 is not penalised: where only the last steps are scored, make it a loss of its own, with weights of its own.

    Args:
      alpha: of AR, 0 or more. The default is that of the authors' language models.
      beta: of TAR, likewise.

    Returns:
      ``(outputs, window) -> [lanes, time]``, of the outputs of :func:`with_activations`; at least float32.

    Raises:
      ValueError: now, if ``alpha`` or ``beta`` is not such a number; from the function returned, if the outputs are of another
        model.

    Reference: Merity, McCann & Socher 2017, *Revisiting activation regularization for language RNNs*, equations 1 and 2 (there
    as norms; their program, and this one, takes the mean of the squares).
    """
    for name, factor in (("alpha", alpha), ("beta", beta)):
        if not isinstance(factor, int | float) or not 0 <= factor < float("inf"):
            raise ValueError(f"`{name}` is {factor!r}; it needs to be a number, 0 or more.")

    def mean_square(x: jax.Array) -> jax.Array:
        return jnp.mean(x.astype(at_least_float32(x.dtype)) ** 2, -1)

    def penalty(outputs: PyTree, window: Window) -> jax.Array:
        if not isinstance(outputs, dict) or not {"activation", "change"} <= set(outputs):
            raise ValueError(
                "The outputs have no 'activation' and 'change': train `tb.with_activations(model, units, of=…)`, and evaluate "
                "a loss without the penalty by `model` itself."
            )
        return alpha * mean_square(outputs["activation"]) + beta * mean_square(outputs["change"])

    return penalty
