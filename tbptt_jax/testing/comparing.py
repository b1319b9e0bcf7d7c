"""Two results, and the first place where they are not the same."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tbptt_jax.arrays import PyTree
from tbptt_jax.noise import is_key

TOLERANCES = {"float64": 1e-10, "float32": 5e-5, "float16": 2e-2, "bfloat16": 1e-1}


class Place(NamedTuple):
    """Where two results are not the same.

    Attributes:
      where: in words.
      lane: of it, -1 where there are no lanes.
      step: of it, -1 where there are no steps.
    """

    where: str
    lane: int = -1
    step: int = -1


def tolerance_of(*trees: PyTree) -> float:
    """What two ways to the same number may differ by, for the coarsest kind of number in the trees."""
    kinds = [jnp.finfo(jnp.result_type(x)).dtype.name for x in jax.tree.leaves(trees) if is_inexact(x)]
    return max((TOLERANCES.get(kind, TOLERANCES["bfloat16"]) for kind in kinds), default=0.0)


def is_inexact(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def on_host(tree: PyTree) -> PyTree:
    """NumPy's arrays; of typed keys, their words."""
    return jax.tree.map(lambda x: np.asarray(jax.random.key_data(x) if is_key(x) else x), tree)


def rows(tree: PyTree, *index: Any) -> PyTree:
    """``x[index]`` of every leaf, on the host but for typed keys."""
    return jax.tree.map(lambda x: (x if is_key(x) else np.asarray(x))[index], tree)


def shapes(tree: PyTree) -> str:
    return str(jax.tree.map(lambda x: f"{jnp.result_type(x)}{list(jnp.shape(x))}", tree))


def agree(
    claim: str, got: PyTree, expected: PyTree, tolerance: float, of: str = "", where: np.ndarray | None = None
) -> None:
    """Raises an ``AssertionError``, ``claim`` with the first place where ``got`` is not ``expected``."""
    place = first_difference(got, expected, tolerance, of, where)
    if place is not None:
        raise AssertionError(f"{claim} ({place.where}).")


def first_difference(
    got: PyTree, expected: PyTree, tolerance: float, of: str = "", where: np.ndarray | None = None
) -> Place | None:
    """The first place where two trees differ: of the earliest step, and there of the first lane.

    Args:
      got: a tree of arrays.
      expected: what it needs to be.
      tolerance: of numbers, relative to the largest of their array; others need to be the same.
      of: what the first axes are: ``""``, ``"lanes"``, ``"lanes, time"``, or ``"time"`` of one lane.
      where: which lanes, or lanes and steps, count. None: all.
    """
    if shapes(got) != shapes(expected):
        return Place(f"they are {shapes(got)} against {shapes(expected)}")
    names = [{"lanes": "lane", "time": "step"}[axis] for axis in of.split(", ") if axis]
    axes = len(names)
    leaves = jax.tree.leaves(on_host(expected))
    largest = max((_largest(e) for e in leaves if is_inexact(e)), default=0.0)
    found = []  # of each array
    for (path, a), e in zip(jax.tree.leaves_with_path(on_host(got)), leaves, strict=True):
        if is_inexact(a):
            a, e = (x.astype(np.promote_types(x.dtype, np.float32)) for x in (a, e))
            with np.errstate(invalid="ignore", over="ignore"):
                bad = ~(np.abs(a - e) <= tolerance * (_largest(e) + 0.1 * min(largest, 1.0)))
        else:
            bad = a != e
        if where is not None:
            bad &= where.reshape(*where.shape, *[1] * (bad.ndim - where.ndim))
        if bad.any():
            of_step = names.index("step") if "step" in names else axes
            at = min(np.argwhere(bad).tolist(), key=lambda at: (at[of_step:axes], at))
            found.append((at[of_step:axes], at[:axes], jax.tree_util.keystr(path), a[tuple(at)], e[tuple(at)]))
    if not found:
        return None
    _, at, name, a, e = min(found, key=lambda each: each[:2])
    at_axes = dict(zip(names, at, strict=True))
    place = ", ".join(f"{axis} {i}" for axis, i in at_axes.items())
    words = [f"in {name}"] * bool(name) + [f"at {place}"] * bool(place) + [f"{_shown(a)} against {_shown(e)}"]
    return Place(f"first difference {', '.join(words)}", **at_axes)


def _shown(x: Any) -> str:
    return f"{x:.6g}" if is_inexact(x) else str(x)


def _largest(x: np.ndarray) -> float:
    x = np.abs(x.astype(np.complex128 if np.iscomplexobj(x) else np.float64))
    return float(np.max(x, where=np.isfinite(x), initial=0.0))
