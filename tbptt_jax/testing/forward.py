"""Laws of what a model computes: it can be cut, its lanes are apart, resets begin anew, padding stands still."""

from typing import Any

import jax
import numpy as np

from tbptt_jax.arrays import PyTree, same_tree
from tbptt_jax.noise import is_key
from tbptt_jax.testing.comparing import agree, first_difference, is_inexact, rows, shapes
from tbptt_jax.testing.subject import Subject, filled, mixed, padding, step_by_step, window_of


def carry(s: Subject) -> None:
    """Its tree, shapes and dtypes stay as they are, for any number of lanes; no lane begins otherwise than others."""
    lanes, time = s.shape

    def start(lanes: int) -> PyTree:
        return jax.tree.map(lambda h: None if is_key(h) else h, s.model.initial_carry(s.params, lanes))

    all_, one = start(lanes), start(1)
    for h in jax.tree.leaves(all_):
        if h.shape[:1] != (lanes,):
            raise AssertionError(
                f"Carry: of {lanes} lanes it has an array {list(h.shape)}, and needs all [lanes, ...]."
            )
    agree("Lanes: the initial carry depends on a lane's number", all_, rows(all_, np.zeros(lanes, int)), 0.0, "lanes")
    agree(f"Carry: that of one lane is not that of one of {lanes}", one, rows(all_, slice(1)), 0.0, "lanes")
    end, outputs = s.read(s.params, s.carry, window_of(s), None)
    if shapes(end) != shapes(s.carry) or not same_tree(end, s.carry):
        raise AssertionError(f"Carry: it is {shapes(s.carry)} at first, and {shapes(end)} after a window.")
    for y in jax.tree.leaves(outputs):
        if y.shape[:2] != s.shape:
            raise AssertionError(
                f"Carry: outputs are {list(y.shape)}, and need to be [{lanes} lanes, {time} steps, ...]."
            )
        if is_inexact(y) and not np.isfinite(np.asarray(y)).all():
            raise AssertionError(
                "Carry: outputs are not finite, so there is nothing to compare: give other parameters."
            )


def time(s: Subject) -> None:
    """A step does not depend on what comes after it."""
    at = s.shape[1] // 2
    before = np.arange(s.shape[1]) < at
    window = window_of(s)
    _, expected = s.read(s.params, s.carry, window, None)
    _, got = s.read(s.params, s.carry, window._replace(inputs=mixed(before, s.inputs, s.others)), None)
    claim = f"Time: outputs before step {at} change with the inputs from there on"
    agree(claim, got, expected, s.tolerance, "lanes, time", np.broadcast_to(before, s.shape))


def cutting(s: Subject) -> None:
    """What a window gives does not depend on where it is cut."""
    claim = "Cutting: read step by step, {} not that of one window; what steps know of others needs to be in the carry"
    window = window_of(s)
    (end, outputs), (last, y) = s.read(s.params, s.carry, window, None), step_by_step(s, window)
    agree(claim.format("the output is"), y, outputs, s.tolerance, "lanes, time")
    agree(claim.format("the carry after it is"), last, end, s.tolerance, "lanes")


def lanes(s: Subject) -> None:
    """A lane does beside others what it does alone, or in another row."""
    _lanes_apart(s, None, "Lanes: lane {} does beside others, or in this row, not what it does {}")


def keys(s: Subject) -> None:
    """What a lane draws comes from its own key."""
    if s.keys is not None:
        _lanes_apart(
            s, s.keys, "Keys: lane {} draws beside others, or in this row, not what it draws {} with the same key"
        )


def _lanes_apart(s: Subject, keys: jax.Array | None, claim: str) -> None:
    window = window_of(s)
    end, outputs = s.read(s.params, s.carry, window, keys)
    others = np.roll(np.arange(s.shape[0]), 1)
    carry, moved, own = rows((s.carry, window, keys), others)
    last, y = s.read(s.params, carry, moved, own)
    for lane, row in enumerate(others):
        told = claim.format(row, f"in row {lane}")
        _same(told, rows((last, y), lane), rows((end, outputs), row), s.tolerance, one_lane=True)
    for lane in range(s.shape[0]):
        one = slice(lane, lane + 1)
        carry, alone, own = rows((s.carry, window._replace(resets=None, valid=None), keys), one)
        got = s.read(s.params, carry, alone, own)
        _same(claim.format(lane, "alone"), rows(got, 0), rows((end, outputs), lane), s.tolerance, one_lane=True)


def _same(claim: str, got: tuple, expected: tuple, tolerance: float, one_lane: bool = False) -> None:
    agree(claim, got[1], expected[1], tolerance, "time" if one_lane else "lanes, time")
    agree(f"{claim}: its carry is another", got[0], expected[0], tolerance, "" if one_lane else "lanes")


def masks(s: Subject) -> None:
    """Without resets and padding, and outside of ``jit``, a model does what it does where there are none."""
    claim = "Masks: with no `resets` and `valid`, and outside of `jit`, it does not do what it does where none is set"
    _same(
        claim, s.model.unroll(s.params, s.carry, s.inputs), s.read(s.params, s.carry, window_of(s), None), s.tolerance
    )


def resets(s: Subject) -> None:
    """A lane that is reset begins from the initial carry."""
    t, middle = np.arange(s.shape[1]), s.shape[1] // 2
    some = np.zeros(s.shape, bool)
    some[0, middle] = some[-1, 0] = True
    for masked in (some, np.broadcast_to(t == middle, s.shape), np.ones(s.shape, bool)):
        window = window_of(s, masked)
        end, outputs = step_by_step(s, window)
        for (last, y), how in _both(s, window):
            place = first_difference(y, outputs, s.tolerance, "lanes, time")
            if place is not None:
                before = np.flatnonzero(masked[place.lane, : place.step + 1])
                at = f"at lane {place.lane}, step {before[-1]}" if len(before) else "of another lane"
                raise AssertionError(
                    f"Resets: after a reset {at} the outputs{how} are not those of a fresh start ({place.where})."
                )
            agree(f"Resets: the carry{how} is not that of a fresh start", last, end, s.tolerance, "lanes")


def padded(s: Subject) -> None:
    """Padding stands still, whatever it holds; a reset on it counts."""
    valid = padding(s)
    on_padding = ~valid & (np.arange(s.shape[0]) == 0)[:, None]
    for masked, what in ((np.zeros(s.shape, bool), ""), (on_padding, " and a reset")):
        window = window_of(s, masked, valid)
        end, outputs = step_by_step(s, window)
        for name, rubbish in filled(window):
            for (last, y), how in _both(s, rubbish):
                claim = f"Padding: where it holds {name}{what}, lanes do not stand still{how}: {{}} differ"
                agree(claim.format("outputs"), y, outputs, s.tolerance, "lanes, time", valid)
                agree(claim.format("carries"), last, end, s.tolerance, "lanes")


def _both(s: Subject, window: Any) -> list[tuple[tuple[PyTree, PyTree], str]]:
    """Read as a window and as it is streamed."""
    return [(s.read(s.params, s.carry, window, None), ""), (step_by_step(s, window, told=True), " in `streaming`")]
