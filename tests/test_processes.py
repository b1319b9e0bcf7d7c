"""Two processes of two devices each train as one device does, and each goes on from the other's checkpoints."""

import json
import shutil
import socket

import launches
import numpy as np
import orbax.checkpoint as ocp


def launch(workdir, updates, processes):
    """Runs the program in so many processes at once, of two devices each, or in one with one device."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    small = [
        f"--workdir={workdir}",
        f"--updates={updates}",
        "--window=7",
        "--lanes=4",
        "--hidden=8",
        "--checkpoint_every=50",
        "--learning_rate=0.001",
    ]
    text = workdir.parent / "text.txt"
    text.write_text("the cat sat on the mat, and the dog ran. " * 40)
    together = [f"--coordinator=localhost:{port}", f"--processes={processes}", "--devices=2"]
    flags = [[*together, f"--process={i}"] for i in range(processes)] if processes > 1 else [["--devices=1"]]
    runs = [launches.begin("char_lm", *small, f"--text={text}", *own) for own in flags]
    told = [run.communicate() for run in runs]
    assert not any(run.returncode for run in runs), told
    return told[0][0]


def parameters(workdir, update):
    content = json.loads((workdir / "checkpoints" / str(update) / "run" / "metadata").read_text())["content"]
    arrays = ocp.StandardCheckpointer().restore(workdir / "checkpoints" / str(update) / "arrays")
    return {
        leaf["path"]: np.asarray(arrays[str(i)]).view(leaf["dtype"])  # they are kept as bytes
        for i, leaf in enumerate(content["leaves"])
        if leaf["path"][:6] == "params"
    }


def test_processes_and_devices_change_nothing_and_go_on_from_each_others_checkpoints(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    launch(one, 100, 1)
    launch(two, 100, 2)
    expected = parameters(one, 100)
    for workdir in (one, two):  # the run of the one, taken up by the other
        shutil.copytree(workdir, changed := tmp_path / f"from_{workdir.name}")
        shutil.rmtree(changed / "checkpoints" / "100")
        assert "Going on from update 50 of 100" in launch(changed, 100, 3 - (1 if workdir is one else 2))
    for workdir in (two, tmp_path / "from_one", tmp_path / "from_two"):
        got = parameters(workdir, 100)
        assert got.keys() == expected.keys()
        for path, p in got.items():
            np.testing.assert_allclose(p, expected[path], rtol=0, atol=1e-6, err_msg=path)
