"""Class weights: labels that are rare, or that matter, weigh more."""

from typing import Any

import jax
import numpy as np

from tbptt_jax.arrays import at_least_float32, quoted
from tbptt_jax.window import Window


def class_weights(window: Window, weights: Any) -> Window:
    """The same window, the weight of each step multiplied by that of its label's class.

    The mean of a loss is over these weights, so that a class counts by its share of them. Padding and steps of weight 0 are as
    they were, whatever label stands there.

    Args:
      window: ``[lanes, time]``, or windows stacked on leading axes, whose targets are whole numbers from 0, one for each
        step; not traced. Balanced over the training data before it is cut, all windows have one weight for a class.
      weights: ``[classes]``, the weight of each, 0 or more; or ``"balanced"``: total / (classes · count), where the count of a
        class is the sum of the weights of its steps, the total that of all, and classes are those that occur. Each of them
        then weighs the same in all. Where the targets are a dict, a dict of these for those targets that are to be weighed:
        ``{"label": "balanced"}``; the others stay as they are, and the window's weights are a dict too.

    Returns:
      The window with these weights, at least float32, in the host's memory.

    Raises:
      ValueError: if the targets are not such labels, a label that is scored has no class, or ``weights`` is not as described.

    Reference: King & Zeng 2001, *Logistic regression in rare events data*, for the balanced ones, as scikit-learn has them.
    """
    if not isinstance(window, Window):
        raise ValueError(
            f"`window` is a {type(window).__name__}; it needs to be a `tb.Window`, as `tb.sequences` makes."
        )
    targets = window.targets
    if not isinstance(weights, dict):
        return window._replace(weights=_weighed("targets", targets, window.weights, window.valid, weights))
    if not isinstance(targets, dict) or not weights or set(weights) - set(targets):
        names = f"the dict of {sorted(targets)}" if isinstance(targets, dict) else "no dict"
        raise ValueError(
            f"`weights` is a dict of {sorted(weights)}, and the targets are {names}: its names are those of targets. What the "
            "classes of one target weigh is an array, the i-th that of class i: `np.array([1.0, 5.0])`."
        )
    if isinstance(window.weights, dict) and set(window.weights) != set(targets):
        raise ValueError(f"The window's weights are of {sorted(window.weights)}, its targets of {sorted(targets)}.")
    new: dict[Any, Any] = {}
    for name, target in targets.items():
        own = window.weights[name] if isinstance(window.weights, dict) else window.weights
        if name in weights:
            own = _weighed(f"targets[{name!r}]", target, own, window.valid, weights[name])
        new[name] = own
    ones = np.broadcast_to(np.float32(1), next(new[name].shape for name in weights))
    by_name: Any = {name: ones if own is None else own for name, own in new.items()}
    return window._replace(weights=by_name)


def _weighed(name: str, target: Any, own: Any, valid: Any, weights: Any) -> np.ndarray:
    """The weights ``own`` of the steps, times those of the classes that ``target`` says."""
    if any(isinstance(x, jax.core.Tracer) for x in (target, own, valid)):
        raise ValueError("The window is traced, and its labels are not known: weigh it before, outside of `jax.jit`.")
    kind = getattr(getattr(target, "dtype", None), "kind", None)
    if kind not in ("b", "i", "u"):
        raise ValueError(f"`{name}` is {quoted(target)}; it needs to be an array of labels, whole numbers from 0.")
    labels = np.asarray(target).astype(np.int64)
    own = np.ones(labels.shape, np.float32) if own is None else np.asarray(own)
    if labels.shape != own.shape or (valid is not None and labels.shape != valid.shape):
        raise ValueError(f"`{name}` has shape {list(labels.shape)}; it needs one label for each lane and step.")
    own = own.astype(at_least_float32(own.dtype))
    scored = (own > 0) if valid is None else (own > 0) & np.asarray(valid)
    if scored.any() and (least := labels[scored].min()) < 0:
        raise ValueError(
            f"`{name}` holds the label {least}; they are whole numbers from 0. What is missing has weight 0."
        )
    if isinstance(weights, str) and weights == "balanced":
        counts = np.bincount(labels[scored], own[scored], 1)
        of_class = counts.sum() / (np.maximum((counts > 0).sum(), 1) * np.where(counts > 0, counts, 1))
    else:
        of_class = np.asarray(weights)
        if (
            of_class.ndim != 1
            or not of_class.size
            or of_class.dtype.kind not in "iuf"
            or not np.isfinite(of_class).all()
            or (of_class < 0).any()
        ):
            raise ValueError(
                f"`weights` is {quoted(weights)}; it needs a number from 0 for each class, `[classes]`, or 'balanced'."
            )
        if scored.any() and (most := labels[scored].max()) >= len(of_class):
            raise ValueError(
                f"`{name}` holds the label {most}, and `weights` has {len(of_class)} classes: give a weight for each, 0 to {most}, "
                "or the step the weight 0."
            )
    return own * np.where(scored, of_class[np.where(scored, labels, 0)], 1).astype(own.dtype)
