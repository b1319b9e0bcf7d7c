"""The flags that choose a task: a name or a function of your own, and its arguments."""

import ast
import functools
import inspect
from collections.abc import Callable
from typing import Any

from absl import flags

from tbptt_jax import study
from tbptt_jax.study.process.writing import QUOTED, plain
from tbptt_jax.study.task import maker

FLAGS = flags.FLAGS
SHORT = "hidden", "lanes", "text", "train", "test", "inputs", "targets", "missing", "fill", "decimal"


def define(default: str | None) -> None:
    """Defines ``--task``, ``--set`` and the short ways to set usual arguments."""
    flags.DEFINE_string("task", default, "A task's name, package.module:function, or path/to/file.py:function.")
    flags.DEFINE_multi_string("set", [], "name=value: an argument of the task; may be given again.")
    flags.DEFINE_integer("hidden", None, "Units: the same as --set=hidden=…", lower_bound=1)
    flags.DEFINE_integer("lanes", None, "Streams side by side: the same as --set=lanes=…", lower_bound=1)
    flags.DEFINE_multi_string("text", [], "Of char_lm: a text file; may be given again. None: Python's own manual.")
    flags.DEFINE_string("train", None, "Of forecast: a CSV file. None: two tanks, generated.")
    flags.DEFINE_string("test", None, "Of forecast: another.")
    flags.DEFINE_list("inputs", [], "Of forecast: columns to predict the targets from; none: their own past.")
    flags.DEFINE_list("targets", [], "Of forecast: columns to predict.")
    flags.DEFINE_list("missing", [], "Of forecast: what stands for a missing number besides blank fields, NA and NaN.")
    flags.DEFINE_string("fill", None, "Of forecast: forward, mean or zero: what is read where an input is missing.")
    flags.DEFINE_string("decimal", None, "Of forecast: , or . where the files leave it open.")


def chosen(**more: Any) -> Callable[..., study.Task]:
    """What makes the task that the flags choose; ``more`` are arguments for those tasks that take them.

    Raises:
      ValueError: if there is none, or it does not take what was given.
    """
    if not FLAGS.task:
        raise ValueError(
            "--task is missing: give a task's name, or a function of your own as path/to/file.py:function."
        )
    takes, arguments = inspect.signature(maker(FLAGS.task)).parameters, arguments_of(FLAGS.set)
    for name in SHORT:
        if not FLAGS[name].value:
            continue
        if name not in takes:
            raise ValueError(f"--{name} was given, and --task={FLAGS.task} has no use for it: leave it out.")
        if name in arguments:
            raise ValueError(f"--{name} and --set={name}=… were both given: give one of them.")
        arguments[name] = FLAGS[name].value
    arguments = {name: value for name, value in more.items() if name in takes} | arguments
    return functools.partial(study.task, FLAGS.task, **arguments)


def arguments_of(given: list[str]) -> dict[str, Any]:
    """The arguments that ``--set=name=value`` gives.

    Raises:
      ValueError: if one has no name, or is given twice.
    """
    found: dict[str, Any] = {}
    for each in given:
        name, equals, value = each.partition("=")
        if not equals or not name.isidentifier() or name in found:
            raise ValueError(f"--set={plain(each, QUOTED)}: give --set=name=value, each name once.")
        found[name] = literal(value)
    return found


def swept(given: list[str]) -> dict[str, list[Any]]:
    """The arguments and values that ``--param=name=value,value`` gives.

    Raises:
      ValueError: if one has no name or no values.
    """
    found: dict[str, list[Any]] = {}
    for each in given:
        name, _, values = each.partition("=")
        if not name.isidentifier() or not all(values.split(",")) or name in found:
            raise ValueError(f"--param={plain(each, QUOTED)}: give name=value,value, such as --param=hidden=8,16.")
        found[name] = [literal(value) for value in values.split(",")]
    return found


def literal(value: str) -> Any:
    """A number, True, False, None, a list or a text, as Python writes it; without quotes it is a text."""
    try:
        return ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return value
