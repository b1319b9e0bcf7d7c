"""The type every influence has, and what it is told of a window."""

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import flax.struct
import jax

PyTree = Any


class Linearisation(NamedTuple):
    """A window as a linear map: how its right edge's carry moves with the parameters and with its left edge's carry.

    Where a lane resets inside the window, its left edge gets a cotangent of zero: the map itself cuts influences.

    Attributes:
      vjp: ``carry_cotangent -> (params_cotangent, carry_cotangent)``, from the right edge back. A pytree: its leaves are
        what the backward pass needs of the window, and it may be stored in a state.
      lane_vjp: the same with a params_cotangent for each lane, leaves ``[lanes, ...]``. Using it costs a second forward
        pass, with a copy of the parameters for each lane.
    """

    vjp: "WindowVJP"
    lane_vjp: Callable[[PyTree], tuple[PyTree, PyTree]]


class Influence(NamedTuple):
    """What is known of how a carry came to depend on the parameters: an estimate of the matrix ∂h/∂θ.

    For window n with incoming carry h and parameters θ,

        dL_n/dθ  =  ∂L_n/∂θ  +  (∂L_n/∂h) · (∂h/∂θ).

    The first term is exact. An influence is one choice of the second, in the manner of an optax transformation. Carry
    and carry_cotangent hold the carry's floating-point leaves ``[lanes, ...]``; others are None. All of it is real: where
    the carry or the parameters have a complex leaf ``[...]``, an influence sees its parts, ``[..., 2]``.

    Attributes:
      init: ``(params, carry, vjp) -> state``, at the start of a stream. ``vjp`` is a window's ``Linearisation.vjp`` as
        shapes (``jax.ShapeDtypeStruct`` leaves), for those that store some.
      pullback: ``(state, carry_cotangent) -> params_cotangent``: the gradient that crosses the window's left edge, in the
        tree of params. None: nothing crosses.
      push: ``(state, linearisation, key) -> state``: the window's right edge becomes the next one's left edge. What is drawn
        for each lane is drawn from its own key, ``noise.lane_keys(key, lanes)``, however many devices read them.
    """

    init: Callable[[PyTree, PyTree, "WindowVJP"], PyTree]
    pullback: Callable[[PyTree, PyTree], PyTree]
    push: Callable[[PyTree, Linearisation, jax.Array], PyTree]


def check_carried(carry: PyTree) -> None:
    """Raises a ``ValueError`` if the carry has nothing that a gradient could pass through.

    Args:
      carry: its floating-point leaves.
    """
    if not jax.tree.leaves(carry):
        raise ValueError(
            "The model's carry has no floating-point array, so it has no past to know of: use `truncate()`."
        )


@flax.struct.dataclass
class WindowVJP:
    """A window's backward pass from carry to carry: a function that is a pytree of what it needs of the window."""

    residuals: list[jax.Array]
    backward: "Backward" = flax.struct.field(pytree_node=False)

    def __call__(self, carry_cotangent: PyTree) -> tuple[PyTree, PyTree]:
        return self.backward.run(self.residuals, carry_cotangent)


@dataclasses.dataclass(frozen=True)
class Backward:
    """The part of a backward pass that is not data. Two are equal if they were made of the same things: a state that was
    begun in one trace then has the tree of a state from another."""

    made_of: Hashable
    run: Callable[[list[jax.Array], PyTree], tuple[PyTree, PyTree]] = dataclasses.field(compare=False)


def window_vjp(vjp: Callable[[PyTree], tuple[PyTree, PyTree]], made_of: Hashable) -> WindowVJP:
    """``carry_cotangent -> (params_cotangent, carry_cotangent)``, a pytree with its residuals as leaves, to be stored."""
    residuals, treedef = jax.tree.flatten(vjp)
    shapes = tuple((r.shape, r.dtype) for r in residuals)
    return WindowVJP(
        residuals, Backward((made_of, shapes), lambda r, cotangent: jax.tree.unflatten(treedef, r)(cotangent))
    )
