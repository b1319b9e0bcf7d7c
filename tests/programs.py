"""Launches in this process, for as long as a test needs one; launches.py has those in processes of their own."""

import importlib
import re
import sys

import pytest
from absl import flags
from absl.testing import flagsaver

from experiments import launch
from tbptt_jax.study.process import lock


def program_of(name):
    """A launch's module, which is unloaded with its flags afterwards: launches have flags of the same names."""
    module = importlib.import_module(f"experiments.{name}")
    yield module
    by_module = flags.FLAGS.flags_by_module_dict()
    for defined_in in (module.__name__, "experiments.tasks", "experiments.training"):
        for flag in list(by_module.get(defined_in, [])):
            delattr(flags.FLAGS, flag.name)
    del sys.modules[module.__name__]


def refused(program, monkeypatch, workdir, arguments, said):
    """What is refused computes nothing, so it is in this process: it writes nothing, and its sentence is returned.

    ``.*`` in what is said stands for anything.
    """
    before = sorted(workdir.iterdir()) if workdir.exists() else None
    monkeypatch.setattr(sys, "argv", [program.__name__])
    with (
        flagsaver.flagsaver(),
        pytest.raises((ValueError, flags.Error), match=".*".join(map(re.escape, said.split(".*")))) as raised,
    ):
        flags.FLAGS(["", f"--workdir={workdir}", *arguments])
        launch.check_flags()
        program.main()
    lock.release()
    assert before == (sorted(workdir.iterdir()) if workdir.exists() else None)
    return str(raised.value)
