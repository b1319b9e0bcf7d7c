"""Whether a module reads each step of each lane by itself: what looks along time depends on where a stream was cut."""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np
from flax import nnx

from tbptt_jax.arrays import PyTree, quoted


def check_function(name: str, part: Any) -> None:
    """Raises a ``ValueError`` unless ``part`` is None or a function of parameters, and no module that has its own."""
    if part is not None and (not callable(part) or isinstance(part, nn.Module | nnx.Module)):
        raise ValueError(
            f"`{name}` is {quoted(part)}; it needs to be a function `(params, x) -> y`. A module is a layer of its own: "
            "`tb.pointwise(module)` before or after this one, under `tb.stack`."
        )


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


def quickly(f: Callable) -> Callable:
    """``jax.jit(f)`` of what is run a few times to find something out: on a CPU, without what makes a program fast."""
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    if jaxlib.version.__version__.startswith("0.10."):  # an option that XLA does not know is an error
        options["xla_cpu_use_fusion_emitters"] = False
    return jax.jit(f, compiler_options=options if jax.default_backend() == "cpu" else None)


def some_numbers(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Numbers to find out by what a model does: from -1 to 1, complex too; 0 and 1 of whole ones; keys all alike."""
    if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        return jnp.zeros(shape, dtype)
    if not jnp.issubdtype(dtype, jnp.inexact):
        return jax.device_put(rng.integers(0, 2, shape).astype(jax.dtypes.canonicalize_dtype(dtype)))
    few = (min(math.prod(shape), 2**20 - 1),)  # of many, the same ones again and again
    numbers = rng.uniform(-1, 1, few)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        numbers = numbers + 1j * rng.uniform(-1, 1, few)
    return jax.device_put(np.resize(numbers.astype(dtype), shape))  # `jnp.asarray` compiles
