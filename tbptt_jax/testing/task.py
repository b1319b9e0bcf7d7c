"""The laws of a task: its data is what it says, and its loss belongs to each step alone."""

from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from tbptt_jax.arrays import PyTree
from tbptt_jax.gradient import step_losses
from tbptt_jax.noise import is_key
from tbptt_jax.recurrence import unroll_window
from tbptt_jax.step_by_step import quickly
from tbptt_jax.testing.comparing import agree, first_difference, on_host
from tbptt_jax.window import Window, check, check_scored

if TYPE_CHECKING:
    from tbptt_jax.study.task import Task

AXES = ("windows", "lanes", "time")
FIRST = 100  # windows of a corpus, which may be larger than memory


def check_task(task: "Task", *, length: int = 10, seed: int = 0) -> None:
    """Holds a :class:`tbptt_jax.study.task.Task` to what runs and sweeps take it for; for unit tests.

    - *Data*: drawn again for the same seed it is the same, and for another seed another.
    - *Apart*: what is validated on is not what is trained on, nor is what is tested on but for a test that is one free run.
    - *Windows*: they are ``[windows, lanes, length, ...]`` with finite numbers, begin with every lane reset, leave out no valid step,
      and have one to score.
    - *Loss*: that of a step, and so each figure, is finite, and changes with no other step's outputs and targets.
    - *Floor*: the best that is possible is a finite number, and with the past it is no worse than without.

    Args:
      task: what is tried. Its model is read as it is at first.
      length: steps of a window, or fewer where the data has fewer.
      seed: of data and parameters.

    Raises:
      AssertionError: a sentence that names the law.
      ValueError: from the task's own functions, or where its parts are none of what a task is made of.
    """
    from tbptt_jax.study.task import check_task as check_parts
    from tbptt_jax.study.task import data_of, figures, is_drawn, keys_of, reader

    check_parts(task)
    data: dict[str, Any] = {}
    for name in ("train", "valid", "test"):
        streams = getattr(task, name)
        if streams is None:
            continue
        key, other = getattr(keys_of(seed), name), getattr(keys_of(seed + 1), name)
        data[name] = data_of(streams, key)
        if callable(streams):
            again = streams(key) if is_drawn(streams) else streams()
            agree(f"Data: what {name} is made of is not the same when it is drawn again", again, data[name], 0.0)
        if is_drawn(streams) and _same(data_of(streams, other), data[name]):
            raise AssertionError(f"Data: what {name} is made of is the same for seeds {seed} and {seed + 1}.")
    for name in data:
        if name != "train" and not (name == "test" and task.free) and _same(data[name], data["train"]):
            raise AssertionError(f"Apart: what {name} is made of is what is trained on.")

    for name, streams in data.items():
        pair = not isinstance(streams, Window)
        steps = (
            len(jax.tree.leaves(streams[0])[0]) // task.lanes if pair else jax.tree.leaves(streams.inputs)[0].shape[1]
        )
        read = reader(task, streams, min(length, steps), task.lanes if name == "train" else None)
        windows = read.read(0, min(read.windows, FIRST) if pair else read.windows)
        check(windows, AXES)
        _windows_law(name, windows, None if pair else streams)
        if name == "train":
            _loss_law(task, windows, figures(task), keys_of(seed).init)
    _floor_law(task, figures(task)[0].better, min(length, steps))


def _same(one: PyTree, other: PyTree) -> bool:
    return first_difference(one, other, 0.0) is None


def _windows_law(name: str, windows: Window, streams: Window | None) -> None:
    shape = jax.tree.leaves(windows.inputs)[0].shape[:3]
    if windows.resets is None or not np.asarray(windows.resets)[0, :, 0].all():
        raise AssertionError(f"Windows: the first one of {name} does not begin with every lane reset.")
    try:
        check_scored(windows)
    except ValueError as error:
        raise AssertionError(f"Windows: those of {name} have nothing to score.") from error
    if streams is not None:

        def valid(window: Window, shape: tuple) -> np.ndarray:
            return np.ones(shape, bool) if window.valid is None else np.asarray(window.valid)

        before = jax.tree.leaves(streams.inputs)[0].shape[:2]
        told, cut = valid(streams, before).sum(), valid(windows, shape).sum()
        if told != cut:
            raise AssertionError(
                f"Windows: those of {name} have {cut} valid steps, and there are {told} in what they are cut from."
            )


def _loss_law(task: "Task", windows: Window, figures: Any, key: jax.Array) -> None:
    window = jax.tree.map(lambda x: x[0], windows)
    model = task.model
    params = quickly(model.init)(key, window.inputs)
    lanes, time = np.asarray(window.resets).shape
    _, outputs = quickly(lambda p, w: unroll_window(model, p, model.initial_carry(p, lanes), w))(params, window)
    outputs = on_host(outputs)
    one = np.zeros((lanes, time), bool)
    one[-1, time // 2] = True

    def elsewhere(x: Any) -> Any:
        """Other numbers everywhere but at one step."""
        if is_key(x):
            return x
        x = np.asarray(x)
        return np.where(one.reshape(*one.shape, *[1] * (x.ndim - 2)), x, np.roll(x[::-1, ::-1], 1, 1))

    others, moved = jax.tree.map(elsewhere, outputs), window._replace(targets=jax.tree.map(elsewhere, window.targets))
    for name, of in (("loss", task.loss), *((f"figure {figure.name!r}", figure.of) for figure in figures)):
        found = on_host(step_losses(of, outputs, window._replace(weights=None)))
        for leaf in jax.tree.leaves(found):
            if not np.isfinite(leaf.astype(np.float64)).all():
                raise AssertionError(f"Loss: the {name} is not finite on the first window.")
        claim = f"Loss: the {name} of a step changes with the outputs and targets of others"
        agree(claim, on_host(of(others, moved)), found, 1e-5, "lanes, time", one)


def _floor_law(task: "Task", better: str, length: int) -> None:
    if task.exact is None:
        return
    with_past, without = task.exact(True, length), task.exact(False, length)
    for floor in (with_past, without):
        if floor is not None and not np.isfinite(floor):
            raise AssertionError(f"Floor: the best that is possible is {floor}.")
    if with_past is not None and without is not None and (with_past - without) * (-1) ** (better == "higher") > 1e-9:
        raise AssertionError(
            f"Floor: the best that is possible is {with_past:.6g} with the past and {without:.6g} without, which is better."
        )
