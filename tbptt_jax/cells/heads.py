"""What cells with heads share: their sizes, their norms, and where some of their parameters begin."""

import jax
import jax.numpy as jnp
from jax import lax

from tbptt_jax.arrays import at_least_float32, check_whole, scale


def check_parts(parts: str, count: int, **sizes: int) -> None:
    """Raises a ``ValueError`` unless the count and the sizes are whole numbers, at least 1, and each size a multiple of it."""
    check_whole(parts, count)
    for name, size in sizes.items():
        check_whole(name, size)
        if size % count:
            raise ValueError(
                f"`{name}` is {size} and `{parts}` is {count}; its parts are equal, so that it needs to be a multiple of {count}."
            )


def head_sizes(features: int, heads: int, key_size: int | None, value_size: int | None) -> tuple[int, int]:
    """The sizes of a head's keys and values, each an equal part of ``features`` where it is None.

    Raises:
      ValueError: if one is no whole number, at least 1, or there are no equal parts.
    """
    if key_size is None or value_size is None:
        check_parts("heads", heads, features=features)
    sizes = [features // heads if size is None else size for size in (key_size, value_size)]
    for name, size in zip(("features", "heads", "key_size", "value_size"), (features, heads, *sizes), strict=True):
        check_whole(name, size)
    return sizes[0], sizes[1]


def split(x: jax.Array, heads: int) -> jax.Array:
    """``[..., heads * n] -> [..., heads, n]``."""
    return x.reshape(*x.shape[:-1], heads, -1)


def merge(x: jax.Array) -> jax.Array:
    """``[..., heads, n] -> [..., heads * n]``."""
    return x.reshape(*x.shape[:-2], -1)


def initial_step_bias(key: jax.Array, heads: int) -> jax.Array:
    """``[heads]``, of which softplus is from 0.001 to 0.1, its logarithm uniform (Gu & Dao 2023, *Mamba*, section 3.6)."""
    steps = jnp.exp(jax.random.uniform(key, (heads,), minval=jnp.log(0.001), maxval=jnp.log(0.1)))
    return jnp.log(jnp.expm1(steps))


def initial_log_rate(key: jax.Array, heads: int) -> jax.Array:
    """``[heads]``, the logarithm of rates uniform from 1 to 16."""
    return jnp.log(jax.random.uniform(key, (heads,), minval=1.0, maxval=16.0))


def unit(x: jax.Array, epsilon: float = 1e-6) -> jax.Array:
    """x / √(‖x‖² + ε) over the last axis: of length 1, and 0 where x is."""
    wide = x.astype(at_least_float32(x.dtype))
    return scale(wide, lax.rsqrt((wide * wide).sum(-1) + epsilon)).astype(x.dtype)


def rms_norm(x: jax.Array, gain: jax.Array, epsilon: float) -> jax.Array:
    """x / √(mean x² + ε) over the last axis, times ``gain`` (Zhang & Sennrich 2019)."""
    wide = x.astype(at_least_float32(x.dtype))
    return scale(wide, lax.rsqrt((wide * wide).mean(-1) + epsilon)).astype(x.dtype) * gain


def head_norm(x: jax.Array, gain: jax.Array, epsilon: float = 1e-5) -> jax.Array:
    """Each head of ``x [..., heads, n]`` with mean 0 and variance 1, merged, times ``gain [heads * n]`` (Wu & He 2018)."""
    wide = x.astype(at_least_float32(x.dtype))
    wide = wide - wide.mean(-1, keepdims=True)
    return merge(scale(wide, lax.rsqrt((wide * wide).mean(-1) + epsilon))).astype(x.dtype) * gain
