"""What a launch writes beside what it found: its flags, versions and devices."""

import pathlib
import platform
import sys
from importlib.metadata import version
from typing import Any

import jax
from absl import flags

from tbptt_jax.study.process.console import say
from tbptt_jax.study.process.lock import expanded
from tbptt_jax.study.process.writing import whole, write_files, write_json

FLAGS = flags.FLAGS


def made_by() -> dict[str, Any]:
    """The flags, versions and devices of this launch."""
    own = FLAGS.get_key_flags_for_module(sys.argv[0])
    return {
        "flags": {flag.name: flag.value for flag in own},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in ("jax", "flax", "optax")}},
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }


def write_flags(directory: pathlib.Path) -> None:
    """``flags.txt``, to launch it again with ``--flagfile``."""
    own = FLAGS.get_key_flags_for_module(sys.argv[0])
    text = "".join(f"{flag.serialize()}\n" for flag in own if flag.serialize())
    write_files(directory, {"flags.txt": text.encode()})


def write_results(workdir: str | pathlib.Path, results: dict[str, Any], figure: Any = None, more: str = "") -> None:
    """Writes ``results.json`` with the flags and versions of this run, ``flags.txt`` and a figure, each whole or not at all.

    What is not finite, as where a training diverged, is written as null. It says what was written, ``more`` as well.
    """
    if jax.process_index() > 0:
        return
    directory = expanded(workdir)
    write_flags(directory)
    if figure is not None:
        with whole(directory / "figure.png") as path:
            figure.savefig(path, dpi=150, bbox_inches="tight", format="png")
    write_json(directory / "results.json", {**results, **made_by()})
    say(f"Written to {directory}: results.json, {'figure.png, ' if figure is not None else ''}flags.txt{more}")
