"""The laws of a recurrence."""

from tbptt_jax.arrays import PyTree
from tbptt_jax.recurrence import Recurrence
from tbptt_jax.testing import backward, forward
from tbptt_jax.testing.comparing import first_difference, tolerance_of
from tbptt_jax.testing.subject import subject, window_of
from tbptt_jax.window import Window, check, time_shape

LAWS = (
    forward.time,
    forward.cutting,
    forward.masks,
    forward.lanes,
    forward.resets,
    forward.padded,
    forward.keys,
    backward.slope,
    backward.edges,
    backward.past,
)


def check_recurrence(
    model: Recurrence, inputs: PyTree, *, params: PyTree = None, seed: int = 0, tolerance: float | None = None
) -> None:
    """Holds a model to the laws that streams, windows and gradients rest on; for unit tests.

    - *Carry*: its tree, shapes and dtypes stay as ``initial_carry`` makes them, for any number of lanes.
    - *Time*: a step does not depend on what comes after it.
    - *Cutting*: read step by step, as :func:`tbptt_jax.streaming` does, a model does what it does in a window.
    - *Masks*: with no resets and no padding, and outside of ``jit``, a model does what it does where none is set.
    - *Lanes*: a lane does beside others what it does alone, or in another row.
    - *Resets*: a lane that is reset begins from the initial carry, but for typed keys.
    - *Padding*: it stands still whatever it holds, NaN too, and no gradient comes from it.
    - *Keys*: what a lane draws, if the model takes a key, comes from its own.
    - *Gradient*: that of parameters, carry and inputs is the slope that differences show.
    - *Edges*: they scale what goes back through the carry into a step, if the model takes them.
    - *Past*: ``replay`` of all windows and ``rtrl`` are backpropagation through the whole stream.

    Some ten programs are compiled, so let the model be small.

    Args:
      model: the recurrence.
      inputs: ``[lanes, time, ...]``, at least 2 lanes of 4 steps, not all alike. The last of three windows that they are cut into
        may be padded.
      params: its parameters. None: those of ``init`` and a little noise, so that no zero among them hides a fault.
      seed: of what is drawn.
      tolerance: of two ways to the same number, relative to the largest in their array. None: 1e-10 in float64, 5e-5 in
        float32, 0.02 in float16, 0.1 in bfloat16, by the coarsest in parameters, carry and outputs. Slopes have half of
        the digits, and are left out where that is less than two.

    Raises:
      AssertionError: a sentence that names the law, and the first place where it does not hold.
      ValueError: if the inputs are not as described.
    """
    check(Window(inputs))
    lanes, time = time_shape(Window(inputs))
    s = subject(model, inputs, params, seed)
    if lanes < 2 or time < 4 or first_difference(s.others, s.inputs, 0.0) is None:
        raise ValueError(f"`inputs` are {lanes} lanes of {time} steps; give 2 lanes of 4 steps or more, not all alike.")
    forward.carry(s)
    carry, outputs = s.read(s.params, s.carry, window_of(s)._replace(inputs=s.others), None)
    if tolerance is None:
        tolerance = tolerance_of(s.params, carry, outputs)
    s = s._replace(carry=carry, tolerance=tolerance)
    for law in LAWS:
        law(s)
