"""Launches, each a process of its own, forked from one that has imported what launches import and has computed nothing."""

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


def _main(name, arguments, told):
    """What ``python -m experiments.NAME ARGUMENTS`` does, in the new process."""
    for number, stream in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{told}/{stream}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chdir(ROOT)
    sys.argv[1:] = arguments
    runpy.run_module(f"experiments.{name}", run_name="__main__", alter_sys=True)


class Launch:
    """``python -m experiments.NAME ARGUMENTS``, begun, with the methods of a ``Popen`` whose streams are pipes."""

    def __init__(self, name, *arguments):
        self._told = tempfile.TemporaryDirectory()
        self._process = FORKS.Process(target=_main, args=(name, [*map(str, arguments)], self._told.name), daemon=True)
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


def run(name, *arguments):
    """A launch that has ended: ``stdout``, ``stderr`` and ``returncode``."""
    launch = Launch(name, *arguments)
    launch.communicate()
    return launch
