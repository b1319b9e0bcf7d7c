"""The house stands: imports go down, and what the README shows runs as pasted."""

import ast
import os
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
FLOORS = {
    "arrays": 0, "noise": 1, "begin": 1, "modules": 2, "window": 1, "per_sequence": 1, "class_weights": 2, "cutting": 2, "pack": 2, "files": 2, "streams": 3, "tasks": 3, "influence": 2, "step_by_step": 1, "rematerialise": 1, "recurrence": 2, "blocks": 4, "flax_models": 4, "penalties": 3, "forcing": 3, "cells": 5, "streaming": 3, "rollout": 4, "schedules": 2, "ranges": 3, "gradient": 4, "predicting": 4, "training": 5, "horizon": 5, "sharding": 5, "checkpoint_leaves": 4, "checkpoint": 5, "exporting": 5, "weights": 6, "study": 7, "testing": 8,
}  # fmt: skip


def room(path):
    return path.relative_to(ROOT / "tbptt_jax").parts[0].removesuffix(".py")


def test_imports_go_down():
    for path in (ROOT / "tbptt_jax").rglob("*.py"):
        if room(path) == "__init__":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0 and node.module != "tbptt_jax", f"{path}: import from a room, by its full name"
            names = (
                [node.module]
                if isinstance(node, ast.ImportFrom)
                else [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else []
            )
            for name in names:
                if isinstance(node, ast.Import | ast.ImportFrom) and name and name.startswith("tbptt_jax."):
                    here, there = room(path), name.split(".")[1]
                    assert here == there or FLOORS[there] < FLOORS[here], f"{path}: {name}"
                assert not (name or "").startswith("experiments")


def test_no_file_of_the_library_is_longer_than_400_lines():
    for path in (ROOT / "tbptt_jax").rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 400, path


def test_no_scan_is_associative():
    """On a CPU its gradient, with resets and inside a scan over windows, ends the process (jaxlib 0.10)."""
    for path in (ROOT / "tbptt_jax").rglob("*.py"):
        assert "associative_scan" not in path.read_text(), path


def test_the_readmes_program_runs_as_pasted_and_learns():
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(program.strip().splitlines()) <= 25
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert float(ran.stdout.splitlines()[-1]) < 0.01  # the loss of the last line, evaluated


def test_the_readmes_task_is_swept_trained_and_used_as_pasted(tmp_path):
    text = (ROOT / "README.md").read_text()
    task, use = re.findall(r"```py\n(.*?)```", text, re.S)[:2]
    assert len(task.strip().splitlines()) <= 40
    (tmp_path / "mine.py").write_text(task)
    sweep, fit = re.findall(r"^\.venv/bin/python (-m experiments.*--task=mine\.py.*)$", text, re.M)[:2]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    small = ["--windows=5,20", "--seeds=1", "--updates=5"], ["--updates=40"]
    for command, fewer in zip((sweep, fit), small, strict=True):
        subprocess.run([sys.executable, *command.split(), *fewer], cwd=tmp_path, env=environment, check=True)
    assert "Recommended" in (tmp_path / "runs/sweep/report.html").read_text()
    ran = subprocess.run([sys.executable, "-c", use], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert ran.returncode == 0, ran.stderr
    whole, last = ran.stdout.splitlines()
    assert abs(float(whole.strip("[]").split()[-1]) - float(last.strip("[]"))) < 1e-6
