"""The gradient of a window: exact inside it, and across its left edge what an influence knows of the past.

dL_n/dθ  =  ∂L_n/∂θ  +  (∂L_n/∂h_n) · (∂h_n/∂θ)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tbptt_jax.influence import Influence, Linearisation, truncate
from tbptt_jax.recurrence import Recurrence
from tbptt_jax.window import Window, check, step_weights, time_shape, where_lanes

PyTree = Any
Loss = Callable[[PyTree, Window], Any]


class StreamState(NamedTuple):
    """What a stream carries from window to window besides the parameters.

    Attributes:
      carry: the model's state at the next window's left edge, every leaf ``[lanes, ...]``.
      influence: what the influence knows of how that carry came to depend on the parameters.
      key: the key from which random influences draw.
    """

    carry: PyTree
    influence: PyTree
    key: jax.Array


class Metrics(NamedTuple):
    """Attributes:
    loss: weighted mean over the scored steps, 0 where none is scored; a tree of them if the loss is a tree.
    weight: sum of the scored steps' weights.
    """

    loss: Any
    weight: jax.Array


class Estimate(NamedTuple):
    """A gradient estimator, as :func:`gradient` makes it.

    Attributes:
      init: ``(key, params, window) -> stream_state``, at the start of a stream with the window's lanes.
      update: ``(params, stream_state, window) -> (grads, stream_state, metrics)``; grads have the tree of params.
      model: the recurrence it differentiates.
    """

    init: Callable[[jax.Array, PyTree, Window], StreamState]
    update: Callable[[PyTree, StreamState, Window], tuple[PyTree, StreamState, Metrics]]
    model: Recurrence


def gradient(
    model: Recurrence, loss: Loss, *, influence: Influence | None = None, normaliser: float | None = None
) -> Estimate:
    """An estimator of the gradient of a stream's loss, one window at a time.

    Args:
      model: the recurrence.
      loss: ``(outputs, window) -> [lanes, time]``, the loss of each step, unweighted.
      influence: what is known of the past; default :func:`tbptt_jax.truncate`.
      normaliser: the gradient is that of ``sum(weights * loss) / normaliser``. None: the window's own total weight, so
        that each window's gradient is of a mean. A constant makes the sum over windows the gradient of the stream.

    Returns:
      The estimator's ``init`` and ``update``, which stand on their own in anybody's loop, under ``jit``, ``vmap`` and
      ``lax.scan``.

    Raises:
      ValueError: now, if the normaliser is not positive; from ``init`` and ``update``, before any compute, if the
        window's shapes, data or weights, the carry's lanes or the loss's shape are not as described.
    """
    influence = truncate() if influence is None else influence
    if normaliser is not None and not normaliser > 0:
        raise ValueError(f"`normaliser` is {normaliser}; it needs to be positive, or None for the window's own weight.")

    def init(key: jax.Array, params: PyTree, window: Window) -> StreamState:
        check(window)
        lanes, _ = time_shape(window)
        carry = model.initial_carry(params, lanes)
        return StreamState(carry, influence.init(params, carry), key)

    def update(params: PyTree, stream: StreamState, window: Window) -> tuple[PyTree, StreamState, Metrics]:
        check(window)

        def forward(params: PyTree, carry: PyTree) -> tuple[tuple[jax.Array, PyTree], Metrics]:
            carry, outputs = model.unroll(params, carry, window.inputs, window.resets, window.valid)
            metrics = weighted_mean(loss, outputs, window)
            scale = 1.0 if normaliser is None else metrics.weight / normaliser
            return (metrics.loss * scale, carry), metrics

        (total, carry), vjp, metrics = jax.vjp(forward, params, stream.carry, has_aux=True)
        nothing = jax.tree.map(jnp.zeros_like, carry)
        grads, at_left_edge = vjp((jnp.ones_like(total), nothing))
        past = influence.pullback(stream.influence, at_left_edge)
        grads = grads if past is None else jax.tree.map(jnp.add, grads, past)

        key, draw = jax.random.split(stream.key)
        linearisation = Linearisation(lambda cotangent: vjp((jnp.zeros_like(total), cotangent)))
        return grads, StreamState(carry, influence.push(stream.influence, linearisation, draw), key), metrics

    return Estimate(init, update, model)


def weighted_mean(loss: Loss, outputs: PyTree, window: Window) -> Metrics:
    """The mean of ``loss(outputs, window)``, an array ``[lanes, time]`` or a tree of them, over the scored steps.

    Raises:
      ValueError: if the loss has another shape.
    """
    shape = time_shape(window)
    weights = step_weights(window)
    if window.weights is not None or window.valid is not None:
        # A NaN in a target that is not scored would reach the gradient as 0 * NaN.
        zeros = jax.tree.map(jnp.zeros_like, window.targets)
        window = window._replace(targets=where_lanes(weights > 0, window.targets, zeros))
    per_step = loss(outputs, window)
    for leaf in jax.tree.leaves(per_step):
        if jnp.shape(leaf) != shape:
            raise ValueError(
                f"The loss has shape {list(jnp.shape(leaf))}; it needs one number for each lane and step, {list(shape)}: "
                "average over features inside it, and leave weights, lanes and time to `gradient`."
            )
    weight = weights.sum()

    def mean(x: jax.Array) -> jax.Array:
        scored = jnp.where(weights > 0, x, 0)
        return jnp.sum(scored * weights.astype(x.dtype)) / jnp.where(weight > 0, weight, 1).astype(x.dtype)

    return Metrics(jax.tree.map(mean, per_step), weight)
