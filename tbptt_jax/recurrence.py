"""Recurrences: a model as three pure functions, whatever library its cell was written in.

    init(key, inputs)                               -> params
    initial_carry(params, lanes)                    -> carry                 every leaf [lanes, ...]
    unroll(params, carry, inputs, resets, valid)    -> (carry, outputs)      inputs, outputs [lanes, time, ...]

``unroll`` is one ``lax.scan`` over time. A lane whose ``resets`` is True returns to the initial carry before the step is
consumed, or skipped; where ``valid`` is False the carry stands still, and what the padding holds, NaN included, changes
nothing.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from tbptt_jax.arrays import check_whole, where_lanes
from tbptt_jax.window import Window, time_shape

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
      ValueError: from ``init``, if the encoder or the readout does not read each step of each lane by itself; from
        ``unroll``, when it is traced, if the carry does not fit the inputs' lanes, or the step returns another carry than it
        was given.
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
        inputs, edges = jax.tree.map(jnp.asarray, (inputs, edges))
        resets, valid = jax.tree.map(lambda x: jnp.asarray(x, bool), (resets, valid))

        def segment(carry: PyTree, per_step: tuple) -> tuple[PyTree, PyTree]:
            x, *masks = per_step
            if (valid := masks[1]) is not None:  # a NaN in the padding would reach the gradient as 0 * NaN
                x = where_lanes(valid, x, jax.tree.map(jnp.zeros_like, x))
            x = x if encoder is None else encoder(params, x)
            carry, y = scan(params, carry, x, *masks)
            return carry, (y if readout is None else readout(params, y))

        return in_segments(segment, carry, (inputs, resets, valid, edges), time, checkpoint)

    @functools.lru_cache(maxsize=16)
    def check_modules(tree: Any, shapes: tuple) -> None:
        params, inputs = jax.tree.unflatten(tree, [jax.ShapeDtypeStruct(*shape) for shape in shapes])
        x = inputs
        if encoder is not None:
            x = check_step_by_step("encoder", encoder, params, x)
        if readout is not None:
            lanes, _ = time_shape(Window(inputs))
            carry = jax.eval_shape(lambda p: initial_carry(p, lanes), params)
            y = jax.eval_shape(lambda p, c, x: scan(p, c, x, None, None, None)[1], params, carry, x)
            check_step_by_step("readout", readout, params, y)

    def checked_init(key: jax.Array, inputs: PyTree) -> PyTree:
        params = init(key, inputs)
        if jax.tree.leaves(inputs) and not encoder is readout is None:
            leaves, tree = jax.tree.flatten((params, inputs))
            check_modules(tree, tuple((jnp.shape(x), x.dtype) for x in leaves))
        return params

    return Recurrence(checked_init, initial_carry, unroll)


def check_step_by_step(name: str, module: Callable[[PyTree, PyTree], PyTree], params: PyTree, x: PyTree) -> PyTree:
    """Raises a ``ValueError`` unless ``module`` reads each step of each lane by itself; returns its outputs' shapes.

    Found out on a few numbers: many steps of one lane must be as many lanes of one step. What looks along time, such as a
    convolution, attention or a norm over it, makes what is computed depend on where a stream was cut.

    Args:
      name: what the sentence calls it.
      module: ``(params, x [lanes, time, ...]) -> [lanes, time, ...]``.
      params: their shapes.
      x: its inputs' shapes, ``[lanes, time, ...]``.
    """
    lanes, time = jax.tree.leaves(x)[0].shape[:2]
    kind = getattr(module, "__name__", "<")
    name = name if kind.startswith("<") else f"{name} {kind}"
    remedy = (
        "A recurrence keeps what it knows of other steps in its carry alone: give it the last inputs there (a layer of its own "
        "under `tb.stack`, made by `tb.from_step`), or compute it before the data is cut."
    )
    rng = np.random.default_rng(0)

    def read(params: PyTree, x: PyTree, steps: int) -> tuple[PyTree, PyTree]:
        of_one_lane = jax.tree.map(lambda leaf: some_numbers(rng, (1, steps, *leaf.shape[2:]), leaf.dtype), x)
        of_one_step = jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), of_one_lane)
        return module(params, of_one_lane), jax.tree.map(lambda y: y.swapaxes(0, 1), module(params, of_one_step))

    size = max(1, sum(math.prod(leaf.shape[2:]) for leaf in jax.tree.leaves(x)))
    many = max(8, min(max(time, 256), 200_000 // size))  # a look far back is seen in long windows only
    try:
        numbers = _read_by(module, params, x)
        if numbers is None:
            return jax.eval_shape(module, params, x)
        with jax.ensure_compile_time_eval():
            try:
                whole, by_step = read(numbers, x, many)
            except Exception:  # of a kind that only knows windows of one length
                whole, by_step = read(numbers, x, time)
    except Exception as error:
        raise ValueError(
            f"The {name} cannot be read step by step: it takes [{lanes} lanes, {time} steps, ...], and of one step it says: "
            f"{str(error).splitlines()[0] if str(error) else error!r}. {remedy}"
        ) from error

    def same(a: Any, b: Any) -> bool:
        a, b = (np.asarray(y.astype(jnp.promote_types(y.dtype, jnp.float32))) for y in (a, b))
        return a.shape == b.shape and not (np.abs(a - b) > 0.02 * np.nanmax(np.abs(a), initial=1e-30)).any()

    with jax.ensure_compile_time_eval():
        agree = all(jax.tree.leaves(jax.tree.map(same, whole, by_step)))
    if not agree:
        raise ValueError(
            f"The {name} does not read each step by itself: its outputs for many steps at once are not those for each step "
            f"alone, so a result would depend on where the stream is cut. {remedy}"
        )
    return jax.eval_shape(module, params, x)


def _read_by(module: Callable[[PyTree, PyTree], PyTree], params: PyTree, x: PyTree) -> PyTree | None:
    """Numbers for those parameters that the module reads, so that a large model costs nothing; None: they are too many."""
    rng = np.random.default_rng(1)
    traced = jax.make_jaxpr(module)(params, x).jaxpr
    used = {id(v) for equation in traced.eqns for v in equation.invars} | {id(v) for v in traced.outvars}
    leaves, tree = jax.tree.flatten(params)
    needed = [id(v) in used for v in traced.invars[: len(leaves)]]
    if sum(math.prod(leaf.shape) for leaf, need in zip(leaves, needed, strict=True) if need) > 2**28:
        return None
    with jax.ensure_compile_time_eval():
        numbers = [
            some_numbers(rng, leaf.shape, leaf.dtype) if need else leaf
            for leaf, need in zip(leaves, needed, strict=True)
        ]
    return jax.tree.unflatten(tree, numbers)


def some_numbers(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Numbers to find out by what a model does: from -1 to 1, complex too; 0 and 1 of whole ones; keys all alike."""
    if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        return jnp.zeros(shape, dtype)
    if not jnp.issubdtype(dtype, jnp.inexact):
        return jnp.asarray(rng.integers(0, 2, shape), dtype)
    few = (min(math.prod(shape), 2**20 - 1),)  # of many, the same ones again and again
    numbers = rng.uniform(-1, 1, few)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        numbers = numbers + 1j * rng.uniform(-1, 1, few)
    return jnp.asarray(np.resize(numbers.astype(dtype), shape))


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
      ValueError: now, if ``cell`` is no cell; from ``init``, if the inputs are not ``[lanes, time, ...]`` or have
        no axis of features, a module has variables besides its parameters, such as batch statistics, or looks along time or
        lanes; from ``unroll``, as :func:`from_step`, and if
        ``checkpoint`` is not as described.
    """
    if not isinstance(cell, nn.RNNCellBase):
        raise ValueError(
            f"`cell` is {cell!r}; it needs to be an RNN cell of Flax Linen, such as `nn.OptimizedLSTMCell(64)`."
        )

    begin, apply = linen_parts(encoder=encoder, cell=cell, readout=readout)

    def init(key: jax.Array, inputs: PyTree) -> PyTree:
        lanes, _ = time_shape(Window(inputs))
        keys = jax.random.split(key, 3)
        params: PyTree = {}
        x = inputs
        if encoder is not None:
            x, params = begin("encoder", keys[0], params, x)
        x_t = jax.tree.map(lambda x: x[:, 0], x)
        (_, y_t), params = begin("cell", keys[1], params, initial_carry(params, lanes), x_t)
        if readout is not None:
            _, params = begin("readout", keys[2], params, jax.tree.map(lambda y: y[:, None], y_t))
        return params

    def initial_carry(params: PyTree, lanes: int) -> PyTree:
        del params
        return cell.initialize_carry(jax.random.key(0), (lanes, *input_shape))

    return from_step(
        apply("cell"),
        of_any_lanes(init),
        initial_carry,
        encoder=encoder and apply("encoder"),
        readout=readout and apply("readout"),
        checkpoint=checkpoint,
    )


def linen_parts(**modules: nn.Module | None) -> tuple[Callable[..., tuple[PyTree, PyTree]], Callable[[str], Callable]]:
    """``begin(name, key, params, *args) -> (outputs, params)`` and ``apply(name)(params, *args) -> outputs`` of Linen modules.

    ``params[name]`` holds what Flax gives each of them. A module that is a part of several is one: its parameters are with
    the first.
    """
    given = {name: module for name, module in modules.items() if module is not None}
    reach = [_modules_in(module) for module in given.values()]
    shared = len(set().union(*reach)) < sum(map(len, reach))
    together = _Together(**given) if shared else None  # type: ignore[arg-type]

    def whole(params: PyTree) -> PyTree:
        return {"params": {name: params[name]["params"] for name in given if name in params}}

    def begin(name: str, key: jax.Array, params: PyTree, *args: PyTree) -> tuple[PyTree, PyTree]:
        if together is None:
            outputs, variables = given[name].init_with_output(key, *args)
            params = {**params, name: variables}
        else:
            try:
                outputs, variables = together.apply(whole(params), name, *args, rngs={"params": key}, mutable=True)
            except flax.errors.ScopeParamShapeError as error:
                raise ValueError(
                    f"The {name} is, or holds, a module of another part, and shares its parameters, which do not fit here "
                    f"({str(error).splitlines()[0]}): make a second module for this part."
                ) from error
            of_part = variables.get("params", {})
            params = {each: {"params": of_part.get(each, {})} for each in {**params, name: None}}
        if others := sorted(set(variables) - {"params"}):
            raise ValueError(
                f"The {name} holds variables besides its parameters: {others}. A recurrence keeps state only in its carry: "
                "give a module with parameters alone."
            )
        return outputs, params

    def apply(name: str) -> Callable[..., PyTree]:
        def applied(params: PyTree, *args: PyTree) -> PyTree:
            if together is None:
                return given[name].apply(params[name], *args)
            return together.apply(whole(params), name, *args)

        applied.__name__ = type(given[name]).__name__
        return applied

    return begin, apply


class _Together(nn.Module):
    """Modules that have a module in common: Flax then knows it as one."""

    encoder: nn.Module | None = None
    cell: nn.Module | None = None
    readout: nn.Module | None = None

    def __call__(self, name: str, *args: PyTree) -> PyTree:
        return getattr(self, name)(*args)


def _modules_in(module: nn.Module) -> set[int]:
    """The module and all that are given to it, by identity."""
    fields = [getattr(module, f.name, None) for f in dataclasses.fields(module) if f.name not in ("parent", "name")]
    parts = [x for x in jax.tree.leaves(fields, is_leaf=lambda x: isinstance(x, nn.Module)) if isinstance(x, nn.Module)]
    return {id(module)}.union(*map(_modules_in, parts))


def of_any_lanes(init: Callable[[jax.Array, PyTree], PyTree]) -> Callable[[jax.Array, PyTree], PyTree]:
    """``init``, which refuses inputs that make the parameters' shapes depend on how many lanes or steps there are.

    A module takes the last axis of what it is given for its features; where inputs have none, that is lanes, or time.
    """

    def checked(key: jax.Array, inputs: PyTree) -> PyTree:
        params = init(key, inputs)
        lanes, time = time_shape(Window(inputs))
        more = jax.tree.map(lambda x: jax.ShapeDtypeStruct((lanes + 1, time + 1, *x.shape[2:]), x.dtype), inputs)
        try:
            others = jax.eval_shape(init, key, more)
        except Exception:  # of a module that knows one number of steps only; it is refused for that
            return params
        for (path, param), other in zip(jax.tree.leaves_with_path(params), jax.tree.leaves(others), strict=True):
            if jnp.shape(param) != other.shape:
                shapes = jax.tree.map(lambda x: list(x.shape), inputs)
                name = jax.tree_util.keystr(path, simple=True, separator=".")
                raise ValueError(
                    f"`inputs` has shape {shapes}, and `{name}` is {list(jnp.shape(param))} for these {lanes} lanes of {time} steps "
                    f"and {list(other.shape)} for {lanes + 1} of {time + 1}: a module takes the last axis for features. Give "
                    "inputs [lanes, time, features] (`x[..., None]` for a single one), or tokens an `encoder` such as nn.Embed."
                )
        return params

    return checked


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
        statistics): they would change from step to step outside the carry; from ``init``, if the inputs have no axis of
        features, or the encoder or the readout looks along time or lanes; from ``unroll``, as :func:`from_step`, and if
        ``checkpoint`` is not as described.
    """
    given = {"encoder": encoder, "cell": cell, "readout": readout}
    parts = {name: part for name, part in given.items() if part is not None}
    modules = {name: part for name, part in parts.items() if isinstance(part, nnx.Module)}
    groups: list[dict[str, Any]] = [modules, *({name: part} for name, part in parts.items() if name not in modules)]
    graphs: dict[str, tuple] = {}
    begin: dict[str, Callable] = {}
    for group in groups:  # modules are divided together, so that one that is a part of several is one
        graph, initial = _divide(group)
        for name in group:
            graphs[name] = tuple(group), graph
            begin[name] = initial

    def init(key: jax.Array, inputs: PyTree) -> PyTree:
        keys = dict(zip(given, jax.random.split(key, 3), strict=True))
        params = {name: begin[name](keys[name])[name] for name in parts}  # NNX modules are told their sizes
        if inputs is not None:
            _check_more_lanes(model.unroll, initial_carry, params, inputs)
        return params

    def initial_carry(params: PyTree, lanes: int) -> PyTree:
        return merged("cell", params).initialize_carry((lanes, *input_shape), nnx.Rngs(0))

    def merged(name: str, params: PyTree) -> Any:
        group, graph = graphs[name]
        return nnx.merge(graph, nnx.State({each: params[each] for each in group}))[name]

    def apply(name: str) -> Callable[..., PyTree]:
        def applied(params: PyTree, *args: PyTree) -> PyTree:
            return merged(name, params)(*args)

        applied.__name__ = type(parts[name]).__name__ if name in modules else "module"
        return applied

    model = from_step(
        apply("cell"),
        init,
        initial_carry,
        encoder=apply("encoder") if "encoder" in parts else None,
        readout=apply("readout") if "readout" in parts else None,
        checkpoint=checkpoint,
    )
    return model


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


def _divide(parts: dict[str, Any]) -> tuple[Any, Callable]:
    """NNX modules as their static graph and a function ``key -> params``."""

    def split(modules: dict[str, nnx.Module]) -> tuple[Any, PyTree]:
        divided: Any = nnx.split(modules, nnx.Param, ...)
        graph, params, rest = divided
        if jax.tree.leaves(rest):
            paths = list(nnx.to_flat_state(rest).paths)
            raise ValueError(
                f"The {paths[0][0]} holds variables besides its parameters: {[path[1:] for path in paths]}. A recurrence keeps "
                "state only in its carry: give a module whose variables are all nnx.Param."
            )
        return graph, {name: params.get(name, nnx.State({})) for name in modules}

    for name, part in parts.items():
        if isinstance(part, type):
            raise ValueError(
                f"The {name} is the class {part.__name__}; give a module, or a function of `rngs` that makes one, such as "
                f"`lambda rngs: {part.__name__}(2, 64, rngs=rngs)`."
            )
    if all(isinstance(part, nnx.Module) for part in parts.values()):
        graph, params = split(parts)
        return graph, lambda key: jax.tree.map(jnp.copy, params)  # copies: a train step donates what it is given
    ((name, make),) = parts.items()
    graph, _ = split(nnx.eval_shape(lambda: {name: make(nnx.Rngs(0))}))
    return graph, lambda key: split({name: make(nnx.Rngs(key))})[1]


def _check_more_lanes(unroll: Callable, initial_carry: Callable, params: PyTree, inputs: PyTree) -> None:
    """Raises a ``ValueError`` if one lane more could not be read: then lanes are taken for features."""
    lanes, _ = time_shape(Window(inputs))
    more = jax.tree.map(lambda x: jax.ShapeDtypeStruct((lanes + 1, *x.shape[1:]), x.dtype), inputs)
    try:
        jax.eval_shape(lambda p, x: unroll(p, initial_carry(p, lanes + 1), x), params, more)
    except TypeError as error:
        raise ValueError(
            f"`inputs` has shape {jax.tree.map(lambda x: list(x.shape), inputs)}, and {lanes + 1} lanes of such inputs do not fit "
            f"the modules ({str(error).splitlines()[0]}). Give inputs [lanes, time, features] with the features that the "
            "modules were made for (`x[..., None]` for a single one), or tokens an `encoder` such as nnx.Embed."
        ) from error


def _swap(x: jax.Array) -> jax.Array:
    return x.swapaxes(0, 1)
