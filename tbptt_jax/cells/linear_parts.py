"""What linear cells are made of: gates of the inputs alone, eigenvalues on a ring, and the window that recurs."""

from collections.abc import Callable
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
from jax import lax

from tbptt_jax.arrays import at_least_float32, check_number, check_whole
from tbptt_jax.cells.layers import Options, check_inputs, layered
from tbptt_jax.cells.linear_scan import Implementation, Masks, check_implementation, diagonal
from tbptt_jax.cells.products import dot
from tbptt_jax.noise import Keys
from tbptt_jax.recurrence import Recurrence


class Weights(NamedTuple):
    """A layer's parameters, of gates that see the inputs alone, side by side in the order in which the cell names them.

    Attributes:
      input: ``[inputs, gates * features]``.
      bias: ``[gates * features]``.
    """

    input: jax.Array
    bias: jax.Array


def gated(
    name: str,
    features: int,
    gates: int,
    coefficients: Callable[..., tuple[jax.Array, jax.Array]],
    positive_candidates: bool,
    dtype: Any,
    implementation: Implementation,
    **options: Unpack[Options],
) -> Recurrence:
    """A recurrence h ← a ∘ h + b of gates that see the inputs alone.

    Args:
      name: of the cell, for sentences.
      features: units of each layer.
      gates: how many, the candidate n among them as the last.
      coefficients: ``(*gates, n) -> (a, b)``, each ``[lanes, time, features]``.
      positive_candidates: whether n is made positive by g.
      dtype: of the product's operands.
      implementation: how a window is run.
      **options: what all cells take.
    """
    check_whole("features", features)
    check_implementation(implementation)

    def weights(key: jax.Array, inputs: int) -> Weights:
        columns = gates * features
        return Weights(jax.nn.initializers.lecun_normal()(key, (inputs, columns)), jnp.zeros(columns))

    def zeros(weights: Weights, lanes: int) -> jax.Array:
        return jnp.zeros((lanes, features), weights.input.dtype)

    def run(
        weights: Weights, h: jax.Array, x: jax.Array, *masks: jax.Array | None, starts: jax.Array | None, keys: Keys
    ) -> tuple[jax.Array, jax.Array]:
        check_inputs(name, x, weights.input.shape[0])
        *parts, n = jnp.split(dot(dtype, x.astype(weights.input.dtype), weights.input) + weights.bias, gates, -1)
        a, b = coefficients(*parts, positive(n) if positive_candidates else n)
        return recur(a, b, h, starts, Masks(*masks), implementation)

    return layered(name, weights, zeros, run, features, **options)


def positive(x: jax.Array) -> jax.Array:
    """g(x) = x + 1/2 where x ≥ 0, else σ(x) (Feng et al. 2024, appendix B.3)."""
    return jnp.where(x >= 0, x + 0.5, jax.nn.sigmoid(x))


def recur(
    a: jax.Array, b: jax.Array, h: jax.Array, starts: jax.Array | None, masks: Masks, implementation: Implementation
) -> tuple[jax.Array, jax.Array]:
    """A layer's window of h ← a ∘ h + b: ``(h after it, h [lanes, time, ...])``; ``starts`` None: a reset returns to zeros."""
    hs = diagonal(a, b, h, starts, masks, implementation)
    return hs[:, -1], hs


def ring(key: jax.Array, units: int, r_min: float, r_max: float, max_phase: float) -> tuple[jax.Array, jax.Array]:
    """``(log ν, log θ)`` of eigenvalues uniform on a ring from ``r_min`` to ``r_max``, with phases up to ``max_phase``.

    Reference: Orvieto et al. 2023, lemma 3.2.
    """
    radius, phase = jax.random.uniform(key, (2, units))
    least = jnp.finfo(radius.dtype).eps  # from 0 and from 1, whose logarithms are not finite
    square = jnp.clip(radius * (r_max**2 - r_min**2) + r_min**2, least, 1 - least)
    return jnp.log(-0.5 * jnp.log(square)), jnp.log(max_phase * jnp.maximum(phase, least))


def eigenvalues(nu_log: jax.Array, theta_log: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``(λ, 1 − |λ|²)`` with λ = r (cos θ + i sin θ), r = exp(−exp(log ν)), θ = exp(log θ): |λ| is below 1, whatever is learned."""
    nu_log, theta_log = (x.astype(at_least_float32(x.dtype)) for x in (nu_log, theta_log))
    nu, theta = jnp.exp(nu_log), jnp.exp(theta_log)
    r = jnp.exp(-nu)
    return lax.complex(r * jnp.cos(theta), r * jnp.sin(theta)), -jnp.expm1(-2 * nu)


def as_complex(parts: jax.Array) -> jax.Array:
    """``[..., 2 * units]``, real parts and then imaginary ones, as complex numbers ``[..., units]``."""
    return lax.complex(*jnp.split(parts.astype(at_least_float32(parts.dtype)), 2, -1))


def check_ring(r_min: float, r_max: float, max_phase: float) -> None:
    """Raises a ``ValueError`` unless eigenvalues can be drawn there."""
    for name, value in {"r_min": r_min, "r_max": r_max, "max_phase": max_phase}.items():
        check_number(name, value)
    if not 0 <= r_min < r_max <= 1:
        raise ValueError(
            f"`r_min` is {r_min!r} and `r_max` {r_max!r}; eigenvalues are drawn between them: 0 <= r_min < r_max <= 1."
        )
    if not max_phase > 0:
        raise ValueError(
            f"`max_phase` is {max_phase!r}; it is the largest angle, in radians, and needs to be positive."
        )


def check_width(name: str, inputs: int, features: int) -> None:
    """Raises a ``ValueError`` unless a layer whose units each have an input of their own is fed with as many."""
    if inputs != features:
        raise ValueError(
            f"The {name} has {features} units, each with an input of its own, and {inputs} features reach it: give "
            f"`encoder=nn.Dense({features})`, which brings them there, or `features={inputs}`."
        )
