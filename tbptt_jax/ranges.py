"""Tokens and labels out of range, found before compute.

A gather in JAX takes an index below zero for one from the end, and for one past it has NaN or the last there is: a token -1 is
the last of the vocabulary, and a label of 5 among 5 classes a loss that is not a number, without a word. Whether a model looks
its inputs up in a table, or a loss its labels among the outputs, is found out by what they do with a few numbers, not by how
they are written; so a loss that has its own use for -100 is left alone.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tbptt_jax.arrays import on_host
from tbptt_jax.recurrence import Recurrence
from tbptt_jax.step_by_step import some_numbers
from tbptt_jax.window import Window, is_scored

PyTree = Any
MOST = 16  # labels out of range that are tried


class _Kind(NamedTuple):
    """What the verdicts are kept by: shapes and dtypes, those of the window for one step of one lane."""

    model: Recurrence
    tree: Any
    leaves: tuple

    def shapes(self) -> tuple[PyTree, Window]:
        """``(params, window)``."""
        return jax.tree.unflatten(self.tree, [jax.ShapeDtypeStruct(*leaf) for leaf in self.leaves])


def check_ranges(model: Recurrence, loss: Any, params: PyTree, window: Window, axes: tuple[str, ...]) -> None:
    """Raises a ``ValueError`` for a token or label that a table of the model, or the outputs, does not have.

    Args:
      model: the recurrence.
      loss: ``(outputs, window) -> [lanes, time]`` or a tree.
      params: its parameters, of which only shapes and dtypes are used.
      window: with the leading ``axes``; looked at only in the host's memory. Padding is not, nor labels that are not scored.
      axes: ``("lanes", "time")``, or with the windows before them.
    """
    read = (window.inputs, window.targets)
    if not any(jnp.issubdtype(x.dtype, jnp.integer) for x in jax.tree.leaves(read)):
        return
    if not all(map(on_host, jax.tree.leaves(window))):
        return
    one_step = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, 1, *x.shape[len(axes) :]), x.dtype), window)
    leaves, tree = jax.tree.flatten((params, one_step))
    kind = _Kind(model, tree, tuple((jnp.shape(x), jnp.result_type(x)) for x in leaves))
    with jax.ensure_compile_time_eval():  # in a program that holds the window as a constant, too
        _check_tokens(kind, window, axes)
        _check_labels(kind, loss, window, axes)


def _check_tokens(kind: _Kind, window: Window, axes: tuple[str, ...]) -> None:
    for i, x in enumerate(jax.tree.leaves(window.inputs)):
        if not jnp.issubdtype(x.dtype, jnp.integer) or not x.size:
            continue
        x = np.asarray(x)
        if window.valid is not None:
            x = np.where(_like(np.asarray(window.valid), x), x, 0)
        sizes = _sizes(kind, x.dtype)
        if not sizes or 0 <= x.min() <= x.max() < sizes[0]:
            continue
        wraps, ends = _tables(kind, i)
        least = wraps if x.min() < 0 else ends
        if least is not None and (x.min() < 0 or x.max() >= least):
            bad = (x < 0) | (x >= (ends or np.inf))
            _refuse("inputs", bad, x, axes, "the model looks it up in a table of", least, "rows", "padding")


def _check_labels(kind: _Kind, loss: Any, window: Window, axes: tuple[str, ...]) -> None:
    targets = enumerate(jax.tree.leaves(window.targets))
    labelled = [(i, np.asarray(x)) for i, x in targets if jnp.issubdtype(x.dtype, jnp.integer)]
    classes = _classes(kind) if labelled else ()
    labelled = [(i, x) for i, x in labelled if classes and x.size and not 0 <= x.min() <= x.max() < classes[0]]
    if not labelled:
        return
    masks = Window(jax.tree.leaves(window.inputs)[0], weights=window.weights, valid=window.valid)
    by_lane = jax.tree.map(lambda x: x.reshape(-1, *x.shape[len(axes) - 1 :]), masks)
    scored = np.asarray(is_scored(by_lane)).reshape(masks.inputs.shape[: len(axes)])
    for i, labels in labelled:
        for n in classes:
            bad = ((labels < 0) | (labels >= n)) & _like(scored, labels)
            values, first = np.unique(labels[bad], return_index=True)
            values, places = values[:MOST], np.argwhere(bad)[first[:MOST]]
            if not values.size:
                continue
            others = _are_others(kind, loss, window, i, places[:, : len(axes)], values, n)
            for value in values[others]:
                what = "the loss looks it up among"
                _refuse(
                    "targets", bad & (labels == value), labels, axes, what, n, "classes", "not scored, with weight 0"
                )


def _like(mask: np.ndarray, x: np.ndarray) -> np.ndarray:
    return mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))


def _refuse(
    field: str, bad: np.ndarray, x: np.ndarray, axes: tuple[str, ...], what: str, n: int, of: str, out: str
) -> None:
    place = np.argwhere(bad)[0]
    where = ", ".join(f"{name} {i}" for name, i in zip(axes, place, strict=False))
    count = int(bad.reshape(*bad.shape[: len(axes)], -1).any(-1).sum())
    raise ValueError(
        f"`{field}` is {x[tuple(place)]} at {where} ({count} such steps), and {what} {n} {of}, 0 to {n - 1}. Number them "
        f"within these, or mark the step as {out}."
    )


def _sizes(kind: _Kind, dtype: Any) -> list[int]:
    """The rows that a table of the model may have, fewer than ``dtype`` has numbers."""
    params, _ = kind.shapes()
    rows = {p.shape[0] for p in jax.tree.leaves(params) if len(p.shape) > 1}
    return sorted(n for n in rows if 1 < n <= np.iinfo(dtype).max)


@functools.lru_cache(maxsize=256)
def _classes(kind: _Kind) -> tuple[int, ...]:
    """The lengths of the outputs' last axes."""
    outputs = _outputs(kind)
    return tuple(sorted({y.shape[-1] for y in jax.tree.leaves(outputs) if len(y.shape) > 2 and y.shape[-1] > 1}))


def _outputs(kind: _Kind) -> PyTree:
    params, window = kind.shapes()
    unroll = lambda p, x: kind.model.unroll(p, kind.model.initial_carry(p, 1), x)[1]  # noqa: E731
    return jax.eval_shape(unroll, params, window.inputs)


@functools.lru_cache(maxsize=256)
def _tables(kind: _Kind, which: int) -> tuple[int | None, int | None]:
    """The rows of the smallest table that the model looks up its ``which``-th input in, if it does, and of the smallest that
    it knows the end of: a gather that takes -1 for the last may be of one with a mode for what is past it."""
    params, window = kind.shapes()
    dtype = jax.tree.leaves(window.inputs)[which].dtype
    sizes = _sizes(kind, dtype)
    signed = np.issubdtype(dtype, np.signedinteger)
    values = np.array(
        [(0, n - 2, n - 1, n, min(n + 1, np.iinfo(dtype).max), -signed, -2 * signed) for n in sizes]
    ).astype(dtype)
    rng = np.random.default_rng(0)

    def read(params: PyTree, values: np.ndarray) -> jax.Array:
        """What comes of the values, in the outputs and the carry, a row for each."""
        lanes = values.size
        leaves, tree = jax.tree.flatten(window.inputs)
        probes = [jnp.zeros((lanes, *x.shape[1:]), x.dtype) for x in leaves]
        probes[which] = probes[which] + values.reshape(-1, *[1] * (probes[which].ndim - 1))
        start = kind.model.initial_carry(params, lanes)
        ends = jax.tree.leaves(kind.model.unroll(params, start, jax.tree.unflatten(tree, probes)))
        return jnp.concatenate(
            [jnp.stack([y.real, y.imag], -1).reshape(lanes, -1) for y in ends if jnp.issubdtype(y.dtype, jnp.inexact)],
            -1,
        )

    with jax.ensure_compile_time_eval():
        params = jax.tree.map(lambda x: jnp.asarray(some_numbers(rng, x.shape, x.dtype)), params)
        known = np.asarray(jax.jit(read)(params, values.ravel())).reshape(*values.shape, -1)
        zero, last, end, past, further, minus, before = known.swapaxes(0, 1)
        fine = np.isfinite(end).all(1) & np.isfinite(last).all(1) & (end != last).any(1)
        wraps = fine & (end == minus).all(1) & (last == before).all(1) & signed & ~(past == zero).all(1)  # no remainder
        clamps = fine & (end == past).all(1) & (end == further).all(1) & (wraps | (not signed))
        beyond = fine & np.isnan(past).any(1)
        for i in np.flatnonzero(clamps):
            clamps[i] = _is_gather(lambda p, v: read(p, np.asarray([v], dtype)), params, sizes[i])
            wraps[i] &= clamps[i]
    ends = beyond | clamps
    smallest = [
        min((n for n, there in zip(sizes, which, strict=True) if there), default=None) for which in (ends | wraps, ends)
    ]
    return smallest[0], smallest[1]


def _is_gather(of: Callable[[PyTree, int], jax.Array], table: PyTree, n: int) -> bool:
    """Whether it is the gather that takes ``n`` for the last of ``n``, and not a ``minimum``: it sends no gradient back."""
    leaves, tree = jax.tree.flatten(table)
    inexact = [jnp.issubdtype(x.dtype, jnp.inexact) for x in leaves]
    moving = [x for x, moves in zip(leaves, inexact, strict=True) if moves]

    def total(moving: list[jax.Array], value: int) -> jax.Array:
        numbers = iter(moving)
        whole = [next(numbers) if moves else x for x, moves in zip(leaves, inexact, strict=True)]
        return jnp.sum(of(jax.tree.unflatten(tree, whole), value))

    one, other = ([np.asarray(x) for x in jax.grad(total)(moving, value)] for value in (n, n - 1))
    known = any(x.any() for x in other)
    return not known or any((a != b).any() for a, b in zip(one, other, strict=True))


def _are_others(
    kind: _Kind, loss: Any, window: Window, which: int, places: np.ndarray, values: np.ndarray, classes: int
) -> np.ndarray:
    """Whether the loss takes each label out of range, at its place, for one of the classes, or has no number for it."""
    draws, end = 3, classes - 1
    at = tuple(np.repeat(places, draws, 0).T)
    steps = jax.tree.map(lambda x: x[at][:, None], window)  # [values * draws, 1, ...]
    leaves, tree = jax.tree.flatten(steps.targets)
    value = np.repeat(values, draws)
    rng = np.random.default_rng(0)

    def draw(y: jax.ShapeDtypeStruct) -> jax.Array:
        """From 0 to 1, so that they may be probabilities, or logits; two in three have a largest to be right about."""
        drawn = rng.uniform(0.1, 0.6, (len(value), *y.shape[1:]))
        if y.shape[-1:] == (classes,):
            rows = np.arange(0, len(value), draws)
            drawn[rows + 1, ..., values % classes] = drawn[rows + 2, ..., end] = 0.9
        return jnp.asarray(drawn, y.dtype)

    def of(drawn: PyTree, label: Any) -> list[jax.Array]:
        labels, x = [*leaves], leaves[which]
        now = np.broadcast_to(label, value.shape)
        labels[which] = jnp.where(x == _like(value, x), _like(now, x), x).astype(x.dtype)
        losses = loss(drawn, steps._replace(targets=jax.tree.unflatten(tree, labels)))
        return [jnp.asarray(figure, float) for figure in jax.tree.leaves(losses)]

    others = np.zeros(len(values), bool)
    with jax.ensure_compile_time_eval():
        drawn = jax.tree.map(draw, _outputs(kind))
        try:
            labels = (value, value % classes, (value + 1) % classes, -1, end, end - 1, classes, 0)
            known = [of(drawn, label) for label in labels]
            for i, figure in enumerate(zip(*known, strict=True)):
                by_value = (np.asarray(x).reshape(len(values), draws) for x in figure)
                given, alias, another, minus, last, before, past, first = by_value
                tells = ~np.isnan(alias).any(1) & (alias != another).any(1)
                wraps = (values < 0) & (given == alias).all(1) & (past != first).any(1)  # no remainder
                clamps = (values > 0) & ((given == last) & (minus == last)).all(1) & (last != before).any(1)
                if clamps.any():
                    clamps &= _is_gather(functools.partial(lambda i, *args: of(*args)[i], i), drawn, classes)
                others |= tells & (np.isnan(given).any(1) | wraps | clamps)
        except Exception:  # a loss that reads more than one step
            return others
    return others
