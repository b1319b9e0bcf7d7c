"""The real-gated linear recurrent unit (De et al. 2024, *Griffin: mixing gated linear recurrences with local attention*)."""

from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp

from tbptt_jax.arrays import check_whole
from tbptt_jax.begin import Begun, first_steps
from tbptt_jax.cells.layers import Options, check_inputs, layered
from tbptt_jax.cells.linear_parts import check_ring, check_width, recur, ring
from tbptt_jax.cells.linear_scan import Implementation, Masks, check_implementation
from tbptt_jax.cells.products import dot
from tbptt_jax.noise import Keys
from tbptt_jax.recurrence import Recurrence

EXPONENT = 8  # c
STEEPEST = 1000.0  # slope of a root whose own has no bound


class Weights(NamedTuple):
    """A layer's parameters.

    Attributes:
      log_odds: ``[features]``, Λ, a = σ(Λ).
      gates: ``[heads, features / heads, 2 * features / heads]``, the blocks of the recurrence gate and of the input gate.
      bias: ``[heads, 2 * features / heads]``.
    """

    log_odds: jax.Array
    gates: jax.Array
    bias: jax.Array


def rg_lru(
    features: int,
    *,
    heads: int = 1,
    r_min: float = 0.9,
    r_max: float = 0.999,
    dtype: Any = None,
    implementation: Implementation = None,
    **options: Unpack[Options],
) -> Recurrence:
    """A recurrence of RG-LRU layers: each unit decays at a rate that a gate of the inputs chooses.

        r, i = σ(x W_r + b_r), σ(x W_i + b_i),   a = σ(Λ)^(c r),   h ← a ∘ h + √(1 − a²) ∘ (i ∘ x),   c = 8

    (equations 1 to 4). A layer has as many inputs as units. As in the authors' code (``recurrentgemma``), W_r and W_i are
    block-diagonal, the input of a lane's first step enters whole, with 1 in the place of √(1 − a²), and that root's slope is at
    most 1000; their ``a_param`` is −Λ.

    ``params["cell"]`` is a tuple of :class:`tbptt_jax.cells.rg_lru.Weights`, one a layer; the carry is a tuple of
    :class:`tbptt_jax.begin.Begun`, one a layer: ``carry``, h ``[lanes, features]``, zeros at first, and ``fresh [lanes]``, the
    lanes whose first step comes next. The output is h. From an ``initial_carry`` of other numbers the first step is a ∘ h + i ∘ x.

    Args:
      features: units of each layer, and its inputs.
      heads: blocks of the gates' matrices; it divides ``features``.
      r_min: the least a at first. a² is drawn uniformly, as in that code; in the paper it is a^c that begins there.
      r_max: the largest.
      dtype: dtype of the operands of the products, such as ``jnp.bfloat16``; None: the parameters' dtype.
      implementation: how a window is run: see :func:`tbptt_jax.from_linear`.
      **options: what all cells take: :class:`tbptt_jax.cells.layers.Options`.

    Raises:
      ValueError: now, if ``heads`` does not divide ``features`` or there is no ring; from ``init``, if a layer has another
        number of inputs; else as :func:`tbptt_jax.lstm`.
    """
    check_whole("features", features)
    check_whole("heads", heads)
    if features % heads:
        raise ValueError(f"`heads` is {heads}, which does not divide the {features} features: every head has as many.")
    check_ring(r_min, r_max, 1.0)
    check_implementation(implementation)

    def weights(key: jax.Array, inputs: int) -> Weights:
        check_width("RG-LRU", inputs, features)
        of_a, of_gates = jax.random.split(key)
        nu = jnp.exp(ring(of_a, features, r_min, r_max, 1.0)[0])  # −log a
        width = features // heads
        blocks = jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal", batch_axis=(0,))
        return Weights(
            -jnp.log(jnp.expm1(nu)),
            blocks(of_gates, (heads, width, 2 * width)),
            jnp.zeros((heads, 2 * width)),
        )

    def zeros(weights: Weights, lanes: int) -> Begun:
        return Begun(jnp.zeros((lanes, features), weights.gates.dtype), jnp.ones(lanes, bool))

    def run(
        weights: Weights, carry: Begun, x: jax.Array, *masks: jax.Array | None, starts: Begun | None, keys: Keys
    ) -> tuple[Begun, jax.Array]:
        check_inputs("RG-LRU", x, features)
        x = x.astype(weights.gates.dtype)
        lanes, time, _ = x.shape
        resets, valid, _ = masks
        of_heads = jax.vmap(lambda x, w: dot(dtype, x, w), (2, 0), 2)(x.reshape(lanes, time, heads, -1), weights.gates)
        r, i = (jax.nn.sigmoid(gate).reshape(x.shape) for gate in jnp.split(of_heads + weights.bias, 2, -1))
        log_a = EXPONENT * r * jax.nn.log_sigmoid(weights.log_odds)
        first, fresh = first_steps(carry.fresh, resets, valid, time)
        scale = jnp.where(first[..., None], 1, bounded_root(-jnp.expm1(2 * log_a)))
        start = None if starts is None else starts.carry
        h, hs = recur(jnp.exp(log_a), scale * i * x, carry.carry, start, Masks(*masks), implementation)
        return Begun(h, fresh), hs

    return layered("RG-LRU", weights, zeros, run, features, **options)


@jax.custom_jvp
def bounded_root(x: jax.Array) -> jax.Array:
    """√x, whose slope is at most ``STEEPEST``: at x = 0, where a unit forgets nothing, it has no bound."""
    return jnp.sqrt(x)


@bounded_root.defjvp
def _bounded_root_forward(x: tuple, dx: tuple) -> tuple[jax.Array, jax.Array]:
    steep = jnp.maximum(x[0], 0.25 / STEEPEST**2)
    return jnp.sqrt(x[0]), 0.5 * dx[0] / jnp.sqrt(steep)
