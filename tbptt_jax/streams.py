"""Streams: windows of a corpus that need not fit in memory, read ahead of the training that takes them.

    text = tb.streams.open_bytes("corpus.txt")  # [time] uint8, mapped: nothing is read yet
    calls = tb.streams.windows(text[:-1], text[1:], lanes=32, length=64, per_call=50)
    reader = iter(calls)
    for windows in reader:
        state, metrics = tb.train_windows(step, state, windows)
        checkpoint = state, reader.get_state()

A source is an array, so the targets of a next-step task are the same array one step on: a slice of a map is a map. What
:func:`windows` returns is a Grain dataset; its iterator has ``get_state`` and ``set_state``.
"""

import functools
import mmap
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np

from tbptt_jax.arrays import check_whole
from tbptt_jax.files import Path, read_text, reading
from tbptt_jax.files import read_csv as read_csv
from tbptt_jax.pack import pack
from tbptt_jax.window import Window, time_shape

PyTree = Any

# One thread reads and places, so that calls are placed in their order on every host.
_AHEAD = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)


def windows(
    inputs: PyTree,
    targets: PyTree = None,
    *,
    lanes: int,
    length: int,
    per_call: int,
    epochs: int | None = None,
    shard: tuple[int, int] = (0, 1),
    place: Callable[[Window], Window] = jax.device_put,
) -> grain.IterDataset:
    """The windows that ``tb.split(tb.lanes(inputs, targets, lanes=lanes), length)`` cuts, a few at a time.

    Only what a call holds is read. A thread reads two calls ahead and puts them on the device, so that the next is there
    when the last one is done.

    Args:
      inputs: pytree of arrays ``[time, ...]``, in memory or mapped.
      targets: pytree of arrays ``[time, ...]``, or None.
      lanes: how many streams to read side by side.
      length: steps in each window.
      per_call: windows in each element. They run on from epoch to epoch, so that all elements have one shape and what
        takes them is compiled once; only the last of a given number of epochs may hold fewer.
      epochs: how often to read the corpus, each time with every lane reset at its start. None: for ever.
      shard: ``(index, count)``; this process reads the index-th of ``count`` equal blocks of the lanes, for instance
        ``(jax.process_index(), jax.process_count())``.
      place: puts a call's windows on the device; for instance ``lambda windows: tb.sharding.place(windows, mesh)``.

    Returns:
      A dataset of windows ``[per_call, lanes / count, length, ...]``. The state of its iterator is that of the element
      last received, whatever has been read ahead; it belongs to the same arguments.

    Raises:
      ValueError: now, if the arrays disagree or cannot be laid out so; when the element is reached, if the data is not
        finite, with the step of the file.
    """
    check_whole("per_call", per_call)
    check_whole("epochs", 1 if epochs is None else epochs)
    count, cut = cutter(inputs, targets, lanes=lanes, length=length, shard=shard)
    total = sys.maxsize if epochs is None else epochs * count

    def read(call: int) -> Window:
        return cut(np.arange(call * per_call, min((call + 1) * per_call, total)) % count)

    return grain.MapDataset.range(-(-total // per_call)).map(read).map(place).to_iter_dataset(_AHEAD)


def cutter(
    inputs: PyTree,
    targets: PyTree = None,
    *,
    lanes: int,
    length: int,
    shard: tuple[int, int] = (0, 1),
) -> tuple[int, Callable[[np.ndarray], Window]]:
    """The windows of a corpus by their numbers, each read when it is asked for.

    Args:
      inputs: pytree of arrays ``[time, ...]``, in memory or mapped.
      targets: pytree of arrays ``[time, ...]``, or None.
      lanes: how many streams to read side by side.
      length: steps in each window.
      shard: as in :func:`windows`.

    Returns:
      How many windows there are, and ``numbers -> windows`` ``[numbers, lanes / count, length, ...]`` in the host's memory.

    Raises:
      ValueError: now, if the arrays disagree or cannot be laid out so; when a window is read, if it is not finite.
    """
    (time,) = time_shape(Window(inputs, targets), ("time",))
    inputs, targets = jax.tree.map(np.asarray, (inputs, targets))
    corpus = f"a corpus of {time} steps{_of(_mapped(jax.tree.leaves(inputs)[0]))}"
    check_whole("lanes", lanes)
    check_whole("length", length)
    if lanes > time:
        raise ValueError(f"{lanes} lanes of {corpus} were asked for: choose from 1 to {time}.")
    stretch = -(-time // lanes)
    if length > stretch:
        raise ValueError(
            f"{lanes} lanes of {corpus} have {stretch} steps each, and windows of {length} were asked for: choose from 1 to "
            f"{stretch}, or fewer lanes."
        )
    index, shards = shard
    if not 0 <= index < shards or lanes % shards:
        raise ValueError(
            f"`shard` is {shard} and there are {lanes} lanes; it needs to be (index, count), the index from 0 to count - 1 "
            "and the lanes a multiple of the count."
        )
    own = np.split(np.arange(lanes), shards)[index]
    count = -(-stretch // length)
    padded = lanes * stretch > time or count * length > stretch
    maps = {id(m): m for m in map(_mapped, jax.tree.leaves((inputs, targets))) if m is not None}.values()

    def read(numbers: np.ndarray) -> Window:
        t = numbers[:, None, None] * length + np.arange(length)  # steps of a lane [windows, 1, length]
        steps = t + stretch * own[:, None]  # of the corpus [windows, lanes, length]
        valid = (t < stretch) & (steps < time) if padded else None
        cut = functools.partial(_cut, steps=steps, valid=valid)
        window = Window(
            inputs=jax.tree.map(functools.partial(cut, "inputs"), inputs),
            targets=jax.tree.map(functools.partial(cut, "targets"), targets),
            resets=np.broadcast_to(t == 0, steps.shape),
            valid=valid,
        )
        for mapped in maps:
            _forget(mapped)
        return window

    return count, read


def documents(documents: Sequence[np.ndarray], *, lanes: int, key: jax.Array | int | None = None) -> Window:
    """Many short texts or series laid into lanes, each step's target the next one of the same document.

    Each document begins anew, and none of its targets is of another: the last step of a document is only a target.

    Args:
      documents: arrays ``[time, ...]``; one of fewer than two steps has nothing to predict and is left out.
      lanes: how many streams to fill side by side.
      key: draws their order, as in :func:`tbptt_jax.pack`. None: the order given.

    Returns:
      A window ``[lanes, time, ...]``, as :func:`tbptt_jax.pack` makes it.

    Raises:
      ValueError: if no document has two steps, or they do not go together.
    """
    long = [np.asarray(each) for each in documents if len(each) > 1]
    if not long:
        raise ValueError(f"None of {len(documents)} documents has two steps: there is nothing to predict.")
    kinds = {(each.shape[1:], each.dtype) for each in long}
    if len(kinds) > 1:
        raise ValueError(
            f"The documents are of {len(kinds)} kinds, {sorted(map(str, kinds))[:3]}: give them one shape and dtype."
        )
    inputs, targets = np.concatenate([each[:-1] for each in long]), np.concatenate([each[1:] for each in long])
    return pack(
        inputs, targets, lengths=np.array([len(each) - 1 for each in long]), lanes=min(lanes, len(long)), key=key
    )


def open_npy(path: Path) -> np.memmap:
    """Maps an array that ``np.save`` wrote, of numbers or bool. It is read where it is used.

    Args:
      path: the file.

    Returns:
      The array, ``[time, ...]``.

    Raises:
      ValueError: if the file cannot be read, is cut short or empty, or holds something else. Whether the numbers are
        finite is seen when they are read.
    """
    with reading(path):
        pathlib.Path(path).open("rb").close()
        try:
            array = np.lib.format.open_memmap(path, mode="r")
        except Exception as error:  # NumPy reads the header as Python, and says of it what Python does
            said = str(error).partition("\n")[0][:80] or type(error).__name__
            raise ValueError(
                f"{path} is not a whole .npy file of numbers ({said}): write it again with `np.save`."
            ) from error
    if array.dtype.kind not in "biuf" or not array.dtype.isnative:
        raise ValueError(f"{path} holds {array.dtype}; it needs numbers or bool, in this machine's byte order.")
    if array.ndim < 1 or not array.size:
        raise ValueError(f"{path} has shape {list(array.shape)}; it needs [time, ...] with at least one step.")
    return array


def open_bytes(path: Path) -> np.memmap:
    """Maps a file as its bytes: any text, of any size, with a vocabulary of 256.

    Args:
      path: the file.

    Returns:
      The bytes, ``[time]`` uint8.

    Raises:
      ValueError: if the file cannot be read or is empty.
    """
    with reading(path):
        if not os.path.getsize(path):
            raise ValueError(f"{path} is empty: give a file with something in it.")
        return np.memmap(path, np.uint8, "r")


def read_characters(path: Path, vocabulary: Sequence[str] | None = None) -> tuple[np.ndarray, list[str]]:
    """A text as numbers of its characters. It is held in memory; for more text than that, :func:`open_bytes`.

    Args:
      path: the file, in an encoding that :func:`tbptt_jax.files.read_text` knows, whose line ends become ``\\n``.
      vocabulary: the characters in the order of their numbers, as a call for the training text returned them. Number 0
        stands for any other. None: those of this text, sorted, after the "�" that is number 0.

    Returns:
      The numbers, ``[time]`` int32, and the vocabulary.

    Raises:
      ValueError: if the file cannot be read, is empty or is in another encoding.
    """
    text = read_text(path)
    if not text:
        raise ValueError(f"{path} is empty: give a file with something in it.")
    return characters(text, vocabulary)


def characters(text: str, vocabulary: Sequence[str] | None = None) -> tuple[np.ndarray, list[str]]:
    """As :func:`read_characters`, of a text that is in memory."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    vocabulary = ["�", *map(chr, np.unique(points))] if vocabulary is None else list(vocabulary)
    numbers = np.zeros(sys.maxunicode + 1, np.int32)
    numbers[[ord(character) for character in vocabulary[1:]]] = np.arange(1, len(vocabulary))
    return numbers[points], vocabulary


def _cut(field: str, x: np.ndarray, *, steps: np.ndarray, valid: np.ndarray | None) -> np.ndarray:
    cut = x[steps if valid is None else np.minimum(steps, len(x) - 1)]
    if valid is not None:
        cut[~valid] = 0
    if jnp.issubdtype(x.dtype, jnp.inexact) and not np.isfinite(cut).all():
        step = steps[~np.isfinite(cut).reshape(*steps.shape, -1).all(-1)].min()
        mapped = _mapped(x)
        if mapped is not None:  # where the step is in the file, of which x may be a slice
            step = (x[step:].ctypes.data - mapped.ctypes.data) // mapped.strides[0]
        raise ValueError(f"`{field}` is not finite at step {step}{_of(mapped)}: fill it in, or cut the corpus there.")
    return cut


def _mapped(x: Any) -> np.memmap | None:
    """The mapped file that ``x`` is a view of, if any."""
    while x is not None and not (isinstance(x, np.memmap) and isinstance(x.base, mmap.mmap)):
        x = getattr(x, "base", None)
    return x


def _of(mapped: np.memmap | None) -> str:
    return "" if mapped is None else f" of {mapped.filename}"


def _forget(mapped: np.memmap) -> None:
    """Gives back the pages that were read, which else count as this process's memory until it has the whole file."""
    if hasattr(mmap, "MADV_DONTNEED") and mapped.mode != "c":  # a private copy's changes live in those pages
        mapped.base.madvise(mmap.MADV_DONTNEED)  # type: ignore[union-attr]
