"""Several processes that train together, each with lanes or trainings of its own."""

import sys
import zlib

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

from tbptt_jax.study.process.console import console

SILENT = 30  # seconds without a word after which a process counts as dead

FLAGS = flags.FLAGS
flags.DEFINE_string(
    "coordinator",
    None,
    "HOST:PORT of the first of several processes, the same for all; auto: found by itself on Slurm and Kubernetes.",
)
flags.DEFINE_integer("processes", None, "How many processes there are, each with lanes of its own.", lower_bound=1)
flags.DEFINE_integer("process", None, "Which of them this is, from 0.", lower_bound=0)


def join_processes(lanes: int) -> None:
    """Joins the processes that the flags name, before JAX computes anything; none are named: this is the only one.

    A ``ValueError`` if flags do not go together, the others are not found, or the lanes do not divide by all devices.
    """
    if FLAGS.coordinator is None and FLAGS.processes is FLAGS.process is None:
        return
    automatic = FLAGS.coordinator == "auto" and FLAGS.processes is FLAGS.process is None
    all_three = None not in (FLAGS.coordinator, FLAGS.processes, FLAGS.process)
    if not automatic and not (all_three and FLAGS.process < FLAGS.processes):
        raise ValueError(
            "Several processes need --coordinator=HOST:PORT, --processes=N and --process=I with I from 0 to N - 1, or "
            "--coordinator=auto alone."
        )
    given = {"coordinator_address": FLAGS.coordinator, "num_processes": FLAGS.processes, "process_id": FLAGS.process}
    try:
        jax.distributed.initialize(**({} if automatic else given), heartbeat_timeout_seconds=SILENT)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"The processes did not meet: {str(error).splitlines()[0]}") from error
    console.quiet = jax.process_index() > 0
    own = [flag for flag in FLAGS.get_key_flags_for_module(sys.argv[0]) if flag.name not in ("process", "devices")]
    crcs = np.array(
        [zlib.crc32(flag.serialize().encode()) for flag in sorted(own, key=lambda flag: flag.name)], np.int64
    )
    apart = (multihost_utils.process_allgather(crcs.astype(np.uint32)) != crcs.astype(np.uint32)).any(0)
    if apart.any():
        names = ", ".join(
            f"--{flag.name}" for flag, differs in zip(sorted(own, key=lambda f: f.name), apart, strict=True) if differs
        )
        raise ValueError(f"The processes have different flags: {names}. Give all of them the same, but --process.")
    if lanes % jax.device_count():
        raise ValueError(
            f"--lanes={lanes} cannot be spread over the {jax.device_count()} devices of {jax.process_count()} processes: "
            f"give a multiple of {jax.device_count()}."
        )
