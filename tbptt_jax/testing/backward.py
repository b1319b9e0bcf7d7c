"""Laws of a model's gradient: it is the slope, edges scale it, and influences that know all of the past are exact."""

import inspect
from typing import Any

import jax
import numpy as np

from tbptt_jax.arrays import PyTree
from tbptt_jax.cutting import split
from tbptt_jax.gradient import gradient, of_real
from tbptt_jax.influence import Influence, replay, rtrl
from tbptt_jax.noise import window_keys
from tbptt_jax.step_by_step import quickly
from tbptt_jax.testing.comparing import agree, first_difference, on_host
from tbptt_jax.testing.subject import (
    Subject,
    added,
    filled,
    masked,
    numbers,
    only,
    padding,
    point,
    weighed,
    weights_of,
    window_of,
    zeros,
)
from tbptt_jax.window import Window

STEPS = (1e-2, 1e-3), (1e-3, 1e-4)  # of differences, in float32 and in float64: the second where the first meets a kink


def slope(s: Subject) -> None:
    """The gradient of parameters, carry and inputs is what differences say, and padding has none."""
    window = _window(s)
    to = weights_of(s, window)
    at = on_host(point(s, s.carry, window))
    found = on_host(s.pull(at, s.params, s.carry, window, None, to)[0])
    for path, g in jax.tree.leaves_with_path(found):
        if not np.isfinite(g).all():
            raise AssertionError(
                f"Gradient: that of {jax.tree_util.keystr(path)} is not finite, in a window with padding, which is read as "
                "zeros: what has no slope at 0, such as x / ‖x‖ or √x, needs something added under its root."
            )
    for name, rubbish in filled(window):
        held = on_host(point(s, s.carry, rubbish))
        got = s.pull(held, s.params, s.carry, rubbish, None, to)[0]
        agree(f"Padding: where it holds {name} the gradient is another", got, found, s.tolerance)
    if s.tolerance > 1e-3:
        return  # too few digits for differences

    def total(at: PyTree) -> float:
        _, (end, outputs) = s.pull(at, s.params, s.carry, window, None, to)
        there = masked(window, on_host(numbers(outputs)))
        return _dot(to, (there, on_host(numbers(end))))

    leaves, tree = jax.tree.flatten(at)
    along = [s.rng.normal(size=x.shape) for x in leaves]
    slopes = jax.tree.leaves_with_path(found)
    sizes = [float(np.abs(g * a).sum()) for (_, g), a in zip(slopes, along, strict=True)]
    for i, (path, g) in enumerate(slopes):

        def beside(h: float, i: int = i) -> float:
            moved = (leaves[i] + h * along[i]).astype(leaves[i].dtype)
            return total(jax.tree.unflatten(tree, [*leaves[:i], moved, *leaves[i + 1 :]]))

        told, off = _dot(g, along[i]), s.tolerance**0.5 * (sizes[i] + 0.01 * max(sizes))
        for h in STEPS[s.tolerance < 1e-7]:
            measured = (8 * (beside(h) - beside(-h)) - (beside(2 * h) - beside(-2 * h))) / (12 * h)
            if abs(measured - told) <= off:
                break
        else:
            raise AssertionError(
                f"Gradient: that of {jax.tree_util.keystr(path)} is not the slope (along some direction {told:.6g} against "
                f"{measured:.6g} by differences)."
            )


def edges(s: Subject) -> None:
    """What goes back through the carry into a step is scaled by the step's edge."""
    window = _window(s)
    if window.edges is None:
        return
    (to_outputs, to_carry), length = weights_of(s, window), _length(s)
    before = np.arange(length) < length // 2

    def pulled(edge: float, window: Window, carry: PyTree, to: PyTree) -> tuple[PyTree, tuple]:
        scales = np.where(np.arange(length) == length // 2, edge, np.ones((s.shape[0], 1)))
        window = window._replace(edges=scales)
        found, ends = s.pull(point(s, carry, window), s.params, carry, window, None, to)
        return on_host(found), ends

    first, (between, _) = pulled(1, only(window, before), s.carry, (to_outputs, zeros(to_carry)))
    second, _ = pulled(1, only(window, ~before), between, (to_outputs, to_carry))
    cut = added(first, {**second, "carry": zeros(second["carry"])})
    none, half, one = (pulled(edge, window, s.carry, (to_outputs, to_carry))[0] for edge in (0, 0.5, 1))
    middle = jax.tree.map(lambda a, b: (a + b) / 2, none, one)
    claim = f"Edges: with an edge of {{}} into step {length // 2} the gradient is not {{}}"
    agree(claim.format(0, "that of two windows, cut there"), none, cut, s.tolerance)
    agree(claim.format("1/2", "half way between those of 0 and 1"), half, middle, s.tolerance)


def past(s: Subject) -> None:
    """``replay`` of all windows and ``rtrl`` give the gradient of backpropagation through the whole stream."""
    if not jax.tree.leaves(numbers(s.carry)) or not jax.tree.leaves(s.params):
        return
    resets = np.zeros(s.shape, bool)
    resets[:, 0] = resets[0, -2] = True
    whole = window_of(s, resets, padding(s))
    cut = split(whole._replace(targets=weights_of(s, whole)[0]), _length(s))
    windows = [jax.tree.map(lambda x, n=n: x[n], cut) for n in range(-(-s.shape[1] // _length(s)))]
    claim = "Past: the gradient of {} is not that of backpropagation through the whole stream"
    both = replay(len(windows)), rtrl()
    got, keys = _summed(s, _mean(*both), windows)  # one program, as long as both are right
    full = _full(s, windows, keys)
    if first_difference(got, full, s.tolerance):
        for influence, name in zip(both, ("`replay` of all windows", "`rtrl`"), strict=True):
            agree(claim.format(name), _summed(s, influence, windows)[0], full, s.tolerance)
    agree(claim.format("`replay` and `rtrl`"), got, full, s.tolerance)


def _mean(*influences: Influence) -> Influence:
    """Their mean; what each knows of the past it knows by itself."""

    def init(*args: PyTree) -> tuple:
        return tuple(each.init(*args) for each in influences)

    def pullback(states: tuple, carry_cotangent: PyTree) -> PyTree:
        found = [each.pullback(state, carry_cotangent) for each, state in zip(influences, states, strict=True)]
        return jax.tree.map(lambda *g: sum(g) / len(g), *found)

    def push(states: tuple, *args: Any) -> tuple:
        return tuple(each.push(state, *args) for each, state in zip(influences, states, strict=True))

    return Influence(init, pullback, push)


def _summed(s: Subject, influence: Influence, windows: list[Window]) -> tuple[PyTree, list]:
    """The gradients of all windows, added up, and the keys that the model was given."""
    estimate = gradient(s.model, weighed, influence=influence, normaliser=1.0)
    init, update = quickly(estimate.init), quickly(estimate.update)
    state = init(jax.random.key(0), s.params, windows[0])
    total, keys = zeros(s.params), []
    for window in windows:
        keys.append(window_keys(s.model.unroll, state.key, s.shape[0]))
        found, state, _ = update(s.params, state, window)
        total = added(total, found)
    return total, keys


def _full(s: Subject, windows: list[Window], keys: list) -> PyTree:
    """Backpropagation through all windows: from the last to the first."""
    start = s.model.initial_carry(s.params, s.shape[0])
    back, passed = zeros(numbers(start)), [start]

    def pulled(n: int, back: PyTree) -> tuple[PyTree, tuple]:
        window, carry = _with_edges(s, windows[n]._replace(targets=None)), passed[n]
        return s.pull(point(s, carry, window), s.params, carry, window, keys[n], (windows[n].targets, back))

    for n in range(len(windows) - 1):
        passed.append(pulled(n, back)[1][0])
    total = zeros(numbers(s.params))
    for n in reversed(range(len(windows))):
        found, _ = pulled(n, back)
        total, back = added(total, found["params"]), on_host(found["carry"])
    return jax.tree.map(np.conj, on_host(of_real(total, s.params)))  # as jax.grad has it


def _length(s: Subject) -> int:
    """Of three windows, the last of which may be padded."""
    return max(2, -(-s.shape[1] // 3))


def _window(s: Subject) -> Window:
    """One of these, with a reset and padding in it; with edges of 1, if the model takes edges."""
    resets, valid = np.zeros((2, *s.shape), bool)
    resets[0, _length(s) // 2] = True
    valid[-1, 0] = True
    return _with_edges(s, window_of(s, resets, ~valid, _length(s)))


def _with_edges(s: Subject, window: Window) -> Window:
    takes = "edges" in inspect.signature(s.model.unroll).parameters
    return window._replace(edges=np.ones((s.shape[0], _length(s)))) if takes else window


def _dot(one: Any, other: Any) -> float:
    parts = jax.tree.map(lambda a, b: np.sum(np.asarray(a, np.float64) * np.asarray(b, np.float64)), one, other)
    return float(sum(jax.tree.leaves(parts)))
