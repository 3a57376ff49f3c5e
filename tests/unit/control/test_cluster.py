"""A cluster of our own gets a second chance to come up, and a failure says what to do."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlsys.config import load_config
from rlsys.control.cluster import STARTS, cluster, gpus
from rlsys.errors import ClusterError
from tests.fakes import make_config

ROOT = Path(__file__).parents[3]
SLOW = "The current node timed out during startup."


class FakeRay(SimpleNamespace):
    """Fails its first starts with `errors`."""

    def __init__(self, *errors: str) -> None:
        super().__init__(errors=list(errors), starts=0, scratch=None, given={}, have={"CPU": 8.0})

    def init(self, *, address: str, _temp_dir: str = "", **given: object) -> None:
        self.starts += 1
        self.scratch, self.given = Path(_temp_dir), given
        if self.errors:
            raise Exception(self.errors.pop(0))

    def cluster_resources(self) -> dict[str, float]:
        return self.have

    def shutdown(self) -> None:
        pass


def start(ray: FakeRay, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> None:
    monkeypatch.setitem(sys.modules, "ray", ray)
    with cluster(make_config(Path("/nowhere"), *overrides)):
        assert ray.scratch.is_dir()


def test_a_node_that_was_slow_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = FakeRay(SLOW)
    start(ray, monkeypatch)
    assert ray.starts == 2
    assert not ray.scratch.exists()


@pytest.mark.parametrize(("errors", "starts"), [([SLOW] * 9, STARTS), (["no shared memory"], 1)])
def test_one_that_does_not_start_is_explained(errors: list[str], starts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = FakeRay(*errors)
    with pytest.raises(ClusterError, match=r"cannot start a Ray cluster on this machine: .*resources\.address"):
        start(ray, monkeypatch)
    assert ray.starts == starts
    assert not ray.scratch.exists()


def test_a_second_interrupt_while_ray_shuts_down_leaves_no_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    ray = FakeRay()
    monkeypatch.setattr(ray, "shutdown", interrupted, raising=False)
    with pytest.raises(KeyboardInterrupt):
        start(ray, monkeypatch)
    assert not ray.scratch.exists()


def test_one_of_our_own_has_room_for_the_workers_that_may_join(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = FakeRay()
    start(ray, monkeypatch, "scaling.rollout_max=40")
    assert ray.given["num_cpus"] == 41
    assert ray.given["resources"] == {}


def test_one_of_our_own_offers_the_roles_that_are_demanded(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = FakeRay()
    start(ray, monkeypatch, "resources.roles=true", "scaling.rollout_max=3", "reward.workers=9")
    assert ray.given["resources"] == {"learner": 1.0, "rollout": 3.0, "reward": 9.0}


def test_a_cluster_without_room_is_refused_unless_an_autoscaler_may_bring_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ray = FakeRay()
    ray.have = {"CPU": 2.0}
    with pytest.raises(ClusterError, match=r"the cluster has 2 CPU, the run needs 4"):
        start(ray, monkeypatch, "rollout.workers=3")
    start(ray, monkeypatch, "rollout.workers=3", "resources.roles=true")


def test_the_gpu_configuration_fits_the_one_gpu_that_it_is_for() -> None:
    assert gpus(load_config(ROOT / "configs/gpu-qwen.yaml")) == 1.0
    assert gpus(load_config(ROOT / "configs/gpu-qwen.yaml", ["probe.fraction=0"])) == 0.9
    assert gpus(load_config(ROOT / "configs/cluster.yaml", ["learner.ranks=2"])) == 5.0
    assert gpus(load_config(ROOT / "configs/quickstart.yaml")) == 0.0
