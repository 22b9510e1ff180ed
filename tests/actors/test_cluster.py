"""What a run asks of the cluster and what it gets; connecting to one."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import serve

from actors import cluster, crew
from actors import layout as actors_layout
from actors.cluster import _reach, connected
from actors.devices import Placement, settle
from actors.layout import Layout, lay_out
from simulator.errors import InputError
from simulator.plan.config import check_config

ROOT = Path(__file__).parents[2]


def layout(
    monkeypatch: pytest.MonkeyPatch, nodes: list[dict[str, float]], scenarios: int = 99, **config: Any
) -> Layout:
    """The layout on a cluster of these nodes."""
    alive = [{"Alive": True, "Resources": node} for node in nodes]
    monkeypatch.setattr(cluster.ray, "nodes", lambda: [*alive, {"Alive": False, "Resources": {"CPU": 1e6, "GPU": 1e6}}])
    data = {"name": "test", "dataset": "digits", "watermarks": ["deeptracer"], **config}
    return lay_out(check_config(data), scenarios)


#: not the defaults, which may change
SHARES = {"attacker": 0.5, "trainer": 0.5, "victim": 0.25, "collector": 0.25}


@pytest.mark.parametrize(
    ("nodes", "config", "shares", "attackers", "gpu"),
    [
        pytest.param([{"CPU": 8}], {}, {}, 8, False, id="one for each core"),
        pytest.param([{"CPU": 8}], {}, {"attacker": 1.0}, 7, False, id="every CPU is used"),
        pytest.param([{"CPU": 2}], {}, {}, 2, False, id="two CPUs"),
        pytest.param([{"CPU": 4}, {"CPU": 4}], {}, {"attacker": 1.0}, 7, False, id="nodes add up"),
        pytest.param([{"CPU": 3}], {}, {"attacker": 0.1, "attackers": 20}, 20, False, id="tenths add up"),
        pytest.param([{"CPU": 1.4}, {"CPU": 1.1}], {}, {"attacker": 0.75}, 1, False, id="a share lies on one node"),
        pytest.param([{"CPU": 8}], {}, {"attackers": 3}, 3, False, id="as many as asked"),
        pytest.param(
            [{"CPU": 8}], {}, {"trainers": 4, "replicas": 3, "attacker": 1.0}, 5, False, id="more of the others"
        ),
        pytest.param([{"CPU": 8}], {}, {"collectors": 5, "attacker": 1.0}, 6, False, id="more collectors"),
        pytest.param([{"CPU": 1, "GPU": 100}], {}, {"collectors": 2}, 3, True, id="collectors take a GPU node's CPU"),
        pytest.param([{"CPU": 8, "GPU": 1}], {}, {"attacker": 0.0625}, 4, True, id="one GPU"),
        pytest.param([{"CPU": 8, "GPU": 2}], {"device": "cpu"}, {"attacker": 1.0}, 7, False, id="GPUs not wanted"),
        pytest.param([{"CPU": 8, "GPU": 2}], {"device": "cuda"}, {}, 2, True, id="GPUs demanded"),
        pytest.param([{"CPU": 8, "GPU": 2}], {}, {"attacker": 0.6}, 1, True, id="a share lies on one GPU"),
        pytest.param([{"CPU": 8, "GPU": 2}, {"CPU": 8, "GPU": 3}], {}, {"attacker": 2.0}, 1, True, id="whole GPUs"),
        pytest.param([{"CPU": 1, "GPU": 100}], {}, {}, 5, True, id="a GPU needs some of a CPU beside it"),
    ],
)
def test_as_many_attackers_as_fit(
    monkeypatch: pytest.MonkeyPatch, nodes: list[dict[str, float]], config: Any, shares: Any, attackers: int, gpu: bool
) -> None:
    found = layout(monkeypatch, nodes, **config, resources=SHARES | shares)
    assert (found.attackers, found.gpu) == (attackers, gpu)
    assert found.attacker.gpu == found.trainer.gpu == found.victim.gpu == gpu
    assert not found.collector.gpu


def test_no_more_attackers_than_scenarios_and_at_least_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert layout(monkeypatch, [{"CPU": 8}], scenarios=2).attackers == 2
    assert layout(monkeypatch, [{"CPU": 8}], scenarios=0).attackers == 1


@pytest.mark.parametrize("node", [{"CPU": 1}, {"CPU": 1, "GPU": 1}])
def test_by_default_a_run_fits_the_smallest_machine(monkeypatch: pytest.MonkeyPatch, node: dict[str, float]) -> None:
    assert layout(monkeypatch, [node]).attackers == 1


@pytest.mark.parametrize(
    ("nodes", "device", "shares", "words"),
    [
        ([{"CPU": 8}], "cuda", {}, ["device", "cuda", "none", "auto"]),
        ([{}], "auto", {}, ["resources.attacker", "0.5 CPU", "0"]),
        ([{"CPU": 8}], "auto", {"attacker": 9.0}, ["resources.attacker", "9 CPU", "8"]),
        ([{"CPU": 8}], "auto", {"trainer": 16.0}, ["resources.trainer", "16 CPU", "8"]),
        ([{"CPU": 2}, {"CPU": 2}], "auto", {"victim": 3.0}, ["resources.victim", "3 CPU", "2"]),
        ([{"CPU": 4, "GPU": 1}], "auto", {"attacker": 2.0}, ["resources.attacker", "2 GPU", "1"]),
        ([{"CPU": 8, "GPU": 4}], "auto", {"attacker": 1.5}, ["resources.attacker", "1.5 GPU", "whole"]),
        ([{"CPU": 8}], "auto", {"collector": 9.0}, ["resources.collector", "9 CPU", "8"]),
        ([{"CPU": 8}], "auto", {"victim": 0.00001}, ["resources.victim", "1e-05 CPU", "0.0001"]),
        ([{"CPU": 8}], "auto", {"attackers": 15}, ["resources", "15 x 0.5", "1 for the rest", "CPU", "8"]),
        ([{"CPU": 1}], "auto", {}, ["resources", "1 x 0.5", "1 for the rest", "CPU", "1"]),
        ([{"CPU": 8}], "auto", {"trainers": 100}, ["resources", "50.5 for the rest", "CPU", "8"]),
        ([{"CPU": 8, "GPU": 1}], "auto", {"attackers": 2}, ["resources", "2 x 0.5", "0.75 for the rest", "GPU", "1"]),
        ([{"CPU": 0.5, "GPU": 8}], "auto", {"attackers": 9}, ["resources", "9 x 0.1", "CPU", "0.5"]),
    ],
)
def test_what_does_not_fit_is_named_with_what_there_is(
    monkeypatch: pytest.MonkeyPatch, nodes: list[dict[str, float]], device: str, shares: Any, words: list[str]
) -> None:
    with pytest.raises(InputError) as caught:
        layout(monkeypatch, nodes, device=device, resources=SHARES | shares)
    line = str(caught.value)
    assert "\n" not in line
    assert [word for word in words if word not in line] == [], line


class Autoscaler:
    """Gives the nodes that it is asked for, one at a look."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, head: dict[str, float], worker: dict[str, float], most: int):
        self.nodes, self.worker, self.most, self.asked = [head], worker, most, [[{}]]
        monkeypatch.setattr(cluster.ray, "nodes", self.look)
        monkeypatch.setattr(actors_layout, "request_resources", lambda bundles: self.asked.append(bundles))
        monkeypatch.setattr(actors_layout, "GROWTH_POLL", 0.0)

    def look(self) -> list[dict[str, Any]]:
        found = [{"Alive": True, "Resources": node} for node in self.nodes]
        if self.asked[-1] and len(self.nodes) <= self.most:
            self.nodes.append(self.worker)
        return found


@pytest.mark.parametrize(
    ("most", "attackers", "patience", "nodes"),
    [
        pytest.param(8, 5, 60.0, 5, id="all that is wanted comes, and no more is waited for"),
        pytest.param(2, 5, 0.2, 3, id="what has come in time is used"),
    ],
)
def test_workers_that_scale_from_zero_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, most: int, attackers: int, patience: float, nodes: int
) -> None:
    scaler = Autoscaler(monkeypatch, {"CPU": 4}, {"CPU": 4, "GPU": 1}, most)
    data = {"name": "test", "dataset": "digits", "watermarks": ["deeptracer"], "resources": SHARES}
    config = check_config(data)
    assert not lay_out(config, attackers).gpu
    scaler.nodes = scaler.nodes[:1]
    actors_layout.grow(config, attackers, patience)
    _, asked, taken_back = scaler.asked
    assert asked == [{"GPU": 0.5, "CPU": 0.1}] * 6 + [{"GPU": 0.25, "CPU": 0.1}]
    assert taken_back == []
    assert len(scaler.nodes) - nodes in (0, 1)  # the one that came after the last look
    assert lay_out(config, attackers).gpu


def test_a_run_on_cpus_asks_for_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    scaler = Autoscaler(monkeypatch, {"CPU": 1}, {"CPU": 4}, 1)
    data = {"name": "test", "dataset": "digits", "watermarks": ["deeptracer"], "device": "cpu", "resources": SHARES}
    actors_layout.grow(check_config(data), 2, 60.0)
    assert scaler.asked[1:] == [[{"CPU": 0.5}] * 3 + [{"CPU": 0.25}], []]


def test_a_placement_asks_for_a_gpu_and_a_little_of_a_cpu_or_for_a_cpu_alone() -> None:
    assert Placement(True, 0.25).options() == {"num_gpus": 0.25, "num_cpus": 0.1}
    assert Placement(False, 0.25).options() == {"num_cpus": 0.25}


def test_without_a_gpu_of_its_own_a_process_computes_on_the_cpu() -> None:
    assert settle(Placement(False, 1.0)).type == "cpu"


@pytest.mark.ray
def test_a_job_that_is_stopped_ends_as_by_ctrl_c() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), cluster._terminated_as_interrupted():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.ray
@pytest.mark.slow
def test_the_service_that_a_killed_driver_has_left_is_ended(ray_session: None) -> None:
    class Left:
        def __call__(self) -> None: ...

    serve.start(proxy_location="Disabled")
    serve.run(serve.deployment(Left).bind(), name="exsim-left", route_prefix=None)
    crew._end_service("exsim-other")
    assert "exsim-left" in serve.status().applications
    crew._end_service("exsim-left")
    assert "exsim-left" not in serve.status().applications


@pytest.mark.parametrize(
    ("gpu", "node", "fits"),
    [
        (False, {"CPU": 1.0}, True),
        (False, {"CPU": 0.25, "GPU": 1.0}, False),
        (True, {"CPU": 1.0, "GPU": 1.0}, True),
        (True, {"CPU": 1.0}, False),
    ],
)
def test_what_a_node_can_hold(gpu: bool, node: dict[str, float], fits: bool) -> None:
    assert Placement(gpu, 0.5).fits(node) == fits


def test_a_connection_that_exists_is_used_and_left_alone(ray_session: None, tmp_path: Path) -> None:
    node = ray.get_runtime_context().get_node_id()
    with connected("10.255.255.1:1", tmp_path):
        assert ray.get_runtime_context().get_node_id() == node
    assert ray.is_initialized()


@pytest.mark.ray
def test_what_the_raylet_complains_of_goes_to_the_log(
    ray_session: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = "WARNING: 9 PYTHON worker processes have been started on node: xyz"
    message = {"lines": [line], "pid": "raylet", "is_err": False}
    with connected(None, tmp_path):
        # looked up where Ray's own thread does
        ray._private.worker.print_to_stdstream(message, ignore_prefix=False)
    assert capsys.readouterr().out == ""
    assert line in (tmp_path / "driver.log").read_text()
    ray._private.worker.print_to_stdstream(message, ignore_prefix=False)
    assert line in capsys.readouterr().out


ON_A_LOGICAL_GPU = """
import os, sys
from pathlib import Path
import ray
from ray import serve
from actors.cluster import _reach, connected
from actors.devices import settle
from actors.layout import lay_out
from simulator.config import check_config

@ray.remote
class Attacker:
    def __init__(self, placement):
        self.seen = os.getpid(), ray.get_gpu_ids(), settle(placement).type

    def look(self):
        return self.seen

shares = {"attacker": 0.25, "trainer": 0.25, "victim": 0.25}
config = check_config({"name": "x", "dataset": "digits", "watermarks": ["deeptracer"], "resources": shares})
logs = Path(sys.argv[1])
with connected(None, logs, cpus=4, gpus=1):
    layout = lay_out(config, 99)
    assert layout.gpu and layout.attackers == 2, layout
    options = layout.attacker.options()
    actors = [Attacker.options(**options).remote(layout.attacker) for _ in range(layout.attackers)]
    found = ray.get([actor.look.remote() for actor in actors])
    left = ray.available_resources()
print(found, left)
assert len({pid for pid, _, _ in found}) == 2
assert all(gpus == [0] for _, gpus, _ in found)
assert (left["GPU"], round(left["CPU"], 4)) == (0.5, 3.8)
assert not ray.is_initialized()
assert any((logs / "ray").iterdir())
"""


@pytest.mark.ray
@pytest.mark.slow
def test_attackers_share_a_logical_gpu(tmp_path: Path) -> None:
    """A Ray of its own, in a process of its own: the session's has no GPU."""
    command = [sys.executable, "-c", ON_A_LOGICAL_GPU, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "127.0.0.1:nought", "127.0.0.1:99999999"])
def test_an_address_where_nothing_listens_is_one_line_at_once(address: str) -> None:
    with pytest.raises(InputError, match="no Ray cluster at") as caught:
        _reach(address)
    assert "\n" not in str(caught.value)
