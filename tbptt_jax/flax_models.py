"""Recurrences of Flax modules, Linen and NNX: ``encoder`` → ``cell`` over time → ``readout``."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from tbptt_jax.arrays import PyTree
from tbptt_jax.recurrence import Recurrence, Segment, from_step
from tbptt_jax.window import Window, time_shape


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
      checkpoint: see :func:`tbptt_jax.from_step`.

    Raises:
      ValueError: now, if ``cell`` is no cell; from ``init``, if the inputs are not ``[lanes, time, ...]`` or have no axis of
        features, a module has variables besides its parameters, such as batch statistics, or looks along time or lanes; from
        ``unroll``, as :func:`tbptt_jax.from_step`, and if ``checkpoint`` is not as described.
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
      checkpoint: see :func:`tbptt_jax.from_step`.

    Raises:
      ValueError: now, if a part is a class, or its module holds variables other than ``nnx.Param`` (dropout keys, batch
        statistics): they would change from step to step outside the carry; from ``init``, if the inputs have no axis of
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
