"""A launch's module in this process, for as long as a test needs it: launches have flags of the same names."""

import importlib
import sys

from absl import flags


def program_of(name):
    module = importlib.import_module(f"experiments.{name}")
    yield module
    by_module = flags.FLAGS.flags_by_module_dict()
    for defined_in in (module.__name__, "experiments.tasks", "experiments.training"):
        for flag in list(by_module.get(defined_in, [])):
            delattr(flags.FLAGS, flag.name)
    del sys.modules[module.__name__]
