"""Penalties on what a model computes on the way: the size of its activations, and their change from step to step.

    model = tb.with_activations(model, 64, of=lambda outputs: outputs["h"])
    penalty = tb.activation_penalty(alpha=2.0, beta=1.0)

    def loss(outputs, window):
        return cross_entropy(outputs["outputs"]["logits"], window) + penalty(outputs, window)

A change has two steps, and the first of a window has its other one in the window before: the carry holds it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tbptt_jax.arrays import PyTree, at_least_float32, check_whole, where_lanes
from tbptt_jax.recurrence import Recurrence, from_step
from tbptt_jax.window import Window, time_shape


class ActivationCarry(NamedTuple):
    """Attributes:
    model: the carry of the model itself.
    activation: ``[lanes, units]``, that of the last step.
    begun: ``[lanes]`` bool; False: there was no step yet, since the initial carry.
    """

    model: PyTree
    activation: jax.Array
    begun: jax.Array
