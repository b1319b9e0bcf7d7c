"""A sweep on a cluster ends with the numbers of a sweep on one machine, also when one of its nodes dies."""

import numpy as np
import pytest

from tbptt_jax import study

ray = pytest.importorskip("ray")


@pytest.fixture
def cluster(monkeypatch):
    """Two nodes of one core each, beside a head without any; a node that is gone is missed in seconds, not in a minute."""
    from ray.cluster_utils import Cluster

    for name, value in {"initial_delay_ms": 500, "period_ms": 500, "failure_threshold": 3}.items():
        monkeypatch.setenv(f"RAY_health_check_{name}", str(value))
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [found.add_node(num_cpus=1) for _ in range(2)]
    ray.init(address=found.address, log_to_driver=False)
    yield found, nodes
    ray.shutdown()
    found.shutdown()


def test_a_node_that_dies_in_the_middle_changes_no_number(cluster, tmp_path):
    found, (_, second) = cluster
    engine, died = study.ray(found.address), []

    def and_then_a_node_dies(jobs, plan, report):
        for number, trained in engine(jobs, plan, report):
            if not died:
                died.append(second)
                found.remove_node(second, allow_graceful=False)
            yield number, trained

    arguments = {"carry": ["stateful"], "seeds": 2, "updates": 100, "budget": "updates"}
    task = study.task("first_bit", hidden=4)
    there = study.sweep(task, [1, 4, 5, 10], workdir=tmp_path / "ray", engine=and_then_a_node_dies, **arguments)
    here = study.sweep(task, [1, 4, 5, 10], workdir=tmp_path / "local", **arguments)
    assert died and there["all_done"] and not there["failed"] and len(there["rows"]) == 4
    for left, right in zip(there["rows"], here["rows"], strict=True):
        assert (left["window"], left["updates"]) == (right["window"], right["updates"])
        np.testing.assert_allclose(
            left["losses"] + left["metrics"], right["losses"] + right["metrics"], rtol=1e-4, atol=1e-5
        )
