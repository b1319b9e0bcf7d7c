"""Trees of arrays ``[lanes, time, ...]``: what is asked of them, done with them, and said where it cannot be."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any
Array = jax.Array | np.ndarray


def same_tree(one: PyTree, other: PyTree) -> bool:
    return bool(jax.tree.structure(one) == jax.tree.structure(other))  # type: ignore[operator]


def is_leaf(tree: PyTree) -> bool:
    return jax.tree_util.treedef_is_leaf(jax.tree.structure(tree))


def on_host(x: Array) -> bool:
    if isinstance(x, jax.core.Tracer):
        return False
    return not isinstance(x, jax.Array) or (
        x.is_fully_addressable and all(device.platform == "cpu" for device in x.devices())
    )


def at_least_float32(dtype: Any) -> Any:
    """The dtype in which numbers of this one are added up: sums of half precision overflow, or stand still."""
    return jnp.promote_types(dtype, jnp.float32)


def where_lanes(condition: Array, yes: PyTree, no: PyTree) -> PyTree:
    """``jnp.where`` on trees: ``condition`` ``[lanes]`` or ``[lanes, time]`` chooses whole rows of leaves that begin so."""

    def choose(yes: jax.Array, no: jax.Array) -> jax.Array:
        return jnp.where(condition.reshape(condition.shape + (1,) * (yes.ndim - condition.ndim)), yes, no)

    return jax.tree.map(choose, yes, no)


def scale(x: jax.Array, by: jax.Array) -> jax.Array:
    """``x [..., n]`` times ``by [...]``, as a product: of its gradient XLA's sum over n takes a CPU a seventh of the time, where
    an axis has one entry.
    """
    return jnp.einsum("...n,...->...n", x, by)


def pad(x: Array, axis: int, amount: int, value: float = 0) -> Array:
    """``x`` with ``amount`` more entries of ``value`` at the end of ``axis``; typed keys are filled up with zeros."""
    if not amount:
        return x
    xp = np if isinstance(x, np.ndarray) else jnp
    shape = (*x.shape[:axis], amount, *x.shape[axis + 1 :])
    more = xp.full(shape, value, x.dtype) if value else xp.zeros(shape, x.dtype)
    return xp.concatenate([x, more], axis)


def check_array(field: str, leaf: Any) -> None:
    """Raises a ``ValueError`` unless ``leaf`` is an array whose every entry means what it says."""
    kind, owner = type(leaf).__name__, type(leaf).__module__.partition(".")[0]
    if isinstance(leaf, np.ma.MaskedArray):
        raise ValueError(
            f"`{field}` is a masked array, and its mask would be lost: give `x.filled(0)`, and say with `valid` which steps are "
            "there, or with `weights` (0 where it is masked) which are scored."
        )
    if not isinstance(leaf, np.ndarray | np.generic | jax.Array | jax.ShapeDtypeStruct) or isinstance(leaf, np.matrix):
        of = "a Python" if owner == "builtins" else f"of {owner}, a"
        raise ValueError(f"`{field}` holds {quoted(leaf)}, {of} {kind}; give arrays of numbers, as `np.asarray` makes.")
    key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    if not (key or jnp.issubdtype(leaf.dtype, jnp.number) or leaf.dtype == bool):
        raise ValueError(
            f"`{field}` has dtype {leaf.dtype}, which nothing can be computed with; give numbers: `np.asarray(x, np.float32)`, "
            "or, of names or dates, numbers that stand for them."
        )


def check_whole(name: str, value: int, hint: str = "") -> None:
    """Raises a ``ValueError`` unless ``value`` is a whole number, at least 1."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"`{name}` is {value!r}; it needs to be a whole number, at least 1.{hint}")


def check_number(name: str, value: Any) -> None:
    """Raises a ``ValueError`` unless ``value`` is one real number."""
    x = np.asarray(value) if np.ndim(value) == 0 else None
    if (
        x is None
        or x.dtype == bool
        or not (jnp.issubdtype(x.dtype, jnp.floating) or jnp.issubdtype(x.dtype, jnp.integer))
    ):
        raise ValueError(f"`{name}` is {quoted(value)}; it needs to be a number.")


def check_tolerance(tolerance: float) -> None:
    """Raises a ``ValueError`` unless ``tolerance`` is a positive number."""
    check_number("tolerance", tolerance)
    if not tolerance > 0:
        raise ValueError(f"`tolerance` is {tolerance}; it needs to be positive, such as 0.1 for a bias of a tenth.")


def quoted(x: Any) -> str:
    """``repr(x)`` on one line of at most 80 characters."""
    return shortened(" ".join(repr(x).split()))


def shortened(text: str) -> str:
    """``text``, or as much of it as goes into 80 characters."""
    return text if len(text) <= 80 else f"{text[:77]}..."
