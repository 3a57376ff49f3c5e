"""A cluster of our own gets a second chance to come up, and a failure says what to do."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlsys.control.cluster import STARTS, cluster
from rlsys.errors import ClusterError
from tests.fakes import make_config

SLOW = "The current node timed out during startup."


class FakeRay(SimpleNamespace):
    """Fails its first starts with `errors`."""

    def __init__(self, *errors: str) -> None:
        super().__init__(errors=list(errors), starts=0, scratch=None)

    def init(self, *, _temp_dir: str, **_: object) -> None:
        self.starts += 1
        self.scratch = Path(_temp_dir)
        if self.errors:
            raise Exception(self.errors.pop(0))

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 8.0}

    def shutdown(self) -> None:
        pass


def start(ray: FakeRay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", ray)
    with cluster(make_config(Path("/nowhere"))):
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
