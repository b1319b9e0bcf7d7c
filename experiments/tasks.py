"""The flags that choose a task: a name or a function of your own, and its arguments."""

import ast
import functools
import inspect
from collections.abc import Callable
from typing import Any

from absl import flags

from experiments.launch import short
from tbptt_jax import study
from tbptt_jax.study.task import maker

FLAGS = flags.FLAGS
SIZES, TEXT = ("hidden", "layers", "lanes"), ("text", "documents", "unit")
FILES = "train", "valid", "test", "inputs", "targets", "missing", "fill", "decimal", "series", "time"
SERIES = (*FILES, "warm_up", "ahead", "ahead_by")


def define(default: str | None) -> None:
    """Defines ``--task``, ``--set`` and the short ways to set usual arguments."""
    flags.DEFINE_string("task", default, "A task's name, package.module:function, or path/to/file.py:function.")
    flags.DEFINE_multi_string("set", [], "name=value: an argument of the task; may be given again.")
    define_sizes()
    define_text("Of char_lm: ")
    define_series("Of forecast: ")


def define_sizes(hidden: int | None = None, layers: int | None = None, lanes: int | None = None) -> None:
    flags.DEFINE_integer("hidden", hidden, "Units of a layer.", lower_bound=1)
    flags.DEFINE_integer("layers", layers, "LSTM layers.", lower_bound=1, upper_bound=1000)
    flags.DEFINE_integer("lanes", lanes, "Streams, or places of the data, read side by side.", lower_bound=1)


def define_text(of: str = "") -> None:
    flags.DEFINE_multi_string("text", [], f"{of}A file; may be given again. None: the reference manual that ships in Python.")  # fmt: skip
    flags.DEFINE_string("documents", None, f"{of}What is a document, begun anew: files, lines, or the text that ends each, such as '\\n\\n'. Default: each of several files.")  # fmt: skip
    flags.DEFINE_enum("unit", None, ["characters", "bytes"], f"{of}What is predicted, default characters; bytes are of UTF-8.")  # fmt: skip


def define_series(of: str = "") -> None:
    flags.DEFINE_string("train", None, f"{of}CSV file whose first line names the columns. None: two tanks, generated.")
    flags.DEFINE_string("valid", None, f"{of}Another, looked at while training: the parameters that are best there are used.")  # fmt: skip
    flags.DEFINE_string("test", None, f"{of}Another, for the forecast.")
    flags.DEFINE_list("inputs", [], f"{of}Columns to read; one that is a target too is read one row late: its past. None: the targets' past.")  # fmt: skip
    flags.DEFINE_list("targets", [], f"{of}Columns to be told.")
    flags.DEFINE_list("missing", [], f"{of}What stands for a missing number, such as -9999, besides blank fields, NA and NaN.")  # fmt: skip
    flags.DEFINE_enum("fill", None, study.tables.FILLS, f"{of}What is read where an input is missing: the last number before, the training file's mean, or 0; none: it is refused.")  # fmt: skip
    flags.DEFINE_enum("decimal", None, [",", "."], f"{of}What decimals are written with, where the files leave it open.")  # fmt: skip
    flags.DEFINE_string("series", None, f"{of}Column that tells many series of one file apart; each begins from the initial carry.")  # fmt: skip
    flags.DEFINE_string("time", None, f"{of}Column that is kept as text in predictions.csv.")
    flags.DEFINE_string("warm_up", None, f"{of}train: the test goes on where the training file ends, or its last so many rows. 0, the default: it begins from the initial carry.")  # fmt: skip
    flags.DEFINE_integer("ahead", None, f"{of}Steps ahead to forecast, default 1: the row whose inputs were read last.", lower_bound=1)  # fmt: skip
    flags.DEFINE_enum("ahead_by", None, ["recursive", "direct"], f"{of}recursive: forecasts are fed back as the targets' past, other inputs are those of the file. direct: the model has outputs for each step ahead. Default recursive where the targets' past is read.")  # fmt: skip


def given(names: tuple[str, ...]) -> dict[str, Any]:
    """The arguments that flags of these names give, and the LSTM that goes with the influences."""
    influences = FLAGS.influences if "influences" in FLAGS else [FLAGS.influence]
    # cuDNN's LSTM, the default on a GPU, has no transpose, by which uoro moves forward.
    own = {"implementation": "fused"} if "uoro" in influences else {}
    return own | {name: FLAGS[name].value for name in names if FLAGS[name].value}


def chosen(**more: Any) -> Callable[..., study.Task]:
    """What makes the task that the flags choose; ``more`` are arguments for those tasks that take them."""
    if not FLAGS.task:
        raise ValueError("--task is missing: give a task's name, or a function of yours as path/to/file.py:function.")
    takes, arguments = inspect.signature(maker(FLAGS.task)).parameters, arguments_of(FLAGS.set)
    asked = given((*SIZES, *TEXT, *SERIES))
    more["implementation"] = asked.pop("implementation", None)
    for name in asked:
        if name not in takes:
            raise ValueError(f"--{name} was given, and --task={FLAGS.task} has no use for it: leave it out.")
        if name in arguments:
            raise ValueError(f"--{name} and --set={name}=… were both given: give one of them.")
    more = {name: value for name, value in more.items() if name in takes and value is not None}
    return functools.partial(study.task, FLAGS.task, **more | asked | arguments)


def arguments_of(given: list[str]) -> dict[str, Any]:
    """The arguments that ``--set=name=value`` gives; a ``ValueError`` if one has no name, or is given twice."""
    found: dict[str, Any] = {}
    for each in given:
        name, equals, value = each.partition("=")
        if not equals or not name.isidentifier() or name in found:
            raise ValueError(f"--set={short(each)}: give --set=name=value, each name once.")
        found[name] = literal(value)
    return found


def swept(given: list[str]) -> dict[str, list[Any]]:
    """The arguments and values that ``--param=name=value,value`` gives; a ``ValueError`` if one has no name or no values."""
    found: dict[str, list[Any]] = {}
    for each in given:
        name, _, values = each.partition("=")
        if not name.isidentifier() or not all(values.split(",")) or name in found:
            raise ValueError(f"--param={short(each)}: give name=value,value, such as --param=hidden=8,16.")
        found[name] = [literal(value) for value in values.split(",")]
    return found


def literal(value: str) -> Any:
    """A number, True, False, None, a list or a text, as Python writes it; without quotes it is a text."""
    try:
        return ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return value
