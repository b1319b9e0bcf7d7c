"""A model that laws are held to: its parameters, what it reads, and the few programs that it is compiled to."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tbptt_jax.arrays import PyTree, where_lanes
from tbptt_jax.gradient import as_real, of_real
from tbptt_jax.noise import is_key, lane_keys, takes_key
from tbptt_jax.recurrence import Recurrence, begun_anew, unroll_window
from tbptt_jax.step_by_step import quickly
from tbptt_jax.streaming import streaming
from tbptt_jax.testing.comparing import is_inexact, on_host, rows
from tbptt_jax.window import Window


class Subject(NamedTuple):
    """A model in use.

    Attributes:
      model: the recurrence.
      params: its parameters.
      inputs: ``[lanes, time, ...]``.
      others: other inputs of the same kind.
      carry: what the lanes have when they begin to read: not the initial one.
      keys: ``[lanes]``, for a model that draws; else None.
      tolerance: what two ways to the same number may differ by.
      rng: of what is drawn for the laws.
      step: ``(carry, x, resets, valid) -> (carry, y)``, as :func:`tbptt_jax.streaming` makes it, compiled.
      read: ``(params, carry, window, key) -> (carry, outputs)``, compiled.
      pull: ``(point, params, carry, window, key, weights) -> (gradient, (carry, outputs))``, compiled; see :func:`pull`.
    """

    model: Recurrence
    params: PyTree
    inputs: PyTree
    others: PyTree
    carry: PyTree
    keys: jax.Array | None
    tolerance: float
    rng: np.random.Generator
    step: Callable[..., tuple[PyTree, PyTree]]
    read: Callable[..., tuple[PyTree, PyTree]]
    pull: Callable[..., tuple[PyTree, tuple[PyTree, PyTree]]]

    @property
    def shape(self) -> tuple[int, int]:
        lanes, time, *_ = jax.tree.leaves(self.inputs)[0].shape
        return lanes, time


def subject(model: Recurrence, inputs: PyTree, params: PyTree, seed: int) -> Subject:
    """A model at its initial carry; its parameters, if none are given, those of ``init`` and a little noise."""
    rng = np.random.default_rng(seed)
    # in the kinds of number that JAX has
    inputs = jax.tree.map(lambda x: x if is_key(x) else np.asarray(jax.device_put(x)), inputs)
    lanes, _ = jax.tree.leaves(inputs)[0].shape[:2]
    if params is None:
        fresh = quickly(model.init)(jax.random.key(seed), inputs)
        params = jax.tree.map(lambda p: jax.device_put(p + (0.1 * like(rng, p)).astype(p.dtype)), on_host(fresh))
    others = rows(inputs, slice(None, None, -1), slice(None, None, -1))
    keys = lane_keys(jax.random.key(seed), lanes) if takes_key(model.unroll) else None
    read, back = quickly(functools.partial(unroll_window, model)), quickly(functools.partial(pull, model))
    step, start = quickly(streaming(model, params)), model.initial_carry(params, lanes)
    return Subject(model, params, inputs, others, start, keys, 0.0, rng, step, read, back)


def pull(
    model: Recurrence, point: PyTree, params: PyTree, carry: PyTree, window: Window, key: Any, weights: PyTree
) -> tuple[PyTree, tuple[PyTree, PyTree]]:
    """The gradient, by all of ``point``, of the outputs and the carry of a window, weighed; and these themselves.

    Args:
      model: the recurrence.
      point: params, carry and inputs, a dict of them as :func:`numbers`.
      params: with what is no number.
      carry: likewise.
      window: what is read.
      key: ``[lanes]``, or None.
      weights: of the numbers of the outputs and of the carry.
    """

    def total(point: PyTree) -> tuple[jax.Array, tuple]:
        own = {"params": params, "carry": carry, "inputs": window.inputs}
        own = {name: of_real(point[name], own[name]) for name in own}
        end, outputs = unroll_window(model, own["params"], own["carry"], window._replace(inputs=own["inputs"]), key)
        y = numbers(outputs)
        y = where_lanes(jnp.asarray(window.valid), y, jax.tree.map(jnp.zeros_like, y))
        parts = jax.tree.map(lambda w, x: jnp.sum(w.astype(x.dtype) * x), weights, (y, numbers(end)))
        return functools.reduce(jnp.add, jax.tree.leaves(parts)), (end, outputs)

    return jax.grad(total, has_aux=True)(point)


def point(s: Subject, carry: PyTree, window: Window) -> PyTree:
    """Where a window is differentiated."""
    return {"params": numbers(s.params), "carry": numbers(carry), "inputs": numbers(window.inputs)}


def step_by_step(s: Subject, window: Window, told: bool = False) -> tuple[PyTree, PyTree]:
    """A window read by :func:`tbptt_jax.streaming`, from ``s.carry``.

    Args:
      s: the model.
      window: what is read.
      told: whether the model is told of resets and padding; else they are done for it, from outside.
    """
    start = s.model.initial_carry(s.params, s.shape[0])
    never, always = np.zeros(s.shape[0], bool), np.ones(s.shape[0], bool)
    carry, outputs = s.carry, []
    for t in range(s.shape[1]):
        x, reset, there = rows((window.inputs, window.resets, window.valid), slice(None), t)
        if told:
            carry, y = s.step(carry, x, reset, there)
        else:
            carry = _begun_anew(reset, start, carry)
            new, y = s.step(carry, x, never, always)
            carry = _where_lanes(there, new, carry)
        outputs.append(on_host(y))
    return carry, jax.tree.map(lambda *y: np.stack(y, 1), *outputs)


_begun_anew, _where_lanes = jax.jit(begun_anew), jax.jit(where_lanes)


def window_of(s: Subject, resets: Any = None, valid: Any = None, time: int | None = None) -> Window:
    """The first steps of the model's inputs, with masks: no resets, and all of it valid, where there are none."""
    resets = np.zeros(s.shape, bool) if resets is None else resets
    valid = np.ones(s.shape, bool) if valid is None else valid
    return rows(Window(s.inputs, resets=resets, valid=valid), slice(None), slice(time))


def padding(s: Subject) -> np.ndarray:
    """Which steps are valid: the first lane has a hole, another ends early, and the last has length 0."""
    valid = np.ones(s.shape, bool)
    valid[0, s.shape[1] // 2] = False
    valid[1, -2:] = False
    valid[-1] = False
    return valid


def filled(window: Window) -> Iterator[tuple[str, Window]]:
    """The window with one thing after another in its padding, and what it is."""

    def fill(huge: bool, x: Any) -> Any:
        if is_key(x):
            return x
        kind = x.dtype
        if is_inexact(x):
            rubbish: Any = np.asarray(jnp.finfo(kind).max / 4 if huge else np.nan, kind)
        elif jnp.issubdtype(kind, jnp.integer):
            rubbish = np.asarray(np.iinfo(kind).max if huge else np.iinfo(kind).min, kind)
        else:
            rubbish = np.logical_not(x)
        return _where(np.asarray(window.valid), x, rubbish)

    for name, huge in (("NaN", False), ("huge numbers", True)):
        yield name, window._replace(inputs=jax.tree.map(functools.partial(fill, huge), window.inputs))


def only(window: Window, steps: np.ndarray) -> Window:
    """The window with all but some steps, ``[time]`` bool, as padding."""
    return window._replace(resets=window.resets & steps, valid=window.valid & steps)


def mixed(steps: np.ndarray, yes: PyTree, no: PyTree) -> PyTree:
    """``yes`` at some steps, ``[time]`` bool, and ``no`` at the others."""
    return jax.tree.map(lambda y, n: _where(steps[None], y, n), yes, no)


def _where(condition: np.ndarray, yes: Any, no: Any) -> Any:
    shaped = condition.reshape(condition.shape + (1,) * (yes.ndim - condition.ndim))
    return jnp.where(shaped, yes, no) if is_key(yes) else np.where(shaped, yes, no)


def masked(window: Window, outputs: PyTree) -> PyTree:
    """Outputs on the host, 0 at padding."""
    return jax.tree.map(lambda y: _where(np.asarray(window.valid), y, np.zeros_like(y)), outputs)


def numbers(tree: PyTree) -> PyTree:
    """What can be differentiated, as real numbers; None for the rest."""
    return as_real(jax.tree.map(lambda x: x if is_inexact(x) else None, tree))


def weights_of(s: Subject, window: Window) -> tuple[PyTree, PyTree]:
    """Numbers that a window's outputs and last carry are weighed by."""
    shapes = jax.eval_shape(s.read, s.params, s.carry, window, None)
    end, outputs = jax.eval_shape(functools.partial(jax.tree.map, numbers), shapes)
    return jax.tree.map(lambda x: like(s.rng, x), (outputs, end))


def weighed(outputs: PyTree, window: Window) -> jax.Array:
    """A loss ``[lanes, time]`` whose gradient is the window's targets: numbers that the outputs are weighed by."""
    parts = jax.tree.map(lambda w, y: jnp.sum((w * y).reshape(*y.shape[:2], -1), -1), window.targets, numbers(outputs))
    return functools.reduce(jnp.add, jax.tree.leaves(parts))


def like(rng: np.random.Generator, x: Any) -> np.ndarray:
    """Normal numbers, complex too, in the shape and kind of ``x``; zeros if it is no such array."""
    if not is_inexact(x):
        return np.zeros(x.shape, x.dtype)
    draw = rng.normal(size=x.shape)
    return (draw + 1j * rng.normal(size=x.shape) if jnp.issubdtype(x.dtype, jnp.complexfloating) else draw).astype(
        x.dtype
    )


def zeros(tree: PyTree) -> PyTree:
    return jax.tree.map(np.zeros_like, on_host(tree))


def added(one: PyTree, other: PyTree) -> PyTree:
    return jax.tree.map(np.add, on_host(one), on_host(other))
