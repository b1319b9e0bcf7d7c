"""Keys for what is drawn in a window: one for each lane, from the lane's own number.

A draw then does not depend on the lanes beside it, or on how many devices and processes read them; and it is the same when a
window is read again. What is drawn once for all lanes, such as which recurrent weights are dropped, comes from
:func:`shared`, which each lane's key holds.
"""

import contextlib
import inspect
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

LANE = "lane"  # the axis of devices over which lanes are spread
LEVELS = 256  # of a rate that bytes are compared with
WINDOW = 0x6E6F6973  # apart from the numbers of lanes and steps that are folded into keys


class Keys(NamedTuple):
    """The keys of a window, or of a segment of it. None: nothing is drawn.

    Attributes:
      window: ``[lanes]``, the same at each step.
      step: ``[lanes, time]``.
    """

    window: jax.Array | None = None
    step: jax.Array | None = None


def lane_keys(key: jax.Array, lanes: int) -> jax.Array:
    """A key for each lane, ``[lanes]``: those of this device, inside :func:`tbptt_jax.sharding.over_lanes`.

    Args:
      key: of the window, the same on all devices that lanes are spread over.
      lanes: how many this device has.
    """
    numbers = jnp.arange(lanes)
    with contextlib.suppress(NameError):  # not spread over devices
        numbers += jax.lax.axis_index(LANE) * lanes
    key = jax.random.fold_in(typed(key), WINDOW)  # the words of keys from small seeds are close to each other
    words = jax.random.key_data(key)
    return _of_words(jnp.broadcast_to(words, (lanes, *words.shape)), words[-1] + numbers.astype(words.dtype), key)


def shared(keys: jax.Array) -> jax.Array:
    """The key, of shape ``[]``, that the lanes of a window share: the same from the keys of all of them and of any one.

    Args:
      keys: ``[lanes]``, as a model's ``unroll`` is given them.
    """
    words = jax.random.key_data(keys)[0]
    return jax.random.fold_in(_of_words(words, jnp.zeros_like(words[-1]), keys), 0)


def fold_in(keys: jax.Array, number: int) -> jax.Array:
    """Other keys of the same lanes, ``[lanes]``, for a part of a model; they have a key of their own to share.

    Args:
      keys: ``[lanes]``, as a model's ``unroll`` is given them.
      number: of the part.
    """
    own = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
    both = jax.random.key_data(jax.random.fold_in(shared(keys), number))
    words = jax.random.key_data(own)
    return _of_words(jnp.broadcast_to(both, words.shape), words[..., -1], keys)


def step_keys(keys: jax.Array, time: int) -> jax.Array:
    """A key for each step of each lane, ``[lanes, time]``.

    Args:
      keys: ``[lanes]``, as a model's ``unroll`` is given them.
      time: steps of the window.
    """
    each = jax.vmap(jax.random.fold_in, (None, 0))
    return jax.vmap(each, (0, None))(keys, jnp.arange(time))


def of_part(keys: Keys, number: int) -> Keys:
    """The keys of a part of a model."""
    if keys.window is None or keys.step is None:
        return keys
    each = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (0, None))
    return Keys(fold_in(keys.window, number), each(keys.step, number))


def level(rate: float) -> int:
    """A rate from 0 to below 1 in 256ths, as :func:`random_bytes` are compared with it; none but 0 is 0."""
    return min(max(round(rate * LEVELS), 1), LEVELS - 1) if rate else 0


def random_bytes(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Bytes ``shape``: at 32 bits a unit, masks of weights or of each step would take a tenth of a window's time, and more."""
    *rows, columns = shape
    words = jax.random.bits(key, (*rows, -(-columns // 4)), jnp.uint32)
    return jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(*rows, -1)[..., :columns]


def window_keys(unroll: Callable, key: jax.Array, lanes: int) -> jax.Array | None:
    """The keys ``[lanes]`` of a window that is trained on, from its stream's key; None for an ``unroll`` that takes none."""
    return lane_keys(key, lanes) if takes_key(unroll) else None


def takes_key(f: Callable) -> bool:
    """Whether a function, such as a model's ``unroll``, can be given a ``key``, and has use for one."""
    if not getattr(f, "draws", True):
        return False
    try:
        return "key" in inspect.signature(f).parameters
    except (TypeError, ValueError):  # of a callable that does not tell
        return False


def drawing(f: Callable, draws: bool) -> Callable:
    """The same function, which takes a key: whether it has use for one. Keys that none has are neither made nor compiled."""
    f.draws = draws  # type: ignore[attr-defined]
    return f


def check_key(key: jax.Array | None, lanes: int) -> None:
    """Raises a ``ValueError`` unless ``key`` is None or has a typed key for each lane."""
    if key is None:
        return
    if not is_key(key) or key.shape != (lanes,):
        raise ValueError(
            f"`key` is {jnp.result_type(key)}{list(jnp.shape(key))}; it needs to be a key for each of "
            f"{lanes} lanes, as `tb.noise.lane_keys(jax.random.key(0), {lanes})` makes them."
        )


def typed(key: jax.Array) -> jax.Array:
    """A key as ``jax.random.key`` makes it, of one that may be as ``jax.random.PRNGKey`` does."""
    return key if is_key(key) else jax.random.wrap_key_data(key)


def is_key(x: jax.Array) -> bool:
    """Whether an array is of typed keys."""
    return jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key)


def _of_words(words: jax.Array, last: jax.Array, like: jax.Array) -> jax.Array:
    """Keys ``[...]`` of their words ``[..., words]``, the last of them replaced: what lanes do not share is in that one."""
    return jax.random.wrap_key_data(words.at[..., -1].set(last), impl=jax.random.key_impl(typed(like)))
