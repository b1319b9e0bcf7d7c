"""What a model is made of besides its recurrence: Linen modules or functions, called with a key or without.

With keys, as in training, a module that draws is read lane by lane, each with the lane's own key, and step by step, so that one
mask holds for a window, or each step has its own. Without, it is deterministic: dropout is left out.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp

from tbptt_jax.arrays import PyTree, quoted
from tbptt_jax.noise import drawing
from tbptt_jax.window import Window, time_shape

Part = nn.Module | Callable[..., PyTree] | None
MODES = {"deterministic": False, "train": True, "training": True}  # arguments of modules, as they are in training


def linen_parts(
    rngs: Sequence[str] = ("dropout",), **parts: Part
) -> tuple[Callable[..., tuple[PyTree, PyTree]], Callable[[str], Callable]]:
    """``begin(name, key, params, *args) -> (outputs, params)`` and ``apply(name)(params, *args, key=None) -> outputs``.

    ``params[name]`` holds what Flax gives each module. A module that is a part of several is one: its parameters are with
    the first. A function ``(params, x)``, which may take a ``key``, has no parameters of its own, and sees all.

    Raises:
      ValueError: now, if a part is neither; from ``begin``, if a module has variables besides its parameters, or draws where no
        key is given.
    """
    given = {name: part for name, part in parts.items() if part is not None}
    modules = {name: part for name, part in given.items() if isinstance(part, nn.Module)}
    for name, part in given.items():
        if isinstance(part, type) or not callable(part):
            raise ValueError(
                f"`{name}` is {quoted(part)}; it needs to be a module, such as `nn.Dense(2)`, or a function `(params, x) -> y`."
            )
    reach = [_modules_in(module) for module in modules.values()]
    together = _Together(**modules) if len(set().union(*reach)) < sum(map(len, reach)) else None  # type: ignore[arg-type]

    def whole(params: PyTree) -> PyTree:
        return {"params": {name: params[name]["params"] for name in modules if name in params}}

    def call(name: str, params: PyTree, *args: PyTree, key: jax.Array | None, **how: Any) -> PyTree:
        """The module as it is in training, with a key, or in evaluation, without."""
        keys = {} if key is None else {each: jax.random.fold_in(key, i) for i, each in enumerate(("params", *rngs))}
        module = modules[name]
        takes = [m for m in inspect.signature(type(module).__call__).parameters if getattr(module, m, None) is None]
        mode = {m: in_training == (key is not None) for m, in_training in MODES.items() if m in takes}
        with nn.intercept_methods(functools.partial(_dropout, key is not None)):
            how = {"rngs": keys, **how, **mode}
            if together is not None:
                return together.apply(whole(params), name, *args, **how)
            return module.apply(params.get(name, {}), *args, **how)

    def begin(name: str, key: jax.Array, params: PyTree, *args: PyTree) -> tuple[PyTree, PyTree]:
        if name not in modules:
            return given[name](params, *args), params
        others_too = {each: params[each] for each in modules if each in params}
        try:
            outputs, variables = call(name, others_too, *args, key=None, rngs={"params": key}, mutable=True)
        except flax.errors.ScopeParamShapeError as error:
            raise ValueError(
                f"The {name} is, or holds, a module of another part, and shares its parameters, which do not fit here "
                f"({str(error).splitlines()[0]}): make a second module for this part."
            ) from error
        if together is None:
            params = {**params, name: variables}
        else:
            of_part = variables.get("params", {})
            params = {**params, **{each: {"params": of_part.get(each, {})} for each in {**others_too, name: None}}}
        if others := sorted(set(variables) - {"params"}):
            raise ValueError(
                f"The {name} holds variables besides its parameters: {others}. A recurrence keeps state only in its carry: "
                "give a module with parameters alone."
            )
        try:
            jax.eval_shape(functools.partial(call, name, key=None), params, *args)
        except flax.errors.InvalidRngError as error:
            raise ValueError(
                f"The {name} draws where no key is given ({error}), and evaluation needs to be deterministic: let it draw only "
                "`if self.has_rng(...)`, or where an argument `deterministic` of its `__call__` is False."
            ) from error
        return outputs, params

    def apply(name: str) -> Callable[..., PyTree]:
        if name not in modules:
            return given[name]
        applied = of_lanes(functools.partial(call, name), axes=1 if name == "cell" else 2)
        applied.__name__ = type(modules[name]).__name__
        return drawing(applied, _may_draw(modules[name]))

    return begin, apply


def _may_draw(module: Any) -> bool:
    """Whether a module may ask for a key: Flax's own layers and cells that hold no other module do not."""
    if isinstance(module, nn.Sequential):
        return any(map(_may_draw, module.layers))
    own = "flax.linen.linear", "flax.linen.recurrent", "flax.linen.activation"
    alone = isinstance(module, nn.Module) and len(_modules_in(module)) == 1
    return isinstance(module, nn.Module) and not (alone and type(module).__module__ in own)


def of_lanes(call: Callable[..., PyTree], axes: int) -> Callable[..., PyTree]:
    """``(params, *args, key=None)`` of a module that is called on arrays with axes of lanes and, if there are two, of time.

    Args:
      call: ``(params, *args, key)``, where key is one or None.
      axes: how many there are.

    Returns:
      The function; its keys are ``[lanes]``, or with two axes may be ``[lanes, time]``.
    """

    @functools.lru_cache(maxsize=16)
    def draws(tree: Any, shapes: tuple) -> bool:
        args = jax.tree.unflatten(tree, [jax.ShapeDtypeStruct(*shape) for shape in shapes])
        return depends_on_key(lambda key: functools.partial(call, key=key), *args)

    def applied(params: PyTree, *args: PyTree, key: jax.Array | None = None) -> PyTree:
        if key is None:
            return call(params, *args, key=None)
        leaves, tree = jax.tree.flatten((params, *args))
        if not draws(tree, tuple((jnp.shape(x), x.dtype) for x in leaves)):
            return call(params, *args, key=key.ravel()[0])

        def one(key: jax.Array, *args: PyTree) -> PyTree:
            alone = call(params, *jax.tree.map(lambda x: x.reshape(*[1] * axes, *x.shape), args), key=key)
            return jax.tree.map(lambda y: y.reshape(y.shape[axes:]), alone)

        each = one
        if axes == 2:
            each = jax.vmap(one, (None if key.ndim == 1 else 0, *[0] * len(args)))
        return jax.vmap(each)(key, *args)

    return applied


def depends_on_key(f: Callable[[jax.Array], Callable], *args: PyTree) -> bool:
    """Whether what ``f(key)(*args)`` returns depends on the key; the arguments may be shapes."""
    key = jax.eval_shape(jax.random.key, 0)
    traced = jax.make_jaxpr(lambda key, *args: f(key)(*args))(key, *args).jaxpr
    reached = {id(traced.invars[0])}
    for equation in traced.eqns:
        if any(id(v) in reached for v in equation.invars):
            reached |= {id(v) for v in equation.outvars}
    return any(id(v) in reached for v in traced.outvars)


def _dropout(training: bool, call: Callable, args: tuple, kwargs: dict[str, Any], context: Any) -> Any:
    """Flax's dropout, left out in evaluation; in training it is what its own ``deterministic`` says, if that is given."""
    if not isinstance(context.module, nn.Dropout) or context.method_name != "__call__":
        return call(*args, **kwargs)
    if not training:
        return args[0] if args else kwargs["inputs"]
    if context.module.deterministic is None and len(args) < 2:
        kwargs = {"deterministic": False, **kwargs}
    return call(*args, **kwargs)


class _Together(nn.Module):
    """Modules that have a module in common: Flax then knows it as one."""

    encoder: nn.Module | None = None
    cell: nn.Module | None = None
    readout: nn.Module | None = None

    def __call__(self, name: str, *args: PyTree, **mode: bool) -> PyTree:
        return getattr(self, name)(*args, **mode)


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
