"""What a sequence has once, its static features and its label, laid over its steps."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from tbptt_jax.arrays import Array, PyTree, check_array


def over_steps(
    inputs: PyTree,
    targets: PyTree,
    static: PyTree,
    label: PyTree,
    n: int,
    spread: Callable[[Array], Array],
    last: np.ndarray,
) -> tuple[PyTree, PyTree, Any]:
    """``(inputs, targets, weights)`` with what each of ``n`` sequences has once in them; what is None changes nothing.

    Args:
      inputs: pytree of arrays of steps.
      targets: likewise, or None.
      static: pytree of arrays ``[n, ...]``, or None.
      label: likewise.
      n: how many sequences there are.
      spread: an array ``[n, ...]`` at every step of each sequence.
      last: which steps are the last of a sequence, bool.

    Raises:
      ValueError: if ``static`` or ``label`` is not as described.
    """
    for name, tree in (("static", static), ("label", label)):
        leaves = jax.tree.leaves(tree)
        if tree is not None and not leaves:
            raise ValueError(
                f"`{name}` is {tree!r}, without an array; give some, [{n} sequences, ...], or leave it out."
            )
        for leaf in leaves:
            check_array(name, leaf)
            if leaf.shape[:1] != (n,):
                raise ValueError(
                    f"`{name}` has shape {list(leaf.shape)}; it needs the axes [{n} sequences, ...]: what a sequence has once, "
                    "without an axis of time."
                )
    if static is not None:
        inputs = {"inputs": inputs, "static": jax.tree.map(spread, static)}
    if label is None:
        return inputs, targets, None
    labels, scored = jax.tree.map(spread, label), last.astype(np.float32)
    if targets is None:
        return inputs, labels, scored
    everywhere = np.broadcast_to(np.float32(1), scored.shape)
    return inputs, {"targets": targets, "label": labels}, {"targets": everywhere, "label": scored}
