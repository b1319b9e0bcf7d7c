"""The recurrent trace unit (Elelimy et al. 2024, *Real-time recurrent learning using trace units in reinforcement learning*)."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
from jax import lax

from tbptt_jax.arrays import check_whole
from tbptt_jax.cells.layers import Options, check_inputs, layered
from tbptt_jax.cells.linear_parts import as_complex, check_ring, eigenvalues, recur, ring
from tbptt_jax.cells.linear_scan import Implementation, Masks, check_implementation
from tbptt_jax.cells.products import dot
from tbptt_jax.noise import Keys
from tbptt_jax.recurrence import Recurrence, over_steps

EPSILON = 1e-8  # added to γ


class Weights(NamedTuple):
    """A layer's parameters.

    Attributes:
      nu_log: ``[features]``, log ν, r = exp(−ν).
      theta_log: ``[features]``, log θ, in radians.
      input: ``[inputs, 2 * features]``, to the real parts and to the imaginary ones.
    """

    nu_log: jax.Array
    theta_log: jax.Array
    input: jax.Array


def rtu(
    features: int,
    *,
    activation: Callable[[jax.Array], jax.Array] = jax.nn.relu,
    activation_inside: bool = False,
    r_min: float = 0.0,
    r_max: float = 1.0,
    max_phase: float = 2 * math.pi,
    dtype: Any = None,
    implementation: Implementation = None,
    **options: Unpack[Options],
) -> Recurrence:
    """A recurrence of RTU layers: units that turn and shrink, of which real-time recurrent learning needs little memory.

        h₁ ← r cos θ ∘ h₁ − r sin θ ∘ h₂ + γ ∘ (x W₁),   h₂ ← r cos θ ∘ h₂ + r sin θ ∘ h₁ + γ ∘ (x W₂),   y = [f(h₁), f(h₂)]

    with r = exp(−ν), γ = √(1 − r²), and ν and θ learned as their logarithms. This is the linear RTU; in the nonlinear one f is
    inside, h₁ ← f(...), h₂ ← f(...), y = [h₁, h₂]. At first r exp(iθ) is uniform on a ring.

    ``params["cell"]`` is a tuple of :class:`tbptt_jax.cells.rtu.Weights`, one a layer; the carry is a tuple of complex ``h₁ + i h₂
    [lanes, features]``, one a layer, zeros at first. The outputs are ``2 * features``.

    Args:
      features: pairs of units of each layer.
      activation: f, of numbers one by one.
      activation_inside: the nonlinear RTU, which is run step by step.
      r_min: the least r at first, from 0.
      r_max: the largest, up to 1.
      max_phase: the largest θ at first.
      dtype: dtype of the operands of the products, such as ``jnp.bfloat16``; None: the parameters' dtype. h is complex64, or
        complex128 with parameters in float64.
      implementation: how the linear RTU's window is run: see :func:`tbptt_jax.from_linear`.
      **options: what all cells take: :class:`tbptt_jax.cells.layers.Options`.

    Raises:
      ValueError: now, if there is no ring, or an implementation is asked for that the nonlinear RTU has not; else as
        :func:`tbptt_jax.lstm`.
    """
    check_whole("features", features)
    check_ring(r_min, r_max, max_phase)
    check_implementation(implementation)
    if activation_inside and implementation not in (None, "step"):
        raise ValueError(
            f"`implementation` is {implementation!r}, and with `activation_inside=True` a step needs the one before it: leave "
            "it None, or put the activation outside."
        )

    def weights(key: jax.Array, inputs: int) -> Weights:
        of_ring, of_input = jax.random.split(key)
        return Weights(
            *ring(of_ring, features, r_min, r_max, max_phase),
            jax.nn.initializers.lecun_normal()(of_input, (inputs, 2 * features)),
        )

    def zeros(weights: Weights, lanes: int) -> jax.Array:
        return jnp.zeros((lanes, features), jnp.promote_types(weights.input.dtype, jnp.complex64))

    def run(
        weights: Weights, h: jax.Array, x: jax.Array, *masks: jax.Array | None, starts: jax.Array | None, keys: Keys
    ) -> tuple[jax.Array, jax.Array]:
        check_inputs("RTU", x, weights.input.shape[0])
        kind = weights.input.dtype
        eigenvalue, rest = eigenvalues(weights.nu_log, weights.theta_log)
        gamma = (jnp.sqrt(rest) + EPSILON).astype(kind)
        into = as_complex(dot(dtype, x.astype(kind), weights.input * jnp.concatenate([gamma, gamma])))
        if activation_inside:

            def step(h: jax.Array, into: jax.Array) -> tuple[jax.Array, jax.Array]:
                h = eigenvalue * h + into
                h = lax.complex(activation(h.real), activation(h.imag))
                return h, h

            h, hs = over_steps(step, h, into, *masks, always=jnp.zeros_like(h), starts=starts)
        else:
            h, hs = recur(eigenvalue, into, h, starts, Masks(*masks), implementation)
        y = jnp.concatenate([hs.real, hs.imag], -1).astype(kind)
        return h, y if activation_inside else activation(y)

    return layered("RTU", weights, zeros, run, 2 * features, **options)
