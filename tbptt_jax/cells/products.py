"""What a fused window is made of: products laid out for a loop, and steps of arrays ``[lanes, time, ...]``."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from tbptt_jax.arrays import where_lanes


def dot(dtype: Any, a: jax.Array, b: jax.Array) -> jax.Array:
    """``a [..., k] @ b [k, n]``: operands in ``dtype``, sums and result in that of ``a``.

    The product is one of two matrices: of the gradient of another XLA lays out the operands anew, which takes a CPU longer than
    the product.
    """
    result = a.dtype
    if dtype is not None:
        a, b = a.astype(dtype), b.astype(dtype)
    rows = a.reshape(-1, a.shape[-1])
    product = lax.dot_general(rows, b, (((1,), (0,)), ((), ())), preferred_element_type=result)
    return product.reshape(*a.shape[:-1], b.shape[1])


def times(dtype: Any, w: jax.Array, lanes: int) -> Callable[[jax.Array], jax.Array]:
    """``x [lanes, k] -> x @ w``, for a loop: ``w [k, n]`` is laid out before it, as the products read it fastest.

    Where the layouts change places was found on two cores with 32 MiB of cache, by products of 8 to 64 rows with the
    weights of 512 to 2048 units; ``python -m benchmarks.speed --parts=window`` has shapes on either side.
    """
    on_cpu = jax.default_backend() == "cpu" and dtype is None and w.dtype == jnp.float32
    return _times_tiles(w) if on_cpu and w.nbytes >= 16 << 20 and lanes <= 32 else _times_rows(dtype, w)


def _times_rows(dtype: Any, w: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """Rows filled up to whole vectors of 16: of rows of 1150 floats a product reads a sixth slower than of 1152."""
    n = w.shape[1]
    w = jnp.pad(w if dtype is None else w.astype(dtype), ((0, 0), (0, -n % 16)))
    return lambda x: dot(dtype, x, w)[:, :n]


def _times_tiles(w: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """Tiles of 64 columns, each in one piece of memory.

    A CPU's product of few rows goes through ``w`` 64 columns at a time, from row to row: once ``w`` no longer fits into the
    caches, each row of a wide ``w`` is a jump that no prefetch foresees, and a tile is a straight line. The tiles are a
    batch whose every product has the same x; in quarters of k that are then summed, because XLA hands a sum over to the
    library with the products and the repetition of x before it, and would else write x out again for every tile. Two
    halves of the columns, so that two cores have as much to do.
    """
    k, n = w.shape
    w = jnp.pad(w, ((0, -k % 4), (0, -n % 128)))
    # In this order one pass over w does it: [half, tile, quarter, k / 4, 64].
    tiles = w.reshape(len(w), -1, 64).swapaxes(0, 1).reshape(2, -1, 4, len(w) // 4, 64)

    def times(x: jax.Array) -> jax.Array:
        quarters = jnp.pad(x, ((0, 0), (0, -k % 4))).reshape(len(x), 4, -1).swapaxes(0, 1)
        repeated = jnp.broadcast_to(quarters, (*tiles.shape[:2], *quarters.shape))
        product = lax.dot_general(repeated, tiles, (((4,), (3,)), ((0, 1, 2), (0, 1, 2)))).sum(2)
        return product.transpose(2, 0, 1, 3).reshape(len(x), -1)[:, :n]

    return times


def over_steps(dtype: Any, a: jax.Array, b: jax.Array) -> jax.Array:
    """``[lanes, time, m]``, ``[lanes, time, n]`` → ``[m, n]``, summed over lanes and steps: a weight's gradient."""
    return dot(dtype, a.reshape(-1, a.shape[-1]).T, b.reshape(-1, b.shape[-1]))


def zero_where(tree: tuple, reset: jax.Array | None) -> tuple:
    """Zeros where ``reset``, ``[lanes]`` or ``[lanes, time]``, is True."""
    return tree if reset is None else where_lanes(reset, jax.tree.map(jnp.zeros_like, tree), tree)


def at(x: jax.Array | None, t: jax.Array) -> Any:
    return None if x is None else lax.dynamic_index_in_dim(x, t, 1, keepdims=False)


def put(x: jax.Array, value: jax.Array, t: jax.Array) -> jax.Array:
    return lax.dynamic_update_index_in_dim(x, value, t, 1)
