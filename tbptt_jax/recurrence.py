"""Recurrences: a model as three pure functions, whatever library its cell was written in.

    init(key, inputs)                               -> params
    initial_carry(params, lanes)                    -> carry                 every leaf [lanes, ...]
    unroll(params, carry, inputs, resets, valid)    -> (carry, outputs)      inputs, outputs [lanes, time, ...]

``unroll`` is one ``lax.scan`` over time. A lane whose ``resets`` is True returns to the initial carry before the step is
consumed, or skipped; where ``valid`` is False the carry stands still, and what the padding holds, NaN included, changes
nothing.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from tbptt_jax.window import Window, check_whole, time_shape, where_lanes

PyTree = Any
Segment = int | Literal["sqrt"] | None


class Recurrence(NamedTuple):
    """A stateful model as pure functions.

    Attributes:
      init: ``(key, inputs [lanes, time, ...]) -> params``.
      initial_carry: ``(params, lanes) -> carry``, every leaf ``[lanes, ...]``. It may depend on the parameters: then
        the initial carry is learned.
      unroll: ``(params, carry, inputs, resets=None, valid=None, edges=None) -> (carry, outputs)`` with inputs and outputs
        ``[lanes, time, ...]``, resets and valid ``[lanes, time]`` bool, edges ``[lanes, time]`` float. A model
        without use for ``edges`` need not take them: they are passed only where there are some.
    """

    init: Callable[..., PyTree]
    initial_carry: Callable[..., PyTree]
    unroll: Callable[..., tuple[PyTree, PyTree]]


def from_step(
    step: Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree]],
    init: Callable[[jax.Array, PyTree], PyTree],
    initial_carry: Callable[[PyTree, int], PyTree],
    *,
    encoder: Callable[[PyTree, PyTree], PyTree] | None = None,
    readout: Callable[[PyTree, PyTree], PyTree] | None = None,
    checkpoint: Segment = None,
) -> Recurrence:
    """A recurrence from the pure function of one step.

    Args:
      step: ``(params, carry, x [lanes, ...]) -> (carry, y [lanes, ...])``.
      init: ``(key, inputs [lanes, time, ...]) -> params``.
      initial_carry: ``(params, lanes) -> carry``, every leaf ``[lanes, ...]``.
      encoder: ``(params, inputs [lanes, time, ...]) -> x [lanes, time, ...]``: what has no state and comes before the
        step is done for all steps at once.
      readout: ``(params, y [lanes, time, ...]) -> outputs [lanes, time, ...]``, likewise after it.
      checkpoint: keep only the carry at every so many steps for the backward pass and compute the rest again: the
        memory of T steps falls to that of T / checkpoint carries and one segment, for one more forward pass.
        ``"sqrt"`` takes ceil(sqrt(T)), the least memory (Chen et al. 2016, *Training deep nets with sublinear memory
        cost*). None keeps everything.

    Raises:
      ValueError: from ``unroll``, when it is traced, if the carry does not fit the inputs' lanes, or the step returns
        another carry than it was given.
    """

    def scan(params: PyTree, carry: PyTree, x: PyTree, *masks: jax.Array | None) -> tuple[PyTree, PyTree]:
        start = initial_carry(params, jax.tree.leaves(x)[0].shape[0])

        def one_step(carry: PyTree, at_t: tuple) -> tuple[PyTree, PyTree]:
            x, reset, is_valid, edge = at_t
            if edge is not None:
                carry = scale_cotangent(edge, carry)
            if reset is not None:
                carry = where_lanes(reset, start, carry)
            new, y = step(params, carry, x)
            new = _as_given(new, carry)
            return (new if is_valid is None else where_lanes(is_valid, new, carry)), y

        carry, y = lax.scan(one_step, carry, jax.tree.map(_swap, (x, *masks)))
        return carry, jax.tree.map(_swap, y)

    return recurrence(init, initial_carry, scan, encoder, readout, checkpoint)


def recurrence(
    init: Callable[..., PyTree],
    initial_carry: Callable[..., PyTree],
    scan: Callable[..., tuple[PyTree, PyTree]],
    encoder: Callable[[PyTree, PyTree], PyTree] | None,
    readout: Callable[[PyTree, PyTree], PyTree] | None,
    checkpoint: Segment,
) -> Recurrence:
    """``encoder`` → ``scan`` → ``readout``, over a whole window at a time or in segments of it.

    ``scan`` is ``(params, carry, x, resets, valid, edges) -> (carry, y)``, x and y ``[lanes, time, ...]``; the others are as
    for :func:`from_step`.
    """

    def unroll(
        params: PyTree,
        carry: PyTree,
        inputs: PyTree,
        resets: jax.Array | None = None,
        valid: jax.Array | None = None,
        edges: jax.Array | None = None,
    ) -> tuple[PyTree, PyTree]:
        lanes, time = time_shape(Window(inputs, resets=resets, valid=valid, edges=edges))
        check_carry(carry, jax.eval_shape(lambda p: initial_carry(p, lanes), params), lanes)

        def segment(carry: PyTree, per_step: tuple) -> tuple[PyTree, PyTree]:
            x, *masks = per_step
            if (valid := masks[1]) is not None:  # a NaN in the padding would reach the gradient as 0 * NaN
                x = where_lanes(valid, x, jax.tree.map(jnp.zeros_like, x))
            x = x if encoder is None else encoder(params, x)
            carry, y = scan(params, carry, x, *masks)
            return carry, (y if readout is None else readout(params, y))

        return in_segments(segment, carry, (inputs, resets, valid, edges), time, checkpoint)

    return Recurrence(init, initial_carry, unroll)


def from_linen(
    cell: nn.RNNCellBase,
    *,
    encoder: nn.Module | None = None,
    readout: nn.Module | None = None,
    input_shape: tuple[int, ...] = (1,),
    checkpoint: Segment = None,
) -> Recurrence:
    """A recurrence from Flax Linen: ``encoder`` → ``cell`` over time → ``readout``.

    Modules keep parameters and nothing else: what changes from step to step is the carry.

    Args:
      cell: any ``nn.RNNCellBase``. Its parameters become ``params["cell"]``.
      encoder: a module without state, called on ``[lanes, time, ...]``, for all steps at once; ``params["encoder"]``.
      readout: likewise, called on the cell's outputs; ``params["readout"]``.
      input_shape: shape of one lane's input to the cell at one step. Only cells whose carry has spatial axes, such as
        ``nn.ConvLSTMCell``, read it.
      checkpoint: see :func:`from_step`.

    Raises:
      ValueError: now, if ``cell`` is no cell; from ``init``, if the inputs are not ``[lanes, time, ...]`` or a module has
        variables besides its parameters, such as batch statistics; from ``unroll``, as :func:`from_step`, and if
        ``checkpoint`` is not as described.
    """
    if not isinstance(cell, nn.RNNCellBase):
        raise ValueError(
            f"`cell` is {cell!r}; it needs to be an RNN cell of Flax Linen, such as `nn.OptimizedLSTMCell(64)`."
        )

    def init(key: jax.Array, inputs: PyTree) -> PyTree:
        lanes, _ = time_shape(Window(inputs))
        keys = jax.random.split(key, 3)
        params, x = {}, inputs
        if encoder is not None:
            x, params["encoder"] = encoder.init_with_output(keys[0], x)
        x_t = jax.tree.map(lambda x: x[:, 0], x)
        (_, y_t), params["cell"] = cell.init_with_output(keys[1], initial_carry(params, lanes), x_t)
        if readout is not None:
            params["readout"] = readout.init(keys[2], jax.tree.map(lambda y: y[:, None], y_t))
        for name, variables in params.items():
            if others := sorted(set(variables) - {"params"}):
                raise ValueError(
                    f"The {name} holds variables besides its parameters: {others}. A recurrence keeps state only in its "
                    "carry: give a module with parameters alone."
                )
        return params

    def initial_carry(params: PyTree, lanes: int) -> PyTree:
        del params
        return cell.initialize_carry(jax.random.key(0), (lanes, *input_shape))

    return from_step(
        lambda params, carry, x: cell.apply(params["cell"], carry, x),
        init,
        initial_carry,
        encoder=encoder and (lambda params, x: encoder.apply(params["encoder"], x)),
        readout=readout and (lambda params, y: readout.apply(params["readout"], y)),
        checkpoint=checkpoint,
    )


def from_nnx(
    cell: Callable[[nnx.Rngs], nnx.Module] | nnx.Module,
    *,
    encoder: Callable[[nnx.Rngs], nnx.Module] | nnx.Module | None = None,
    readout: Callable[[nnx.Rngs], nnx.Module] | nnx.Module | None = None,
    input_shape: tuple[int, ...] = (1,),
    checkpoint: Segment = None,
) -> Recurrence:
    """A recurrence from Flax NNX: ``encoder`` → ``cell`` over time → ``readout``.

    Each part is a function ``rngs -> module``, such as ``lambda rngs: nnx.OptimizedLSTMCell(3, 64, rngs=rngs)``, and is
    initialised from ``init``'s key; or a module, whose own parameters are then the initial ones, whatever the key.

    Args:
      cell: an ``nnx`` RNN cell, ``(carry, x [lanes, ...]) -> (carry, y [lanes, ...])``; ``params["cell"]`` holds its
        ``nnx.Param`` state.
      encoder: a module without state, called on ``[lanes, time, ...]``.
      readout: likewise, called on the cell's outputs.
      input_shape: as in :func:`from_linen`.
      checkpoint: see :func:`from_step`.

    Raises:
      ValueError: now, if a part is a class, or its module holds variables other than ``nnx.Param`` (dropout keys, batch
        statistics): they would change from step to step outside the carry; from ``unroll``, as :func:`from_step`, and if
        ``checkpoint`` is not as described.
    """
    given = {"encoder": encoder, "cell": cell, "readout": readout}
    parts = {name: _divide(name, part) for name, part in given.items() if part is not None}

    def init(key: jax.Array, inputs: PyTree) -> PyTree:
        del inputs  # NNX modules are told their sizes
        keys = dict(zip(given, jax.random.split(key, 3), strict=True))
        return {name: initial(keys[name]) for name, (_, initial) in parts.items()}

    def initial_carry(params: PyTree, lanes: int) -> PyTree:
        module = nnx.merge(parts["cell"][0], params["cell"])
        return module.initialize_carry((lanes, *input_shape), nnx.Rngs(0))

    def apply(name: str) -> Callable[..., PyTree]:
        return lambda params, *args: nnx.merge(parts[name][0], params[name])(*args)

    return from_step(
        apply("cell"),
        init,
        initial_carry,
        encoder=apply("encoder") if "encoder" in parts else None,
        readout=apply("readout") if "readout" in parts else None,
        checkpoint=checkpoint,
    )


def stack(*layers: Recurrence) -> Recurrence:
    """Layers on top of each other: the outputs of each are the inputs of the next.

    Params and carry are tuples, one entry a layer. Each layer runs over the whole window before the next begins; resets
    and padding reach them all.

    Args:
      *layers: the first, which is given the window's inputs ``[lanes, time, ...]``, to the last; at least one.

    Raises:
      ValueError: now, if there is no layer or one is no Recurrence; from ``init`` and ``unroll``, if the inputs are not
        ``[lanes, time, ...]``; from ``unroll``, if the carry does not fit their lanes; and what the layers raise.
    """
    if not layers or not all(isinstance(layer, Recurrence) for layer in layers):
        raise ValueError(
            f"`stack` was given {layers}; it needs recurrences one after another, `stack(first, second)`, at least one."
        )

    def init(key: jax.Array, inputs: PyTree) -> PyTree:
        lanes, _ = time_shape(Window(inputs))
        params = []
        for layer, layer_key in zip(layers, jax.random.split(key, len(layers)), strict=True):
            params.append(layer.init(layer_key, inputs))
            shapes = jax.eval_shape(
                lambda p, x, layer=layer: layer.unroll(p, layer.initial_carry(p, lanes), x)[1], params[-1], inputs
            )
            inputs = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return tuple(params)

    def initial_carry(params: PyTree, lanes: int) -> PyTree:
        return tuple(layer.initial_carry(p, lanes) for layer, p in zip(layers, params, strict=True))

    def unroll(
        params: PyTree,
        carry: PyTree,
        inputs: PyTree,
        resets: jax.Array | None = None,
        valid: jax.Array | None = None,
        edges: jax.Array | None = None,
    ) -> tuple[PyTree, PyTree]:
        lanes, _ = time_shape(Window(inputs, resets=resets, valid=valid, edges=edges))
        check_carry(carry, jax.eval_shape(lambda p: initial_carry(p, lanes), params), lanes)
        carries = []
        for layer, p, c in zip(layers, params, carry, strict=True):
            c, inputs = unroll_window(layer, p, c, Window(inputs, resets=resets, valid=valid, edges=edges))
            carries.append(c)
        return tuple(carries), inputs

    return Recurrence(init, initial_carry, unroll)


def check_carry(carry: PyTree, expected: PyTree, lanes: int) -> None:
    """Raises a ``ValueError`` unless ``carry`` has the tree, shapes and dtypes of the initial carry for ``lanes``."""

    def describe(tree: PyTree) -> tuple:
        return jax.tree.structure(tree), [(x.shape, jnp.dtype(x.dtype)) for x in jax.tree.leaves(tree)]

    if describe(carry) == describe(expected):
        return
    has, needs = (jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", tree) for tree in (carry, expected))
    raise ValueError(
        f"The carry does not fit this window of {lanes} lanes: it is {has}, and needs to be {needs}. A carry belongs to "
        "the lanes it was made for; begin another number of lanes with `initial_carry(params, lanes)`."
    )


def _as_given(new: PyTree, carry: PyTree) -> PyTree:
    """A step's new carry in the dtypes of the one before: bfloat16 compute, float32 carry."""

    def describe(tree: PyTree) -> tuple:
        kinds = jnp.inexact, jnp.integer, jnp.bool_
        leaves = [
            (jnp.shape(x), [jnp.issubdtype(jnp.result_type(x), kind) for kind in kinds]) for x in jax.tree.leaves(tree)
        ]
        return jax.tree.structure(tree), leaves

    if describe(new) != describe(carry):
        returned, given = (
            jax.tree.map(lambda x: f"{jnp.result_type(x)}{list(jnp.shape(x))}", tree) for tree in (new, carry)
        )
        raise ValueError(
            f"`step` was given the carry {given} and returned {returned}: it needs to return (carry, y), the carry in the "
            "same tree, shapes and kinds of number, as `initial_carry` makes it."
        )
    return jax.tree.map(lambda n, c: jnp.asarray(n, c.dtype), new, carry)


def rematerialised(model: Recurrence, checkpoint: Segment) -> Recurrence:
    """The same recurrence, unrolled in segments as :func:`from_step` does with ``checkpoint``."""

    def unroll(params: PyTree, carry: PyTree, inputs: PyTree, *masks: jax.Array | None, **edges: jax.Array) -> tuple:
        _, time = time_shape(Window(inputs))

        def segment(carry: PyTree, per_step: tuple) -> tuple[PyTree, PyTree]:
            inputs, masks, edges = per_step
            return model.unroll(params, carry, inputs, *masks, **edges)

        return in_segments(segment, carry, (inputs, masks, edges), time, checkpoint)

    return model._replace(unroll=unroll)


def unroll_window(model: Recurrence, params: PyTree, carry: PyTree, window: Window) -> tuple[PyTree, PyTree]:
    """``model.unroll`` over a window: ``(carry, outputs [lanes, time, ...])``."""
    edges = {} if window.edges is None else {"edges": window.edges}
    return model.unroll(params, carry, window.inputs, window.resets, window.valid, **edges)


def scale_cotangent(scale: jax.Array, tree: PyTree) -> PyTree:
    """The same values; what goes back through them is multiplied by ``scale`` ``[lanes]``."""

    def leaf(x: jax.Array) -> jax.Array:
        still = lax.stop_gradient(x)
        return still + scale.reshape(scale.shape + (1,) * (x.ndim - 1)).astype(x.dtype) * (x - still)

    return jax.tree.map(lambda x: leaf(x) if jnp.issubdtype(x.dtype, jnp.inexact) else x, tree)


def in_segments(segment: Callable, carry: PyTree, per_step: PyTree, time: int, checkpoint: Segment) -> tuple:
    """Scans ``segment`` over stretches of time, keeping for the backward pass only the carry between them."""
    if checkpoint is None:
        return segment(carry, per_step)
    length = math.isqrt(time - 1) + 1 if checkpoint == "sqrt" else checkpoint
    if isinstance(length, str):
        raise ValueError(f"`checkpoint` is {checkpoint!r}; it needs a segment's length in steps, or 'sqrt'.")
    check_whole("checkpoint", length)
    whole = time // length
    rematerialised = jax.checkpoint(segment, prevent_cse=False)

    def fold(x: jax.Array) -> jax.Array:
        x = x[:, : whole * length]
        return x.reshape(x.shape[0], whole, length, *x.shape[2:]).swapaxes(0, 1)

    def unfold(y: jax.Array) -> jax.Array:
        y = y.swapaxes(0, 1)
        return y.reshape(y.shape[0], whole * length, *y.shape[3:])

    parts = []
    if whole:
        carry, y = lax.scan(rematerialised, carry, jax.tree.map(fold, per_step))
        parts.append(jax.tree.map(unfold, y))
    if time % length:
        carry, y = rematerialised(carry, jax.tree.map(lambda x: x[:, whole * length :], per_step))
        parts.append(y)
    return carry, jax.tree.map(lambda *y: jnp.concatenate(y, 1), *parts)


def _divide(name: str, part: Callable[[nnx.Rngs], nnx.Module] | nnx.Module) -> tuple[nnx.GraphDef, Callable]:
    """An NNX module as its static graph and a function ``key -> params``."""

    def split(module: nnx.Module) -> tuple[Any, PyTree]:
        parts: Any = nnx.split(module, nnx.Param, ...)
        graph, params, rest = parts
        if jax.tree.leaves(rest):
            raise ValueError(
                f"The {name} holds variables besides its parameters: {list(nnx.to_flat_state(rest).paths)}. A recurrence "
                "keeps state only in its carry: give a module whose variables are all nnx.Param."
            )
        return graph, params

    if isinstance(part, type):
        raise ValueError(
            f"The {name} is the class {part.__name__}; give a module, or a function of `rngs` that makes one, such as "
            f"`lambda rngs: {part.__name__}(2, 64, rngs=rngs)`."
        )
    if isinstance(part, nnx.Module):
        graph, params = split(part)
        return graph, lambda key: jax.tree.map(jnp.copy, params)  # copies: a train step donates what it is given
    graph, _ = split(nnx.eval_shape(lambda: part(nnx.Rngs(0))))
    return graph, lambda key: split(part(nnx.Rngs(key)))[1]


def _swap(x: jax.Array) -> jax.Array:
    return x.swapaxes(0, 1)
