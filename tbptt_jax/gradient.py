"""The gradient of a window: exact inside it, and across its left edge what an influence knows of the past.

dL_n/dθ  =  ∂L_n/∂θ  +  (∂L_n/∂h_n) · (∂h_n/∂θ)
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tbptt_jax.influence import Influence, Linearisation, truncate
from tbptt_jax.influence.influence import WindowVJP, window_vjp
from tbptt_jax.recurrence import Recurrence, unroll_window
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
      normaliser: what the sum of weighted losses is divided by; None: the window's own total weight.
    """

    init: Callable[[jax.Array, PyTree, Window], StreamState]
    update: Callable[[PyTree, StreamState, Window], tuple[PyTree, StreamState, Metrics]]
    model: Recurrence
    normaliser: float | None = None


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
      ValueError: now, if the model or the influence is none, or the normaliser is not positive; from ``init`` and
        ``update``, before any compute, if the window's shapes, data or weights, the carry's lanes or the loss's shape are
        not as described.
    """
    influence = truncate() if influence is None else influence
    if not isinstance(model, Recurrence):
        raise ValueError(
            f"`model` is {model!r}; it needs to be a Recurrence, as `from_linen`, `from_nnx`, `from_step` or `lstm` make."
        )
    if not isinstance(influence, Influence):
        raise ValueError(f"`influence` is {influence!r}; it needs to be an Influence, such as `truncate()`, called.")
    if normaliser is not None and not normaliser > 0:
        raise ValueError(f"`normaliser` is {normaliser}; it needs to be positive, or None for the window's own weight.")

    def init(key: jax.Array, params: PyTree, window: Window) -> StreamState:
        check(window)
        lanes, _ = time_shape(window)
        carry = model.initial_carry(params, lanes)
        if any(jnp.shape(h)[:1] != (lanes,) for h in jax.tree.leaves(carry)):
            shapes = jax.tree.map(lambda h: list(jnp.shape(h)), carry)
            raise ValueError(f"`initial_carry` made {shapes}; every array of it needs to be [{lanes} lanes, ...].")
        vjp = jax.eval_shape(through, params, carry, window)[1]
        return StreamState(carry, influence.init(params, _moving(carry), vjp), key)

    def update(params: PyTree, stream: StreamState, window: Window) -> tuple[PyTree, StreamState, Metrics]:
        check(window)
        (grads, at_left_edge), vjp, carry, metrics = through(params, stream.carry, window)
        past = influence.pullback(stream.influence, at_left_edge)
        if past is not None:
            grads = _add(grads, past)
        key, draw = jax.random.split(stream.key)
        linearisation = Linearisation(vjp, functools.partial(lane_vjp, params, stream.carry, window))
        return grads, StreamState(carry, influence.push(stream.influence, linearisation, draw), key), metrics

    @jax.jit  # one trace for `init` and `update`, wherever they are called, so that they agree on the residuals
    def through(params: PyTree, carry: PyTree, window: Window) -> tuple[tuple, WindowVJP, PyTree, Metrics]:
        """Forward once, and back from the loss: the gradient inside, the way back from the carry, the new carry."""

        def forward(params: PyTree, moving: PyTree) -> tuple[tuple, tuple]:
            end, outputs = unroll_window(model, params, _still(carry, moving), window)
            losses = step_losses(loss, outputs, window)
            if not isinstance(losses, jax.Array):
                raise ValueError(
                    f"The loss is a tree, {jax.tree.structure(losses)}; a gradient needs one array [lanes, time]. "
                    "Trees of figures are for `evaluate`."
                )
            if not jnp.issubdtype(losses.dtype, jnp.inexact):
                raise ValueError("The loss is of whole numbers, which have no gradient; it needs to be floating-point.")
            metrics = weighted_mean(losses, window)
            scale = 1.0 if normaliser is None else metrics.weight / normaliser
            return (metrics.loss * scale, _moving(end)), (end, metrics)

        (total, moving), vjp, (end, metrics) = jax.vjp(forward, params, _moving(carry), has_aux=True)
        no_loss = np.zeros((), total.dtype)
        from_carry = jax.tree_util.Partial(lambda vjp, cotangent: vjp((no_loss, cotangent)), vjp)
        inside = vjp((jnp.ones_like(total), jax.tree.map(jnp.zeros_like, moving)))
        return inside, window_vjp(from_carry, (model, loss, normaliser)), end, metrics

    def lane_vjp(params: PyTree, carry: PyTree, window: Window, carry_cotangent: PyTree) -> tuple[PyTree, PyTree]:
        """The way back from the carry, with parameters of its own for each lane."""
        lanes, _ = time_shape(window)

        def one_lane(params: PyTree, moving: PyTree, carry: PyTree, window: Window) -> PyTree:
            moving, carry, window = jax.tree.map(lambda x: x[None], (moving, carry, window))
            end, _ = unroll_window(model, params, _still(carry, moving), window)
            return jax.tree.map(lambda h: h[0], _moving(end))

        each = jax.tree.map(lambda p: jnp.broadcast_to(p, (lanes, *p.shape)), params)
        _, vjp = jax.vjp(lambda p, h: jax.vmap(one_lane)(p, h, carry, window), each, _moving(carry))
        return vjp(carry_cotangent)

    return Estimate(init, update, model, normaliser)


def _moving(carry: PyTree) -> PyTree:
    """The leaves that can be differentiated; a step counter cannot, and is None."""
    return jax.tree.map(lambda h: h if jnp.issubdtype(h.dtype, jnp.inexact) else None, carry)


def _still(carry: PyTree, moving: PyTree) -> PyTree:
    """``carry`` with its moving leaves replaced."""
    return jax.tree.map(lambda m, h: h if m is None else m, moving, carry, is_leaf=lambda x: x is None)


def _add(grads: PyTree, past: PyTree) -> PyTree:
    def shapes(tree: PyTree) -> Any:
        return jax.tree.structure(tree), [jnp.shape(x) for x in jax.tree.leaves(tree)]

    if shapes(past) != shapes(grads):
        has, needs = (jax.tree.map(lambda x: list(jnp.shape(x)), tree) for tree in (past, grads))
        raise ValueError(
            f"The influence's pullback returned {has}; it needs to return a gradient in the tree and shapes of the "
            f"parameters, {needs}, or None if nothing crosses the window's edge."
        )
    return jax.tree.map(lambda g, p: g + p.astype(g.dtype), grads, past)


def step_losses(loss: Loss, outputs: PyTree, window: Window) -> PyTree:
    """``loss(outputs, window)``, an array ``[lanes, time]`` or a tree of them, of data without what is not to be read.

    Raises:
      ValueError: if the loss has another shape.
    """
    # A NaN in what is not scored would reach the gradient as 0 * NaN.
    if window.weights is not None or window.valid is not None:
        zeros = jax.tree.map(jnp.zeros_like, window.targets)
        window = window._replace(targets=where_lanes(step_weights(window) > 0, window.targets, zeros))
    if window.valid is not None:
        zeros = jax.tree.map(jnp.zeros_like, window.inputs)
        window = window._replace(inputs=where_lanes(window.valid, window.inputs, zeros))
    losses = jax.tree.map(jnp.asarray, loss(outputs, window))
    shape = time_shape(window)
    for leaf in jax.tree.leaves(losses):
        if leaf.shape != shape:
            raise ValueError(
                f"The loss has shape {list(leaf.shape)}; it needs one number for each lane and step, {list(shape)}: "
                "average over features inside it, and leave weights, lanes and time to `gradient`."
            )
    return losses


def weighted_mean(losses: PyTree, window: Window) -> Metrics:
    """The means of ``losses``, arrays ``[lanes, time]``, over the scored steps of ``window``."""
    weights = step_weights(window)
    weight = weights.sum()

    def mean(x: jax.Array) -> jax.Array:
        x = x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(weights.dtype)  # a step was right, or not
        scored = jnp.where(weights > 0, x, 0)
        return jnp.sum(scored * weights.astype(x.dtype)) / jnp.where(weight > 0, weight, 1).astype(x.dtype)

    return Metrics(jax.tree.map(mean, losses), weight)
