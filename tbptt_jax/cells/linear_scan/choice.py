"""How a linear recurrence is run, and what is known of a window's steps."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
from jax import lax

Implementation = Literal["step", "associative", "chunked"] | None


class Masks(NamedTuple):
    """What is known of each step, ``[lanes, time]``, as a :class:`tbptt_jax.Window` has it; None: nothing of the kind."""

    resets: jax.Array | None = None
    valid: jax.Array | None = None
    edges: jax.Array | None = None


def check_implementation(implementation: Implementation) -> None:
    """Raises a ``ValueError`` unless it is one."""
    (known, _) = get_args(Implementation)
    if implementation not in (None, *get_args(known)):
        raise ValueError(
            f"`implementation` is {implementation!r}; it needs to be one of {get_args(known)}, or None to choose by platform."
        )


def run_by(implementation: Implementation, ways: dict[str, Callable], *args: Any, cpu: str, others: str) -> Any:
    """``ways[implementation](*args)``; None: that of the platform for which the program is lowered."""
    if implementation is not None:
        return ways[implementation](*args)
    return lax.platform_dependent(*args, cpu=ways[cpu], default=ways[others])
