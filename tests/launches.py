"""Programs in processes of their own, each forked from one that has imported what launches import and has computed nothing."""

import functools
import multiprocessing
import os
import pathlib
import runpy
import signal
import subprocess
import sys
import tempfile
from unittest import mock

ROOT = pathlib.Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu"}  # with what conftest.py says of compiling
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["experiments.training", "experiments.tasks", "experiments.pictures", "optax", "tensorboardX"]
)


def _main(run, arguments, told):
    for number, stream in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{told}/{stream}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chdir(ROOT)
    sys.argv[1:] = arguments
    run()


class Forked:
    """``run()`` in a new process, with the methods of a ``Popen`` whose streams are pipes."""

    def __init__(self, run, *arguments):
        self._told = tempfile.TemporaryDirectory()
        self._process = FORKS.Process(target=_main, args=(run, [*map(str, arguments)], self._told.name), daemon=True)
        with mock.patch.dict(os.environ, ENVIRONMENT, clear=True):  # of the process that is forked
            self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        return self.returncode

    def wait(self, timeout=None):
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout)
        return self.returncode

    def communicate(self):
        self.wait()
        self.stdout, self.stderr = (pathlib.Path(self._told.name, stream).read_text() for stream in ("out", "err"))
        return self.stdout, self.stderr

    def send_signal(self, number):
        os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def begin(name, *arguments):
    """``python -m experiments.NAME ARGUMENTS``."""
    module = functools.partial(runpy.run_module, f"experiments.{name}", run_name="__main__", alter_sys=True)
    return Forked(module, *arguments)


def run(name, *arguments):
    """A launch that has ended: ``stdout``, ``stderr`` and ``returncode``."""
    launch = begin(name, *arguments)
    launch.communicate()
    return launch
