"""What a run reads: windows of one length, or of lengths that a schedule decides, from where the stream is."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

import tbptt_jax as tb
from tbptt_jax.arrays import check_whole, is_leaf, pad, quoted
from tbptt_jax.gradient import step_losses
from tbptt_jax.recurrence import unroll_window
from tbptt_jax.study.lengths import Chosen, Lengths, Look, Place, Span
from tbptt_jax.study.task import Task, reader
from tbptt_jax.training import TrainState, TrainStep


class Feed(NamedTuple):
    """Windows by the numbers of their updates, and the place in the stream that is kept to find them again.

    Attributes:
      begin: the place at update 0.
      end: ``(place, done) -> update`` at which the call that begins at ``done`` ends; ``done`` itself where the run does.
      read: ``(place, first, last) -> windows`` ``[last - first, lanes, time, ...]`` of one call.
      after: ``(place, done) -> place``, which changes where a call ends.
      told: ``(place, done) -> what`` a :class:`tbptt_jax.study.loop.Call` that ends there says of it.
      restored: a place of what JSON has made of it.
      until: where the run ends, in units.
      unit: ``"updates"``, or ``"steps"`` of a lane.
      longest: steps of the longest window.
      windows: of these in one reading of the data.
      steps: of a lane in one reading, where it is not so many windows of one length, else None.
      looks: ``(place, done) -> bool``: whether the stream is looked at before the next call.
      look: ``(place, state) -> (place, state)``.
    """

    begin: Any
    end: Callable[[Any, int], int]
    read: Callable[[Any, int, int], tb.Window]
    after: Callable[[Any, int], Any]
    told: Callable[[Any, int], dict[str, Any]]
    restored: Callable[[Any], Any]
    until: int
    unit: str = "updates"
    longest: int = 1
    windows: int = 1
    steps: int | None = None
    looks: Callable[[Any, int], bool] = lambda place, done: False
    look: Callable[[Any, TrainState], tuple[Any, TrainState]] = lambda place, state: (place, state)


class Stream(NamedTuple):
    """The lanes of a task, step by step.

    Attributes:
      time: steps of a lane until it is at an end.
      total: steps of a lane in one reading of all the data.
      lanes: how many.
      read: ``(first, last) -> window`` ``[lanes, last - first, ...]``, read in order and round again.
    """

    time: int
    total: int
    lanes: int
    read: Callable[[int, int], tb.Window]


class Course(NamedTuple):
    """Where the call begins that a run is in, and what its schedule has chosen so far."""

    updates: int = 0
    steps: int = 0
    choices: tuple[Chosen, ...] = ()


def feed_of(
    task: Task, data: Any, window: int | Lengths, lanes: int, *, stateless: bool, burn_in: int, per_call: int,
    updates: int | None, epochs: float | None,
) -> Feed:  # fmt: skip
    """The windows of a task's data for so many updates, or readings of it.

    Raises:
      ValueError: as from :func:`tbptt_jax.study.task.reader`, or if the windows of a schedule cannot be cut.
    """
    if isinstance(window, Lengths):
        check_schedule(task, window, stateless)
        stream = stream_of(task, data, lanes)
        return of_lengths(task, window, stream, per_call=per_call, updates=updates, epochs=epochs)
    read = reader(task, data, window, lanes, stateless=stateless, burn_in=burn_in)
    feed = of_windows(read.read, updates or max(1, round((epochs or 0) * read.windows)), per_call)
    return feed._replace(longest=window, windows=read.windows)


def of_windows(read: Callable[[int, int], tb.Window], updates: int, per_call: int) -> Feed:
    """Windows that are numbered: of one length. Calls end where those of a run never interrupted do."""
    return Feed(
        begin=(),
        end=lambda place, done: min(done - done % per_call + per_call, updates),
        read=lambda place, first, last: read(first, last),
        after=lambda place, done: (),
        told=lambda place, done: {},
        restored=tuple,
        until=updates,
    )


def of_lengths(
    task: Task, lengths: Lengths, stream: Stream, *, per_call: int, updates: int | None, epochs: float | None
) -> Feed:  # fmt: skip
    """Windows whose lengths a schedule decides, for so many updates, or readings of the data.

    Raises:
      ValueError: if the longest are longer than the stream; from the feed, if the schedule gives a window that cannot be.
    """
    check_longest(lengths, stream.time)
    last_step = None if epochs is None else max(1, round(epochs * stream.total))

    def spans(course: Course) -> list[tuple[int, Span]]:
        """The steps at which the windows of the call begin, and the windows."""
        choice = course.choices[-1] if course.choices else None
        place = Place(course.updates, course.steps, stream.time, stream.total, choice)
        found: list[tuple[int, Span]] = []
        for _ in range(per_call):
            span = found[0][1] if found and found[0][1].padded is None else check_span(lengths.next(place), lengths)
            if span.padded is not None:
                span = span._replace(length=min(span.length, stream.time - place.steps % stream.time))
            found.append((place.steps, span))
            place = place._replace(updates=place.updates + 1, steps=place.steps + span.length)
        return found

    def end(course: Course, done: int) -> int:
        if last_step is None:
            return min(course.updates + per_call, updates or 0)
        return max(done, course.updates + sum(first < last_step for first, _ in spans(course)))

    def read(course: Course, first: int, last: int) -> tb.Window:
        found = spans(course)
        padded = max(span.padded or span.length for _, span in found)
        always_whole = found[0][1].padded is None  # with its own program, which no masks slow down
        found = found[first - course.updates : last - course.updates]
        begin, until = found[0][0], sum((found[-1][0], found[-1][1].length))
        steps = stream.read(begin, until)
        starts, ends = (np.array([[s - begin + n * span.length] for s, span in found]) for n in (0, 1))
        at = starts + np.arange(padded)
        inside = at < ends  # [windows, time]
        at = np.minimum(at, until - begin - 1)

        def cut(x: Any) -> Any:
            """``[lanes, steps, ...]`` to ``[windows, lanes, time, ...]``, 0 where it is padding."""
            if always_whole:
                return x.reshape(len(x), len(at), padded, *x.shape[2:]).swapaxes(0, 1)
            x = x[:, at].swapaxes(0, 1)
            if not inside.all() and not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
                x[np.broadcast_to(~inside[:, None], x.shape[:3])] = 0
            return x

        if steps.valid is None and not always_whole:
            steps = steps._replace(valid=np.ones((stream.lanes, until - begin), bool))
        if any(span.edges is not None for _, span in found):
            each = [np.ones(span.length) if span.edges is None else span.edges[: span.length] for _, span in found]
            edges = np.concatenate(each).astype(np.float32)
            before = np.float32(1) if steps.edges is None else steps.edges
            steps = steps._replace(edges=np.broadcast_to(edges * before, (stream.lanes, until - begin)))
        windows = jax.tree.map(cut, steps)
        if windows.edges is not None:  # the gradient passes through padding as it is
            windows = windows._replace(edges=np.where(inside[:, None], windows.edges, 1).astype(windows.edges.dtype))
        return windows

    def after(course: Course, done: int) -> Course:
        if done < course.updates + per_call:
            return course
        start, span = spans(course)[-1]
        return course._replace(updates=done, steps=start + span.length)

    def told(course: Course, done: int) -> dict[str, Any]:
        found = spans(course)[: done - course.updates]
        bound = course.choices[-1].bias_bound if course.choices else None
        longest = max(span.length for _, span in found)
        return {"window": longest, "steps": found[-1][0] + found[-1][1].length, "bias_bound": bound}

    def looks(course: Course, done: int) -> bool:
        return lengths.look is not None and is_due(lengths.look, course, done)

    def look(course: Course, state: TrainState) -> tuple[Course, TrainState]:
        assert lengths.look is not None
        probe = stream.read(course.steps, course.steps + lengths.look.steps)
        choice = chosen(lengths.look, task, course, state, probe)._replace(depth=None)
        return course._replace(choices=(*course.choices, choice)), state

    def restored(kept: list) -> Course:
        return Course(kept[0], kept[1], choices_of(kept))

    longest = max(lengths.sizes or [span.padded or span.length for _, span in spans(Course())])
    until, unit = (last_step, "steps") if last_step is not None else (updates or 0, "updates")
    windows = -(-stream.total // longest)
    return Feed(Course(), end, read, after, told, restored, until, unit, longest, windows, stream.total, looks, look)


def stream_of(task: Task, data: Any, lanes: int) -> Stream:
    """The steps of a task's data, as :func:`tbptt_jax.split` and :func:`tbptt_jax.streams.windows` lay them into lanes.

    Raises:
      ValueError: if the data does not fit the lanes.
    """
    if not isinstance(data, tb.Window):
        total, one = tb.streams.cutter(*data, lanes=lanes, length=1)

        def of_corpus(first: int, last: int) -> tb.Window:
            return jax.tree.map(lambda x: x[:, :, 0].swapaxes(0, 1), one(np.arange(first, last) % total))

        return Stream(total, total, lanes, of_corpus)
    is_key = lambda x: jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)  # noqa: E731
    data = jax.tree.map(lambda x: x if is_key(x) else np.asarray(x), data)
    n, time = jax.tree.leaves(data.inputs)[0].shape[:2]
    lanes = min(lanes, n)
    groups = tb.split(data, time, lanes=lanes)
    total = time * len(jax.tree.leaves(groups.inputs)[0])

    def of_rows(first: int, last: int) -> tb.Window:
        steps = np.arange(first, last) % total
        return jax.tree.map(lambda x: x[steps // time, :, steps % time].swapaxes(0, 1), groups)

    return Stream(time, total, lanes, of_rows)


def is_due(look: Look, course: Course, done: int) -> bool:
    """Whether the stream is looked at after so many updates: where a call begins, the less often the longer nothing changes."""
    if done != course.updates or not course.choices:
        return done == course.updates
    led_to = [(choice.window, choice.depth) for choice in reversed(course.choices)]
    alike = len(list(itertools.takewhile(led_to[0].__eq__, led_to)))
    return done - course.choices[-1].updates >= look.every * min(2 ** (alike - 1), look.rarest)


def chosen(look: Look, task: Task, course: Course, state: TrainState, probe: tb.Window) -> Chosen:
    """What a look at the steps that come next leads to.

    Raises:
      ValueError: if that is no :class:`tbptt_jax.horizon.Suggestion`.
    """
    params, carry = jax.device_get((state.params, state.stream.carry))
    found = look.choose(task.model, task.loss, params, probe, carry)
    if not isinstance(found, tb.horizon.Suggestion):
        raise ValueError(f"The schedule's `look.choose` returned {quoted(found)}; it needs to be a horizon.Suggestion.")
    return Chosen(
        course.updates, course.steps, int(found.window), float(found.relative_bias), int(found.horizon), bool(found.safe), found.reason, int(found.depth)
    )  # fmt: skip


def choices_of(place: Any) -> tuple[Chosen, ...]:
    """What a schedule has chosen, by a feed's place or what JSON has made of it."""
    return tuple(Chosen(*choice) for choice in place[2]) if place else ()


def check_schedule(task: Task, lengths: Lengths, stateless: bool = False) -> None:
    """Raises a ``ValueError`` if a task's windows cannot have the lengths of a schedule."""
    if stateless:
        raise ValueError(
            "Stateless windows know no past, whatever their lengths: give `window` a number, or leave `stateless`."
        )
    if lengths.look and jax.process_count() > 1:
        raise ValueError("A schedule that looks at the stream runs in one process: give `window` a number.")
    for name in ("every", "steps", "rarest") if lengths.look else ():
        check_whole(f"look.{name}", getattr(lengths.look, name))
    if task.cut is not Task._field_defaults["cut"]:
        raise ValueError(
            f"The task {task.name!r} cuts its windows itself, so their lengths cannot change: give `window` a number, or the task "
            "no `cut` of its own (awd_lstm: random_lengths=False)."
        )


def check_span(span: Any, lengths: Lengths) -> Span:
    """The next window, in Python's numbers.

    Raises:
      ValueError: if it is none that a schedule of these sizes can have.
    """
    if not isinstance(span, Span):
        raise ValueError(
            f"The schedule's `next` returned {quoted(span)}; it needs to be a study.Span, such as Span(16)."
        )
    check_whole("Span.length", span.length)
    length, padded = int(span.length), span.padded
    if padded is not None:
        check_whole("Span.padded", padded)
        padded = int(padded)
        if padded < length:
            raise ValueError(
                f"The schedule's window has {length} steps, padded to {padded}: pad it to {length} or more."
            )
    if span.edges is not None and np.shape(span.edges) != (length,):
        raise ValueError(
            f"The schedule's window has {length} steps, and edges {list(np.shape(span.edges))}: give one a step."
        )
    if lengths.sizes and (size := padded or length) not in lengths.sizes:
        raise ValueError(
            f"The schedule's window has {size} steps, and its `sizes` are {list(lengths.sizes)}: give that size too, or () where "
            "sizes are not known before."
        )
    return Span(length, padded, span.edges)


def check_longest(lengths: Lengths, time: int) -> None:
    """Raises a ``ValueError`` if the longest windows of a schedule are longer than a lane of so many steps."""
    if lengths.sizes and lengths.sizes[-1] > time:
        raise ValueError(
            f"Windows of {lengths.sizes[-1]} steps are longer than the stream, whose lanes have {time}: choose shorter ones."
        )


def check_same_state(step: TrainStep, first: tb.Window) -> None:
    """Raises a ``ValueError`` if what the influence knows has the windows' length, as replay's windows have."""
    time = jax.tree.leaves(first.inputs)[0].shape[1]
    longer = jax.tree.map(lambda x: pad(x, 1, 1), first)
    one, other = (jax.eval_shape(step.init, jax.random.key(0), window) for window in (first, longer))
    if jax.tree.map(np.shape, one) != jax.tree.map(np.shape, other):
        raise ValueError(
            f"The influence keeps windows of one length, {time}: with a schedule of lengths give another, such as truncate, "
            "rtrl or uoro."
        )


def carry_of(task: Task, first: tb.Window) -> Any:
    """The shapes of the carry before a window.

    Raises:
      ValueError: if the loss is a tree, which a run has no one number of, or not as for :func:`tbptt_jax.gradient`.
    """

    def read(key: jax.Array, window: tb.Window) -> tuple[Any, Any]:
        params = task.model.init(key, window.inputs)
        carry = task.model.initial_carry(params, len(jax.tree.leaves(window.inputs)[0]))
        return carry, step_losses(task.loss, unroll_window(task.model, params, carry, window)[1], window)

    carry, losses = jax.eval_shape(read, jax.random.key(0), first)
    if not is_leaf(losses):
        raise ValueError(
            f"The task's loss is the tree {jax.tree.map(lambda x: list(x.shape), losses)}, and a run reports one number: give their "
            "sum, [lanes, time], or train by `tb.train_step` and `tb.train_windows`, which take trees."
        )
    return carry
