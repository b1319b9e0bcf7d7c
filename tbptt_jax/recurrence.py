"""Recurrences: a model as three pure functions, whatever library its cell was written in.

    init(key, inputs)                                    -> params
    initial_carry(params, lanes)                         -> carry            every leaf [lanes, ...]
    unroll(params, carry, inputs, resets, valid, key=…)  -> (carry, outputs) inputs, outputs [lanes, time, ...]

``unroll`` is one ``lax.scan`` over time. A lane whose ``resets`` is True returns to the initial carry before the step is
consumed, or skipped; where ``valid`` is False the carry stands still, and what the padding holds, NaN included, changes
nothing. With keys, as in training, a model may draw, such as dropout its masks; without, it is deterministic.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tbptt_jax.arrays import PyTree, quoted, where_lanes
from tbptt_jax.begin import Begun, first_steps, starts_of
from tbptt_jax.noise import Keys, check_key, drawing, fold_in, is_key, of_part, step_keys, takes_key
from tbptt_jax.rematerialise import Segment, in_segments
from tbptt_jax.step_by_step import check_function, check_step_by_step
from tbptt_jax.window import Window, time_shape

Draw = Literal["window", "step"]


class Recurrence(NamedTuple):
    """A stateful model as pure functions.

    Attributes:
      init: ``(key, inputs [lanes, time, ...]) -> params``.
      initial_carry: ``(params, lanes) -> carry``, every leaf ``[lanes, ...]``. It may depend on the parameters: then
        the initial carry is learned.
      unroll: ``(params, carry, inputs, resets=None, valid=None, edges=None, key=None) -> (carry, outputs)`` with inputs and
        outputs ``[lanes, time, ...]``, resets and valid ``[lanes, time]`` bool, edges ``[lanes, time]`` float, key
        ``[lanes]``, a key of each lane for this window. A model without use for ``edges`` or ``key`` need not take them:
        edges are passed where there are some, and a key where the model is trained. What a lane draws must come from its own
        key, or :func:`tbptt_jax.noise.shared`; keys for parts are :func:`tbptt_jax.noise.fold_in`.
    """

    init: Callable[..., PyTree]
    initial_carry: Callable[..., PyTree]
    unroll: Callable[..., tuple[PyTree, PyTree]]


def from_step(
    step: Callable[..., tuple[PyTree, PyTree]],
    init: Callable[[jax.Array, PyTree], PyTree],
    initial_carry: Callable[[PyTree, int], PyTree],
    *,
    encoder: Callable[..., PyTree] | None = None,
    readout: Callable[..., PyTree] | None = None,
    begin: Callable[[PyTree, PyTree], PyTree] | None = None,
    draw: Draw = "window",
    checkpoint: Segment = None,
) -> Recurrence:
    """A recurrence from the pure function of one step.

    Functions that take a ``key`` are given one in training, a key for each lane, and None elsewhere.

    Args:
      step: ``(params, carry, x [lanes, ...]) -> (carry, y [lanes, ...])``, and ``key [lanes]`` if it takes one.
      init: ``(key, inputs [lanes, time, ...]) -> params``.
      initial_carry: ``(params, lanes) -> carry``, every leaf ``[lanes, ...]``. A reset leaves a typed key in it as it is.
      encoder: ``(params, inputs [lanes, time, ...]) -> x [lanes, time, ...]``: what has no state and comes before the
        step is done for all steps at once.
      readout: ``(params, y [lanes, time, ...]) -> outputs [lanes, time, ...]``, likewise after it.
      begin: ``(params, x [lanes, ...]) -> carry``: what a lane begins from, of the inputs of its first valid step, such as the
        features of a sequence that do not change; the carry then also knows which lanes have not begun. None: from
        ``initial_carry``, which else only says the carry's shapes.
      draw: ``"window"``: the keys are those of the window, the same at each step, so that a mask is drawn once a window and
        held (Gal & Ghahramani 2016). ``"step"``: each step has its own, and encoder and readout are given ``[lanes, time]``.
      checkpoint: keep only the carry at every so many steps for the backward pass and compute the rest again: the
        memory of T steps falls to that of T / checkpoint carries and one segment, for one more forward pass.
        ``"sqrt"`` takes ceil(sqrt(T)), the least memory (Chen et al. 2016, *Training deep nets with sublinear memory
        cost*). A tuple, the longest first, has segments within segments: ``(64, 8)`` keeps T / 64 + 64 / 8 carries and one
        segment of 8 steps, for two more forward passes. None keeps everything.

    Raises:
      ValueError: from ``init``, if the encoder or the readout does not read each step of each lane by itself; from
        ``unroll``, when it is traced, if the carry does not fit the inputs' lanes, or the step returns another carry than it
        was given.
    """

    call = takes_key(step)

    def scan(
        params: PyTree, carry: PyTree, x: PyTree, *masks: jax.Array | None, starts: PyTree, keys: Keys
    ) -> tuple[PyTree, PyTree]:
        always = initial_carry(params, jax.tree.leaves(x)[0].shape[0])

        def one_step(carry: PyTree, x_and_key: tuple) -> tuple[PyTree, PyTree]:
            x, key = x_and_key
            key = keys.window if draw == "window" else key
            return step(params, carry, x, key=key) if call else step(params, carry, x)

        each = keys.step if call and draw == "step" else None
        return over_steps(one_step, carry, (x, each), *masks, always=always, starts=starts)

    return recurrence(init, initial_carry, drawing(scan, call), encoder, readout, checkpoint, draw, begin)


def recurrence(
    init: Callable[..., PyTree],
    initial_carry: Callable[..., PyTree],
    scan: Callable[..., tuple[PyTree, PyTree]],
    encoder: Callable[[PyTree, PyTree], PyTree] | None,
    readout: Callable[[PyTree, PyTree], PyTree] | None,
    checkpoint: Segment,
    draw: Draw = "window",
    begin: Callable[[PyTree, PyTree], PyTree] | None = None,
    encoder_name: str = "encoder",
) -> Recurrence:
    """``encoder`` → ``scan`` → ``readout``, over a whole window at a time or in segments of it.

    ``scan`` is ``(params, carry, x, resets, valid, edges, starts=, keys=Keys) -> (carry, y)``, x and y ``[lanes, time, ...]``;
    starts, a carry ``[lanes, time, ...]``, is what a reset at a step returns to, None: the initial carry; ``encoder_name``
    is for sentences. The others are as for :func:`from_step`.

    Raises:
      ValueError: if ``draw`` is neither, or the encoder or the readout is no function.
    """
    if draw not in ("window", "step"):
        raise ValueError(f"`draw` is {draw!r}; it needs to be 'window' or 'step': how often what is random is drawn.")
    check_function("encoder", encoder)
    check_function("readout", readout)

    def with_key(module: Callable, params: PyTree, x: PyTree, keys: Keys) -> PyTree:
        """The encoder or the readout."""
        if not takes_key(module):
            return module(params, x)
        return module(params, x, key=keys.window if draw == "window" else keys.step)

    def read(params: PyTree, carry: PyTree, window: Window, key: jax.Array | None) -> tuple[PyTree, PyTree]:
        _, time = time_shape(window)
        inputs, edges = jax.tree.map(jnp.asarray, (window.inputs, window.edges))
        resets, valid = jax.tree.map(lambda x: jnp.asarray(x, bool), (window.resets, window.valid))
        each = None if key is None else step_keys(key, time)

        def segment(carry: PyTree, per_step: tuple) -> tuple[PyTree, PyTree]:
            x, *masks, each = per_step
            keys, starts, fresh = Keys(key, each), None, None
            if (valid := masks[1]) is not None:  # a NaN in the padding would reach the gradient as 0 * NaN
                x = where_lanes(valid, x, jax.tree.map(jnp.zeros_like, x))
            if begin is not None:
                carry, fresh = carry
                masks[0], fresh = first_steps(fresh, masks[0], valid, jax.tree.leaves(x)[0].shape[1])
                starts = starts_of(functools.partial(begin, params), x, masks[0], carry)
            x = x if encoder is None else with_key(encoder, params, x, of_part(keys, 0))
            carry, y = scan(params, carry, x, *masks, starts=starts, keys=of_part(keys, 1))
            carry = carry if fresh is None else Begun(carry, fresh)
            return carry, (y if readout is None else with_key(readout, params, y, of_part(keys, 2)))

        return in_segments(segment, carry, (inputs, resets, valid, edges, each), time, checkpoint)

    @functools.lru_cache(maxsize=16)
    def check_modules(tree: Any, shapes: tuple) -> None:
        params, inputs = jax.tree.unflatten(tree, [jax.ShapeDtypeStruct(*shape) for shape in shapes])
        x = inputs
        if encoder is not None:
            x = check_step_by_step(encoder_name, encoder, params, x)
        if readout is not None:
            lanes, _ = time_shape(Window(inputs))
            carry = jax.eval_shape(lambda p: initial_carry(p, lanes), params)
            y = jax.eval_shape(
                lambda p, c, x: scan(p, c, x, None, None, None, starts=None, keys=Keys())[1], params, carry, x
            )
            check_step_by_step("readout", readout, params, y)

    def checked_init(key: jax.Array, inputs: PyTree) -> PyTree:
        params = init(key, inputs)
        if jax.tree.leaves(inputs) and not encoder is readout is None:
            leaves, tree = jax.tree.flatten((params, inputs))
            check_modules(tree, tuple((jnp.shape(x), x.dtype) for x in leaves))
        return params

    def first_carry(params: PyTree, lanes: int) -> PyTree:
        carry = initial_carry(params, lanes)
        return carry if begin is None else Begun(carry, jnp.ones(lanes, bool))

    draws = getattr(scan, "draws", True) or any(takes_key(module) for module in (encoder, readout) if module)
    return windowed(checked_init, initial_carry if begin is None else first_carry, read, draws)


def windowed(
    init: Callable[..., PyTree],
    initial_carry: Callable[..., PyTree],
    read: Callable[[PyTree, Any, Window, jax.Array | None], tuple[Any, PyTree]],
    draws: bool,
) -> Recurrence:
    """A recurrence whose ``unroll`` is ``read``, ``(params, carry, window, key) -> (carry, outputs)``, and which ``draws`` or not.

    Raises:
      ValueError: from ``unroll``, if its arguments are no window, or the carry or the key does not fit its lanes.
    """

    def unroll(
        params: PyTree,
        carry: PyTree,
        inputs: PyTree,
        resets: jax.Array | None = None,
        valid: jax.Array | None = None,
        edges: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> tuple[PyTree, PyTree]:
        window = Window(inputs, resets=resets, valid=valid, edges=edges)
        lanes, _ = time_shape(window)
        check_carry(carry, jax.eval_shape(lambda p: initial_carry(p, lanes), params), lanes)
        check_key(key, lanes)
        return read(params, carry, window, key)

    return Recurrence(init, initial_carry, drawing(unroll, draws))


def stack(*layers: Recurrence, remat: bool = False) -> Recurrence:
    """Layers on top of each other: the outputs of each are the inputs of the next.

    Params and carry are tuples, one entry a layer. Each layer runs over the whole window before the next begins; resets
    and padding reach them all.

    Args:
      *layers: the first, which is given the window's inputs ``[lanes, time, ...]``, to the last; at least one.
      remat: keep of each layer only its inputs and the carry that it begins with for the backward pass, and compute the rest
        again: memory for one layer at a time, for one more forward pass. A CPU's compiler may compute all layers again at once,
        and save nothing; :func:`tbptt_jax.repeat` is a loop, where it cannot.

    Raises:
      ValueError: now, if there is no layer or one is no Recurrence; from ``init`` and ``unroll``, if the inputs are not
        ``[lanes, time, ...]``; from ``unroll``, if the carry does not fit their lanes; and what the layers raise.
    """
    if not layers or not all(isinstance(layer, Recurrence) for layer in layers):
        raise ValueError(
            f"`stack` was given {quoted(layers)}; it needs recurrences one after another, `stack(first, second)`, at least "
            "one. A module becomes one by `tb.pointwise(module)`."
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

    def read(params: PyTree, carry: PyTree, window: Window, key: jax.Array | None) -> tuple[PyTree, PyTree]:
        carries: list[PyTree] = []
        for number, (layer, p, c) in enumerate(zip(layers, params, carry, strict=True)):
            own = None if key is None or not takes_key(layer.unroll) else fold_in(key, number)
            run = functools.partial(unroll_window, layer)
            c, y = (jax.checkpoint(run) if remat else run)(p, c, window, own)
            carries, window = [*carries, c], window._replace(inputs=y)
        return tuple(carries), window.inputs

    return windowed(init, initial_carry, read, any(takes_key(layer.unroll) for layer in layers))


def over_steps(
    step: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]],
    carry: PyTree,
    x: PyTree,
    resets: jax.Array | None,
    valid: jax.Array | None,
    edges: jax.Array | None,
    *,
    always: PyTree,
    starts: PyTree = None,
) -> tuple[PyTree, PyTree]:
    """``step``, ``(carry, x [lanes, ...]) -> (carry, y [lanes, ...])``, over a window: ``(carry, y [lanes, time, ...])``.

    Args:
      step: of all lanes, whatever resets and padding there are.
      carry: before the window, every leaf ``[lanes, ...]``.
      x: ``[lanes, time, ...]``.
      resets: ``[lanes, time]``, or None.
      valid: ``[lanes, time]``, or None.
      edges: ``[lanes, time]``, or None.
      always: the carry that a reset returns to.
      starts: that of each step, ``[lanes, time, ...]``, in the place of ``always``; or None.
    """

    def one_step(carry: PyTree, at_t: tuple) -> tuple[PyTree, PyTree]:
        x, reset, is_valid, edge, start = at_t
        if edge is not None:
            carry = scale_cotangent(edge, carry)
        if reset is not None:
            carry = begun_anew(reset, always if start is None else start, carry)
        new, y = step(carry, x)
        new = _as_given(new, carry)
        return (new if is_valid is None else where_lanes(is_valid, new, carry)), y

    carry, y = lax.scan(one_step, carry, jax.tree.map(_swap, (x, resets, valid, edges, starts)))
    return carry, jax.tree.map(_swap, y)


def begun_anew(reset: jax.Array, start: PyTree, carry: PyTree) -> PyTree:
    """``start`` where a lane is reset, ``[lanes]`` bool. Typed keys go on: what was drawn is not drawn again."""
    return jax.tree.map(lambda s, h: h if is_key(h) else where_lanes(reset, s, h), start, carry)


def check_carry(carry: PyTree, expected: PyTree, lanes: int) -> None:
    """Raises a ``ValueError`` unless ``carry`` has the tree, shapes and dtypes of the initial carry for ``lanes``."""

    def describe(tree: PyTree) -> tuple:
        return jax.tree.structure(tree), [(jnp.shape(x), jnp.result_type(x)) for x in jax.tree.leaves(tree)]

    if describe(carry) == describe(expected):
        return
    has, needs = (
        jax.tree.map(lambda x: f"{jnp.result_type(x)}{list(jnp.shape(x))}", tree) for tree in (carry, expected)
    )
    raise ValueError(
        f"The carry does not fit this window of {lanes} lanes: it is {has}, and needs to be {needs}. A carry belongs to "
        "the lanes it was made for; begin another number of lanes with `initial_carry(params, lanes)`."
    )


def _as_given(new: PyTree, carry: PyTree) -> PyTree:
    """A step's new carry in the dtypes of the one before: bfloat16 compute, float32 carry."""

    def describe(tree: PyTree) -> tuple:
        return jax.tree.structure(tree), [jnp.shape(x) for x in jax.tree.leaves(tree)]

    def fits(new: Any, old: Any) -> bool:
        kinds = jnp.floating, jnp.complexfloating, jnp.integer, jnp.bool_
        a, b = ([jnp.issubdtype(jnp.result_type(x), kind) for kind in kinds] for x in (new, old))
        return a == b or (a[0] and b[1])  # a real number is a complex one, and not the other way round

    if describe(new) != describe(carry) or not all(jax.tree.leaves(jax.tree.map(fits, new, carry))):
        returned, given = (
            jax.tree.map(lambda x: f"{jnp.result_type(x)}{list(jnp.shape(x))}", tree) for tree in (new, carry)
        )
        raise ValueError(
            f"`step` was given the carry {given} and returned {returned}: it needs to return (carry, y), the carry in the "
            "same tree, shapes and kinds of number, as `initial_carry` makes it."
        )
    return jax.tree.map(lambda n, c: jnp.asarray(n, c.dtype), new, carry)


def unroll_window(
    model: Recurrence, params: PyTree, carry: PyTree, window: Window, key: jax.Array | None = None
) -> tuple[PyTree, PyTree]:
    """``model.unroll`` over a window: ``(carry, outputs [lanes, time, ...])``; with keys ``[lanes]`` if it is trained and draws."""
    key = key if takes_key(model.unroll) else None
    some = {name: x for name, x in {"edges": window.edges, "key": key}.items() if x is not None}
    return model.unroll(params, carry, window.inputs, window.resets, window.valid, **some)


def rematerialised(model: Recurrence, checkpoint: Segment) -> Recurrence:
    """The same recurrence, unrolled in segments as :func:`from_step` does with ``checkpoint``."""

    def unroll(params: PyTree, carry: PyTree, inputs: PyTree, *masks: jax.Array | None, **edges: jax.Array) -> tuple:
        _, time = time_shape(Window(inputs))

        def segment(carry: PyTree, per_step: tuple) -> tuple[PyTree, PyTree]:
            inputs, masks, edges = per_step
            return model.unroll(params, carry, inputs, *masks, **edges)

        return in_segments(segment, carry, (inputs, masks, edges), time, checkpoint)

    return model._replace(unroll=unroll)


def scale_cotangent(scale: jax.Array, tree: PyTree) -> PyTree:
    """The same values; what goes back through them is multiplied by ``scale`` ``[lanes]``."""

    def leaf(x: jax.Array) -> jax.Array:
        still = lax.stop_gradient(x)
        return still + scale.reshape(scale.shape + (1,) * (x.ndim - 1)).astype(x.dtype) * (x - still)

    return jax.tree.map(lambda x: leaf(x) if jnp.issubdtype(x.dtype, jnp.inexact) else x, tree)


def _swap(x: jax.Array) -> jax.Array:
    return x.swapaxes(0, 1)
