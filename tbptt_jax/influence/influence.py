"""The type every influence has, and the one thing it is told of a window."""

from collections.abc import Callable
from typing import Any, NamedTuple

PyTree = Any


class Linearisation(NamedTuple):
    """A window as a linear map: how its right edge's carry moves with the parameters and its left edge's carry.

    Attributes:
      vjp: ``carry_cotangent -> (params_cotangent, carry_cotangent)``, from the right edge to the parameters and to the
        left edge. A lane reset inside the window gives its left edge a cotangent of zero.
    """

    vjp: Callable[[PyTree], tuple[PyTree, PyTree]]


class Influence(NamedTuple):
    """What is known of how a carry came to depend on the parameters: an estimate of the matrix ∂h/∂θ.

    For window n with incoming carry h and parameters θ,

        dL_n/dθ  =  ∂L_n/∂θ  +  (∂L_n/∂h) · (∂h/∂θ).

    The first term is exact. An influence is one choice of the second, in the manner of an optax transformation:

    Attributes:
      init: ``(params, carry) -> state``, at the start of a stream.
      pullback: ``(state, carry_cotangent) -> params_cotangent``: the gradient that crosses the window's left edge.
      push: ``(state, linearisation, key) -> state``: the window's right edge becomes the next one's left edge.
    """

    init: Callable[[PyTree, PyTree], PyTree]
    pullback: Callable[[PyTree, PyTree], PyTree]
    push: Callable[[PyTree, Linearisation, Any], PyTree]
