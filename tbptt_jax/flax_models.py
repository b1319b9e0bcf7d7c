"""Recurrences of Flax modules, Linen and NNX: ``encoder`` → ``cell`` over time → ``readout``."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from tbptt_jax.arrays import PyTree
from tbptt_jax.begin import InitialCarry, begin_from
from tbptt_jax.modules import Part, depends_on_key, linen_parts, of_any_lanes, of_lanes
from tbptt_jax.recurrence import Draw, Recurrence, Segment, from_step
from tbptt_jax.window import Window, time_shape


def from_linen(
    cell: nn.RNNCellBase,
    *,
    encoder: Part = None,
    readout: Part = None,
    input_shape: tuple[int, ...] = (1,),
    init: Callable[[jax.Array, PyTree], dict[str, PyTree]] | None = None,
    initial_carry: InitialCarry = None,
    rngs: Sequence[str] = ("dropout",),
    draw: Draw = "window",
    checkpoint: Segment = None,
) -> Recurrence:
    """A recurrence from Flax Linen: ``encoder`` → ``cell`` over time → ``readout``.

    Modules keep parameters and nothing else: what changes from step to step is the carry. What draws, such as ``nn.Dropout``,
    does so in training, by a key of each lane, and is left out in evaluation; an argument ``deterministic``, ``train`` or
    ``training`` of a module's ``__call__`` is set so.

    Args:
      cell: any ``nn.RNNCellBase``. Its parameters become ``params["cell"]``.
      encoder: a module without state, called on ``[lanes, time, ...]``, for all steps at once; ``params["encoder"]``. Or a
        function ``(params, x) -> x`` of all parameters, which may take a ``key``: weights are tied in a line.
      readout: likewise, called on the cell's outputs; ``params["readout"]``.
      input_shape: shape of one lane's input to the cell at one step. Only cells whose carry has spatial axes, such as
        ``nn.ConvLSTMCell``, read it.
      init: ``(key, inputs) -> params`` of the functions among these, a dict beside what the modules have.
      initial_carry: see :class:`tbptt_jax.cells.layers.Options`.
      rngs: names that modules ask keys by.
      draw: how often, see :func:`tbptt_jax.from_step`.
      checkpoint: see :func:`tbptt_jax.from_step`.

    Raises:
      ValueError: now, if ``cell`` is no cell; from ``init``, if the inputs are not ``[lanes, time, ...]`` or have no axis of
        features, a module has variables besides its parameters, such as batch statistics, draws where it is given no key, or looks
        along time or lanes; from
        ``unroll``, as :func:`tbptt_jax.from_step`, and if ``checkpoint`` is not as described.
    """
    if not isinstance(cell, nn.RNNCellBase):
        raise ValueError(
            f"`cell` is {cell!r}; it needs to be an RNN cell of Flax Linen, such as `nn.OptimizedLSTMCell(64)`."
        )

    begin, apply = linen_parts(rngs, encoder=encoder, cell=cell, readout=readout)

    def begin_all(key: jax.Array, inputs: PyTree) -> PyTree:
        lanes, _ = time_shape(Window(inputs))
        keys = jax.random.split(key, 3)
        params: PyTree = {} if init is None else init(jax.random.fold_in(key, 3), inputs)
        x = inputs
        if encoder is not None:
            x, params = begin("encoder", keys[0], params, x)
        x_t = jax.tree.map(lambda x: x[:, 0], x)
        (_, y_t), params = begin("cell", keys[1], params, zeros(params, lanes), x_t)
        if readout is not None:
            _, params = begin("readout", keys[2], params, jax.tree.map(lambda y: y[:, None], y_t))
        return params

    def zeros(params: PyTree, lanes: int) -> PyTree:
        del params
        return cell.initialize_carry(jax.random.key(0), (lanes, *input_shape))

    begin_checked, start, of_data = begin_from(initial_carry, of_any_lanes(begin_all), zeros)
    return from_step(
        apply("cell"),
        begin_checked,
        start,
        encoder=encoder and apply("encoder"),
        readout=readout and apply("readout"),
        begin=of_data,
        draw=draw,
        checkpoint=checkpoint,
    )


def from_nnx(
    cell: Callable[[nnx.Rngs], nnx.Module] | nnx.Module,
    *,
    encoder: Callable[[nnx.Rngs], nnx.Module] | nnx.Module | None = None,
    readout: Callable[[nnx.Rngs], nnx.Module] | nnx.Module | None = None,
    input_shape: tuple[int, ...] = (1,),
    initial_carry: InitialCarry = None,
    draw: Draw = "window",
    checkpoint: Segment = None,
) -> Recurrence:
    """A recurrence from Flax NNX: ``encoder`` → ``cell`` over time → ``readout``.

    Each part is a function ``rngs -> module``, such as ``lambda rngs: nnx.OptimizedLSTMCell(3, 64, rngs=rngs)``, and is
    initialised from ``init``'s key; or a module, whose own parameters are then the initial ones, whatever the key. What draws
    from its ``nnx.Rngs``, such as ``nnx.Dropout``, does so in training by a key of each lane, and in evaluation not at all.

    Args:
      cell: an ``nnx`` RNN cell, ``(carry, x [lanes, ...]) -> (carry, y [lanes, ...])``; ``params["cell"]`` holds its
        ``nnx.Param`` state.
      encoder: a module without state, called on ``[lanes, time, ...]``.
      readout: likewise, called on the cell's outputs.
      input_shape: as in :func:`from_linen`.
      initial_carry: see :class:`tbptt_jax.cells.layers.Options`.
      draw: how often, see :func:`tbptt_jax.from_step`.
      checkpoint: see :func:`tbptt_jax.from_step`.

    Raises:
      ValueError: now, if a part is a class, or its module holds variables other than ``nnx.Param`` and keys (batch
        statistics): they would change from step to step outside the carry; from ``init``, if a module draws in evaluation, the inputs have no axis of
        features, or the encoder or the readout looks along time or lanes; from ``unroll``, as :func:`tbptt_jax.from_step`, and if
        ``checkpoint`` is not as described.
    """
    given = {"encoder": encoder, "cell": cell, "readout": readout}
    parts = {name: part for name, part in given.items() if part is not None}
    modules = {name: part for name, part in parts.items() if isinstance(part, nnx.Module)}
    groups: list[dict[str, Any]] = [modules, *({name: part} for name, part in parts.items() if name not in modules)]
    graphs: dict[str, tuple] = {}
    begin: dict[str, Callable] = {}
    for group in groups:  # modules are divided together, so that one that is a part of several is one
        graph, rngs, initial = _divide(group)
        for name in group:
            graphs[name] = tuple(group), graph, rngs
            begin[name] = initial

    def init(key: jax.Array, inputs: PyTree) -> PyTree:
        keys = dict(zip(given, jax.random.split(key, 3), strict=True))
        params = {name: begin[name](keys[name])[name] for name in parts}  # NNX modules are told their sizes
        return params

    def zeros(params: PyTree, lanes: int) -> PyTree:
        return merged("cell", params, None).initialize_carry((lanes, *input_shape), nnx.Rngs(0))

    def merged(name: str, params: PyTree, key: jax.Array | None, training: bool = False) -> Any:
        group, graph, rngs = graphs[name]
        own = nnx.State({each: params[each] for each in group})
        module = nnx.merge(graph, own, _keys_of(rngs, jax.random.key(0) if key is None else key))[name]
        if not training:
            module.eval()
        return module

    def apply(name: str) -> Callable[..., PyTree]:
        drawn = of_lanes(
            lambda params, *args, key: merged(name, params, key, key is not None)(*args),
            axes=1 if name == "cell" else 2,
        )

        def applied(params: PyTree, *args: PyTree, key: jax.Array | None = None) -> PyTree:
            in_evaluation = lambda key: lambda params, *args: merged(name, params, key)(*args)  # noqa: E731
            if key is None and jax.tree.leaves(graphs[name][2]) and depends_on_key(in_evaluation, params, *args):
                raise ValueError(
                    f"The {name} draws where no key is given, and evaluation needs to be deterministic: let it draw only where an "
                    "attribute `deterministic` of its own is False, as that of nnx.Dropout."
                )
            return drawn(params, *args, key=key)

        applied.__name__ = type(parts[name]).__name__ if name in modules else "module"
        return applied

    begin_all, start, of_data = begin_from(initial_carry, init, zeros)

    def init_checked(key: jax.Array, inputs: PyTree) -> PyTree:
        params = begin_all(key, inputs)
        if inputs is not None:
            _check_more_lanes(model.unroll, model.initial_carry, params, inputs)
        return params

    model = from_step(
        apply("cell"),
        init_checked,
        start,
        encoder=apply("encoder") if "encoder" in parts else None,
        readout=apply("readout") if "readout" in parts else None,
        begin=of_data,
        draw=draw,
        checkpoint=checkpoint,
    )
    return model


def _divide(parts: dict[str, Any]) -> tuple[Any, PyTree, Callable]:
    """NNX modules as their static graph, the state of their keys and a function ``key -> params``."""

    def split(modules: dict[str, nnx.Module]) -> tuple[Any, PyTree, PyTree]:
        divided: Any = nnx.split(modules, nnx.Param, nnx.RngState, ...)
        graph, params, rngs, rest = divided
        if jax.tree.leaves(rest):
            paths = list(nnx.to_flat_state(rest).paths)
            raise ValueError(
                f"The {paths[0][0]} holds variables besides its parameters: {[path[1:] for path in paths]}. A recurrence keeps "
                "state only in its carry: give a module whose variables are all nnx.Param."
            )
        return graph, {name: params.get(name, nnx.State({})) for name in modules}, rngs

    for name, part in parts.items():
        if isinstance(part, type):
            raise ValueError(
                f"The {name} is the class {part.__name__}; give a module, or a function of `rngs` that makes one, such as "
                f"`lambda rngs: {part.__name__}(2, 64, rngs=rngs)`."
            )
    if all(isinstance(part, nnx.Module) for part in parts.values()):
        graph, params, rngs = split(parts)
        return graph, rngs, lambda key: jax.tree.map(jnp.copy, params)  # copies: a train step donates what it is given
    ((name, make),) = parts.items()
    graph, _, rngs = split(nnx.eval_shape(lambda: {name: make(nnx.Rngs(0))}))
    return graph, rngs, lambda key: split({name: make(nnx.Rngs(key))})[1]


def _keys_of(rngs: PyTree, key: jax.Array) -> PyTree:
    """The state of NNX's keys as it is at first, from this key."""
    leaves, tree = jax.tree.flatten(rngs)

    def leaf(number: int, x: Any) -> jax.Array:
        if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jnp.zeros(x.shape, x.dtype)  # how often they were asked
        own = jax.random.fold_in(key, number)
        return jax.random.split(own, x.shape) if x.shape else own

    return jax.tree.unflatten(tree, [leaf(i, x) for i, x in enumerate(leaves)])


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
