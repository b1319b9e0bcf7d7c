"""How far back ``replay`` goes, chosen as a run goes on, where windows keep their length.

    study.fit(task, window=16, influence=study.adaptive_replay(0.3, depths=(0, 1, 2, 4)), updates=2000)

The deepest is what is kept: as many windows, whatever the depth, so that any depth is exact from the first window on, in one program.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tbptt_jax.arrays import check_whole, quoted
from tbptt_jax.study.feed import Course, Feed, choices_of, chosen, is_due
from tbptt_jax.study.lengths import Lengths, Look, looking
from tbptt_jax.study.task import Task
from tbptt_jax.training import TrainState


class Depths(NamedTuple):
    """Depths of ``replay`` to choose from.

    Attributes:
      depths: windows to go back, from 0 or more to deep.
      look: ``window -> look``: how windows of so many steps are looked at.
      settings: what makes it this choice, as JSON; a run is gone on with by the same one only.
    """

    depths: tuple[int, ...]
    look: Callable[[int], Look]
    settings: dict[str, Any]


def adaptive_replay(
    tolerance: float = 0.5, *, depths: Sequence[int] = (0, 1, 2, 4, 8), every: int = 1000, probe: int | None = None,
    bound: str = "gradients",
) -> Depths:  # fmt: skip
    """The smallest depth of ``replay`` whose bias is bounded to be below a tolerance, measured again and again.

    Each look measures, at the parameters and the carry of that moment, what windows that go back through so many before them leave
    out of the gradient of the windows that come next, as :func:`tbptt_jax.study.lengths.adaptive` does it for windows of other
    lengths. Where no depth is safe, or nothing can be measured, the deepest is used, and the :class:`Chosen` says why. A
    depth costs so many backward passes more; the memory is that of the deepest all the time.

    Args:
      tolerance: of the relative bias; positive.
      depths: windows to go back, from small to large: 0 is ``truncate()``, and with n and windows of k steps every loss sees at
        least n·k steps back.
      every: updates from one look to the next, which is made where a compiled call begins, and the more rarely the longer nothing
        changes, as :func:`tbptt_jax.study.lengths.adaptive` has it.
      probe: windows of a lane that a look reads; the first so many as the deepest has, and one, are for what lies before the others.
        Default twice as many as those.
      bound: ``"gradients"`` or ``"norms"``, likewise.

    Raises:
      ValueError: if an argument is not as described, or the probe has not twice as many windows as those.

    Reference: Aicher, Foti & Fox 2019, *Adaptively truncating backpropagation through time to control gradient bias*, algorithm 1.
    """
    if np.ndim(depths) != 1:
        raise ValueError(f"`depths` is {quoted(depths)}; give several, such as (0, 1, 2, 4).")
    for depth in depths:
        if isinstance(depth, bool) or not isinstance(depth, int | np.integer) or depth < 0:
            raise ValueError(f"`depths` has {quoted(depth)}; each needs to be a whole number, at least 0.")
    sizes = tuple(map(int, depths))
    if not sizes or list(sizes) != sorted(set(sizes)) or sizes[-1] < 1:
        raise ValueError(f"`depths` are {list(sizes)}; give them from small to large, the last at least 1.")
    seen = sizes[-1] + 1
    probe = 2 * seen if probe is None else probe
    check_whole("probe", probe)
    probe = int(probe)
    if probe < 2 * seen:
        raise ValueError(f"`probe` is {probe} windows; to go back through {sizes[-1]} give at least {2 * seen}.")

    def look(window: int) -> Look:
        return looking(tolerance, every, probe * window, max(2, seen * window), (window,), sizes, bound=bound)

    look(1)  # raises what it would
    settings = {
        "adaptive replay": float(tolerance),
        "depths": list(sizes),
        "every": int(every),
        "probe": probe,
        "bound": bound,
    }
    return Depths(sizes, look, settings)


def with_depths(feed: Feed, depths: Depths, task: Task, window: int | Lengths, stateless: bool) -> Feed:
    """The same windows, with looks at the stream that set how far ``replay`` goes back, in the stream's state.

    Raises:
      ValueError: if these windows have no past, their lengths change, or there are several processes.
    """
    if isinstance(window, Lengths):
        raise ValueError(
            "`influence` chooses how many windows to go back, and `window` how long they are: replay keeps windows of one length, "
            "so give `window` a number, or `influence` another, such as truncate."
        )
    if stateless:
        raise ValueError(
            "Stateless windows know no past to go back through: give `influence` None, or leave `stateless`."
        )
    if jax.process_count() > 1:
        raise ValueError(
            "What looks at the stream runs in one process: give `influence` one depth, such as 'replay:2'."
        )
    look = depths.look(window)

    def looked(course: Course, state: TrainState) -> tuple[Course, TrainState]:
        windows = feed.read((), course.updates, course.updates + look.steps // window)
        probe = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(x.shape[1], -1, *x.shape[3:]), windows)
        choice, past = chosen(look, task, course, state, probe), state.stream.influence
        assert choice.depth is not None
        stream = state.stream._replace(influence=past._replace(reach=jnp.full_like(past.reach, choice.depth)))
        return course._replace(choices=(*course.choices, choice)), state._replace(stream=stream)

    return feed._replace(
        begin=Course(),
        end=lambda course, done: feed.end((), done),
        read=lambda course, first, last: feed.read((), first, last),
        after=lambda course, done: course._replace(updates=done, steps=done * window),
        told=lambda course, done: {"depth": course.choices[-1].depth, "bias_bound": course.choices[-1].bias_bound},
        restored=lambda kept: Course(kept[0], kept[1], choices_of(kept)),
        looks=lambda course, done: is_due(look, course, done),
        look=looked,
    )
