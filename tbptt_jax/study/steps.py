"""The train step of a run. Of the same settings it is the same one, so that of several seeds in a process one compiles it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

import tbptt_jax as tb
from tbptt_jax.gradient import Loss
from tbptt_jax.recurrence import Recurrence
from tbptt_jax.sharding import over_lanes
from tbptt_jax.study import averaging
from tbptt_jax.study.influences import influence as named_influence
from tbptt_jax.training import TrainStep, as_transformation

Legs = tuple[tuple[float, ...], ...]  # the stretches (first, last, rate) over which the rate falls


def step_of(
    model: Recurrence, loss: Loss, influence: tb.Influence | str | None, windows: int, mesh: Mesh, optimiser: Any, legs: Legs,
    unit: str, average: averaging.Averaging | None,
) -> TrainStep:  # fmt: skip
    """The step of an influence, or of the one that is so called where a reading has so many windows.

    Args:
      optimiser: an optax transformation. None: :func:`adam` of ``legs`` and ``unit``.

    Raises:
      ValueError: as from :func:`tbptt_jax.train_step`.
    """
    if optimiser is None:
        return _step(model, loss, influence, windows, mesh, (legs, unit), average)
    as_transformation(optimiser)
    return _step(model, loss, influence, windows, mesh, optimiser, average)


@functools.lru_cache(maxsize=8)
def _step(
    model: Recurrence, loss: Loss, influence: Any, windows: int, mesh: Mesh, optimiser: Any, average: Any
) -> TrainStep:
    past = named_influence(influence, windows, "influence") if isinstance(influence, str) else influence
    estimate = tb.gradient(model, loss, influence=past)
    estimate = estimate if mesh.size == 1 else over_lanes(estimate, mesh)
    chosen = adam(*optimiser) if type(optimiser) is tuple else optimiser
    return tb.train_step(estimate, chosen if average is None else averaging.averaged(chosen, average))


def adam(legs: Legs, unit: str) -> optax.GradientTransformation:
    """Adam with clipped gradients; over each leg the rate falls to zero along a cosine (Loshchilov and Hutter 2017, SGDR)."""

    def rate(count: jax.Array) -> jax.Array:
        value = jnp.float32(0)
        for first, last, height in legs:
            falls = optax.cosine_decay_schedule(height, int(last - first))(count - int(first))
            value = jnp.where(count >= int(first), falls, value)
        return value

    schedule = rate if len(legs) > 1 else optax.cosine_decay_schedule(legs[0][2], int(legs[0][1]))
    if unit == "steps":
        return optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(), tb.schedules.by_steps(schedule))
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
