"""The gradient of a window: exact inside it, and across its left edge what an influence knows of the past.

dL_n/dθ  =  ∂L_n/∂θ  +  (∂L_n/∂h_n) · (∂h_n/∂θ)
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tbptt_jax.arrays import at_least_float32, is_leaf, same_tree, where_lanes
from tbptt_jax.influence import Influence, Linearisation, truncate
from tbptt_jax.influence.influence import WindowVJP, window_vjp
from tbptt_jax.noise import is_key, window_keys
from tbptt_jax.ranges import check_ranges
from tbptt_jax.recurrence import Recurrence, check_carry, unroll_window
from tbptt_jax.step_by_step import quickly, some_numbers
from tbptt_jax.window import Window, check, is_scored, step_weights, time_shape

PyTree = Any
Loss = Callable[[PyTree, Window], Any]


class StreamState(NamedTuple):
    """What a stream carries from window to window besides the parameters.

    Attributes:
      carry: the model's state at the next window's left edge, every leaf ``[lanes, ...]``.
      influence: what the influence knows of how that carry came to depend on the parameters.
      key: the key from which models and random influences draw.
      fresh: ``[lanes]`` bool, the lanes that begin at the next window: of those whose carry is the initial one, the gradient
        flows into the parameters that it depends on, and nothing known of an earlier past into them. A carry put in their
        place, ``state._replace(carry=stored)``, is what it is.
    """

    carry: PyTree
    influence: PyTree
    key: jax.Array
    fresh: jax.Array


class Metrics(NamedTuple):
    """Attributes:
    loss: weighted mean over the scored steps, 0 where none is scored; a tree of them if the loss is a tree. At least
      float32.
    weight: sum of the scored steps' weights, at least float32; a tree of them if the weights are a tree.
    """

    loss: Any
    weight: Any


class Estimate(NamedTuple):
    """A gradient estimator, as :func:`gradient` makes it.

    Attributes:
      init: ``(key, params, window) -> stream_state``, at the start of a stream with the window's lanes.
      update: ``(params, stream_state, window) -> (grads, stream_state, metrics)``; grads have the tree of params.
      model: the recurrence it differentiates.
      loss: the loss of its steps.
      influence: what it knows of the past.
      normaliser: what the sum of weighted losses is divided by; None: the window's own total weight.
    """

    init: Callable[[jax.Array, PyTree, Window], StreamState]
    update: Callable[[PyTree, StreamState, Window], tuple[PyTree, StreamState, Metrics]]
    model: Recurrence
    loss: Loss
    influence: Influence
    normaliser: float | None = None


def gradient(
    model: Recurrence, loss: Loss, *, influence: Influence | None = None, normaliser: float | None = None
) -> Estimate:
    """An estimator of the gradient of a stream's loss, one window at a time.

    Args:
      model: the recurrence.
      loss: ``(outputs, window) -> [lanes, time]``, the loss of each step, unweighted; or a tree of such losses, whose means
        are added up. Where ``window.weights`` is a tree of the same shape each is averaged over weights of its own, as
        where of several targets some are missing.
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
    if normaliser is not None and not 0 < normaliser < float("inf"):
        raise ValueError(f"`normaliser` is {normaliser}; it needs to be positive, or None for the window's own weight.")

    def init(key: jax.Array, params: PyTree, window: Window) -> StreamState:
        check(window)
        lanes, _ = time_shape(window)
        carry = model.initial_carry(params, lanes)
        if any(jnp.shape(h)[:1] != (lanes,) for h in jax.tree.leaves(carry)):
            shapes = jax.tree.map(lambda h: list(jnp.shape(h)), carry)
            raise ValueError(f"`initial_carry` made {shapes}; every array of it needs to be [{lanes} lanes, ...].")
        fresh = jnp.ones(lanes, bool)
        vjp = jax.eval_shape(through, params, carry, fresh, window, window_keys(model.unroll, key, lanes))[1]
        return StreamState(carry, influence.init(as_real(params), differentiable(carry), vjp), key, fresh)

    def update(params: PyTree, stream: StreamState, window: Window) -> tuple[PyTree, StreamState, Metrics]:
        check(window)
        check_ranges(model, loss, params, window, ("lanes", "time"))
        keys = window_keys(model.unroll, stream.key, len(stream.fresh))
        (grads, at_left_edge), vjp, carry, metrics = through(params, stream.carry, stream.fresh, window, keys)
        past = influence.pullback(stream.influence, at_left_edge)
        if past is not None:
            grads = _add(grads, past)
        key, draw = jax.random.split(stream.key)
        linearisation = Linearisation(
            vjp, functools.partial(lane_vjp, params, stream.carry, stream.fresh, window, keys, vjp)
        )
        state = influence.push(stream.influence, linearisation, draw)
        grads = jax.tree.map(
            lambda g: g.conj() if jnp.iscomplexobj(g) else g, of_real(grads, params)
        )  # as jax.grad has it
        return grads, StreamState(carry, state, key, jnp.zeros_like(stream.fresh)), metrics

    @jax.jit  # one trace for `init` and `update`, wherever they are called, so that they agree on the residuals
    def through(
        params: PyTree, carry: PyTree, fresh: jax.Array, window: Window, keys: jax.Array | None
    ) -> tuple[tuple, WindowVJP, PyTree, Metrics]:
        """Forward once, and back from the loss: the gradient inside, the way back from the carry, the new carry."""

        def forward(numbers: PyTree, moving: PyTree) -> tuple[tuple, tuple]:
            own = of_real(numbers, params)
            start = _begun(model, own, of_real(moving, carry), fresh)
            end, outputs = unroll_window(model, own, start, window, keys)
            losses = step_losses(loss, outputs, window)
            for leaf in jax.tree.leaves(losses):
                if not jnp.issubdtype(leaf.dtype, jnp.floating):
                    raise ValueError(
                        f"The loss has dtype {leaf.dtype}, which has no gradient to go down by: it needs to be of real "
                        "floating-point numbers (of a complex error e, `jnp.abs(e) ** 2`)."
                    )
            metrics = weighted_mean(losses, window)
            return (objective(metrics, normaliser), differentiable(end)), (end, metrics)

        (total, moving), vjp, (end, metrics) = jax.vjp(forward, as_real(params), differentiable(carry), has_aux=True)
        no_loss = np.zeros((), total.dtype)
        from_carry = jax.tree_util.Partial(lambda vjp, cotangent: vjp((no_loss, cotangent)), vjp)
        inside = vjp((jnp.ones_like(total), jax.tree.map(jnp.zeros_like, moving)))
        return inside, window_vjp(from_carry, (model, loss, normaliser)), end, metrics

    def lane_vjp(
        params: PyTree,
        carry: PyTree,
        fresh: jax.Array,
        window: Window,
        keys: jax.Array | None,
        vjp: WindowVJP,
        carry_cotangent: PyTree,
    ) -> tuple[PyTree, PyTree]:
        """The way back from the carry, with parameters of its own for each lane."""
        lanes, _ = time_shape(window)
        if not lanes_read_alone(model, params, window):
            # The whole window once more for each lane: its draws are those that were made.
            zeros = jax.tree.map(jnp.zeros_like, carry_cotangent)
            each = jax.vmap(lambda lane: vjp(where_lanes(lane == jnp.arange(lanes), carry_cotangent, zeros)))
            of_params, of_carry = each(jnp.arange(lanes))
            return of_params, jax.tree.map(lambda h: h.sum(0), of_carry)

        def one_lane(numbers: PyTree, moving: PyTree, *rest: PyTree) -> PyTree:
            moving, carry, fresh, window, keys = jax.tree.map(lambda x: x[None], (moving, *rest))
            own = of_real(numbers, params)
            start = _begun(model, own, of_real(moving, carry), fresh)
            end, _ = unroll_window(model, own, start, window, keys)
            return jax.tree.map(lambda h: h[0], differentiable(end))

        copies = jax.tree.map(lambda p: jnp.broadcast_to(p, (lanes, *p.shape)), as_real(params))
        _, back = jax.vjp(
            lambda p, h: jax.vmap(one_lane)(p, h, carry, fresh, window, keys), copies, differentiable(carry)
        )
        return back(carry_cotangent)

    return Estimate(init, update, model, loss, influence, normaliser)


def objective(metrics: Metrics, normaliser: float | None) -> jax.Array:
    """What is gone down by: the losses' means, each of its own weight, or their sums over a constant; added up."""
    weights = of_each(metrics.weight, metrics.loss)
    scaled = jax.tree.map(lambda x, w: x if normaliser is None else x * (w / normaliser), metrics.loss, weights)
    return functools.reduce(jnp.add, jax.tree.leaves(scaled))


def window_objective(estimate: Estimate, params: PyTree, stream: StreamState, window: Window) -> jax.Array:
    """The objective of a window at other parameters, read from the same carry with the same draws."""
    start = _begun(estimate.model, params, stream.carry, stream.fresh)
    keys = window_keys(estimate.model.unroll, stream.key, len(stream.fresh))
    _, outputs = unroll_window(estimate.model, params, start, window, keys)
    return objective(weighted_mean(step_losses(estimate.loss, outputs, window), window), estimate.normaliser)


def _begun(model: Recurrence, params: PyTree, carry: PyTree, fresh: jax.Array) -> PyTree:
    """The initial carry, as the parameters make it, where a lane is fresh; a carry that was put in its place stays.

    Compared to half of a number's digits: two programs need not round alike.
    """
    start = model.initial_carry(params, len(fresh))
    check_carry(carry, start, len(fresh))

    def near(h: jax.Array, s: jax.Array) -> jax.Array:
        if not jnp.issubdtype(h.dtype, jnp.inexact):
            return fresh
        apart = jnp.abs(lax.stop_gradient(h - s)) <= jnp.finfo(h.dtype).eps ** 0.5 * (1 + jnp.abs(lax.stop_gradient(s)))
        return apart.reshape(len(fresh), -1).all(1)

    same = functools.reduce(jnp.logical_and, jax.tree.leaves(jax.tree.map(near, carry, start)), fresh)
    begun = where_lanes(same, start, carry)
    # What passes no gradient, such as a key, is the lane's own: a lane that is read alone is the first one to `initial_carry`.
    return jax.tree.map(lambda b, h: b if jnp.issubdtype(h.dtype, jnp.inexact) else h, begun, carry)


def as_real(tree: PyTree) -> PyTree:
    """Complex leaves ``[...]`` as pairs of real numbers, ``[..., 2]``: what influences see and add up."""
    return jax.tree.map(lambda x: jnp.stack([x.real, x.imag], -1) if jnp.iscomplexobj(x) else x, tree)


def of_real(numbers: PyTree, like: PyTree) -> PyTree:
    """A tree from its real view; where that is None, the leaf of ``like``."""

    def leaf(n: jax.Array | None, x: jax.Array) -> jax.Array:
        if n is None:
            return x
        return lax.complex(n[..., 0], n[..., 1]) if jnp.iscomplexobj(x) else n

    return jax.tree.map(leaf, numbers, like, is_leaf=lambda x: x is None)


def differentiable(carry: PyTree) -> PyTree:
    """The leaves that can be differentiated, as real numbers; a step counter cannot, and is None."""
    return as_real(jax.tree.map(lambda h: h if jnp.issubdtype(h.dtype, jnp.inexact) else None, carry))


def lanes_read_alone(model: Recurrence, params: PyTree, window: Window) -> bool:
    """Whether a lane that is read alone goes the way it goes beside others; found out on a few numbers.

    Not so where a model makes one draw for all lanes from a key of its own, or where a lane's initial carry depends on its number.

    Raises:
      ValueError: if what a lane does depends on what another reads.
    """
    leaves, tree = jax.tree.flatten((params, window.inputs))
    return _read_alone(model, tree, tuple((jnp.shape(x), x.dtype) for x in leaves))


@functools.lru_cache(maxsize=256)
def _read_alone(model: Recurrence, tree: Any, shapes: tuple) -> bool:
    rng = np.random.default_rng(0)
    params, inputs = jax.tree.unflatten(tree, [jax.ShapeDtypeStruct(*shape) for shape in shapes])
    resets = np.array([[False, False, False], [False, True, False]])

    @quickly
    def end(params: PyTree, carry: PyTree, inputs: PyTree, resets: jax.Array, keys: jax.Array | None) -> PyTree:
        return differentiable(unroll_window(model, params, carry, Window(inputs, resets=resets), keys)[0])

    def same(one: PyTree, other: PyTree) -> bool:
        pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
        ends = ((np.asarray(x)[-1].astype(float) for x in pair) for pair in pairs)
        return all(np.allclose(a, b, 1e-3, 1e-5, equal_nan=True) for a, b in ends)

    with jax.ensure_compile_time_eval():
        some = functools.partial(jax.tree.map, lambda x: some_numbers(rng, x.shape, x.dtype))
        params = some(params)
        first, others = (
            some(jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, 3, *x.shape[2:]), x.dtype), inputs)) for _ in "ab"
        )
        start = model.initial_carry(params, 2)
        # What NumPy does here, JAX would compile.
        moving = jax.tree.map(np.asarray, differentiable(start))
        moving = jax.tree.map(lambda h: h + rng.uniform(-0.5, 0.5, h.shape).astype(h.dtype), moving)
        higher = jax.tree.map(lambda h: np.concatenate([h[:1] + np.ones((), h.dtype), h[1:]]), moving)
        carry, another = (of_real(h, start) for h in (moving, higher))
        beside = jax.tree.map(
            lambda x, y: x if is_key(x) else np.concatenate([np.asarray(y)[:1], np.asarray(x)[1:]]), first, others
        )
        last = functools.partial(jax.tree.map, lambda x: x[1:])
        keys = window_keys(model.unroll, jax.random.key(0), 2)
        whole = end(params, carry, first, resets, keys)
        if not same(whole, end(params, another, beside, resets, keys)):
            raise ValueError(
                "What a lane carries changes with what another lane reads, as where a model takes a mean over its lanes. This "
                "influence needs what each lane knows by itself: use `truncate()` or `replay(m)`, or keep the lanes apart."
            )
        return same(whole, end(params, last(carry), last(first), resets[1:], last(keys)))


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
      ValueError: if the loss has another shape, or the window's weights are a tree of another.
    """
    # A NaN in what is not scored would reach the gradient as 0 * NaN.
    if window.weights is not None or window.valid is not None:
        zeros = jax.tree.map(jnp.zeros_like, window.targets)
        if same_tree(window.weights, window.targets):  # each target has its own
            scored = jax.tree.map(lambda w: w > 0, step_weights(window))
            targets = jax.tree.map(where_lanes, scored, window.targets, zeros)
        else:
            targets = where_lanes(is_scored(window), window.targets, zeros)
        window = window._replace(targets=targets)
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
    if not jax.tree.leaves(losses):
        raise ValueError("The loss is a tree without an array; it needs one number for each lane and step.")
    if not (window.weights is None or is_leaf(window.weights) or same_tree(window.weights, losses)):
        raise ValueError(
            f"`weights` is the tree {jax.tree.structure(window.weights)}, and the loss {jax.tree.structure(losses)}: give "
            "weights in the shape of the loss, or one array for all of it."
        )
    return losses


def of_each(weight: PyTree, losses: PyTree) -> PyTree:
    """The weights of each loss, in the tree of the losses."""
    return jax.tree.map(lambda _: weight, losses) if is_leaf(weight) else weight


def weighted_mean(losses: PyTree, window: Window) -> Metrics:
    """The means of ``losses``, arrays ``[lanes, time]``, over the scored steps of ``window``, each over its own weights."""
    weights = step_weights(window)
    return Metrics(mean_of(losses, of_each(weights, losses)), jax.tree.map(jnp.sum, weights))


def mean_of(losses: PyTree, weights: PyTree) -> PyTree:
    """The weighted mean of each array of a tree, in at least float32; 0 where nothing is scored."""

    def mean(x: jax.Array, w: jax.Array) -> jax.Array:
        # That a step was right, or not, is a number too.
        x = x.astype(at_least_float32(x.dtype if jnp.issubdtype(x.dtype, jnp.inexact) else w.dtype))
        weight = w.sum()
        return jnp.sum(jnp.where(w > 0, x, 0) * w.astype(x.dtype)) / jnp.where(weight > 0, weight, 1).astype(x.dtype)

    return jax.tree.map(mean, losses, weights)
