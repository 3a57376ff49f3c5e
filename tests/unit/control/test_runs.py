"""Runs found by name, on a made-up cluster."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlsys.control import runs
from rlsys.control.service import NAMESPACE, Status
from rlsys.errors import ClusterError, ConfigError, NoSuchRun
from rlsys.scheduling.crew import WorkerCounts
from tests.fakes import make_config


class Controller:
    """Answers at once; `scale` refuses what is negative."""

    def __init__(self, version: int) -> None:
        self.status = self._method(lambda: Status(phase="training", version=version))
        self.configuration = self._method(lambda: make_config(Path("/runs")))
        self.stop = self._method(lambda: calls.append("stop"))
        self.scale = self._method(self._scale)
        calls: list[Any] = []
        self.calls = calls

    def _scale(self, rollout: int | None, reward: int | None) -> None:
        if rollout is not None and rollout < 0:
            raise ConfigError(f"rollout={rollout}: must be at least 1")
        self.calls.append(("scale", rollout, reward))

    @staticmethod
    def _method(answer: Callable[..., Any]) -> Any:
        return SimpleNamespace(remote=lambda **arguments: (answer, arguments))


class FakeRay(SimpleNamespace):
    """A cluster with these controllers; `silent` ones never answer."""

    def __init__(self, controllers: dict[str, Controller], silent: bool = False) -> None:
        others = [{"name": "other", "namespace": "somebody"}]
        actors = [{"name": name, "namespace": NAMESPACE} for name in controllers]
        super().__init__(util=SimpleNamespace(list_named_actors=lambda all_namespaces: [*actors, *others]))
        self.controllers, self.silent, self.killed = controllers, silent, list[Any]()

    def get_actor(self, name: str, namespace: str) -> Controller:
        assert namespace == NAMESPACE
        if name not in self.controllers:
            raise ValueError("Failed to look up actor")
        return self.controllers[name]

    def wait(self, references: list[Any], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        return ([], references) if self.silent else (references, [])

    def kill(self, controller: Controller) -> None:
        self.killed.append(controller)


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    fake = FakeRay({"quickstart": Controller(3), "sweep": Controller(7)})
    use(fake, monkeypatch)
    return fake


def use(fake: FakeRay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "ray", fake)
    monkeypatch.setattr(runs, "unwrap", lambda reference: reference[0](**reference[1]))


def test_runs_are_the_actors_of_our_namespace(ray: FakeRay) -> None:
    assert runs.names() == ["quickstart", "sweep"]
    assert {name: live.status.version for name, live in runs.look_at_all().items()} == {"quickstart": 3, "sweep": 7}


def test_a_name_is_free_unless_a_run_has_it(ray: FakeRay) -> None:
    runs.require_free("other")
    with pytest.raises(ClusterError, match=r"name=sweep: a run of this name is going on .*`rlsys stop sweep`"):
        runs.require_free("sweep")


def test_a_run_is_stopped_scaled_and_killed_by_its_name(ray: FakeRay) -> None:
    runs.stop("sweep")
    runs.scale("sweep", rollout=3, reward=None)
    runs.kill("sweep")
    assert ray.controllers["sweep"].calls == ["stop", ("scale", 3, None)]
    assert ray.killed == [ray.controllers["sweep"]]
    assert ray.controllers["quickstart"].calls == []


def test_what_a_run_says_against_a_count_is_passed_on(ray: FakeRay) -> None:
    with pytest.raises(ConfigError, match=r"rollout=-1: must be at least 1"):
        runs.scale("sweep", rollout=-1, reward=None)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("quickstrat", "no run 'quickstrat' here; did you mean 'quickstart'?"),
        ("zzz", "no run 'zzz' here; there are quickstart, sweep"),
    ],
)
def test_an_unknown_name_is_answered_with_what_there_is(ray: FakeRay, name: str, said: str) -> None:
    with pytest.raises(NoSuchRun) as refusal:
        runs.look(name)
    assert str(refusal.value) == said


def test_where_there_is_no_run_that_is_said() -> None:
    assert runs.unknown("x", []) == "no run 'x' here; there is none at all"


def test_a_controller_that_does_not_answer_is_said_not_to(monkeypatch: pytest.MonkeyPatch) -> None:
    use(FakeRay({"sweep": Controller(1)}, silent=True), monkeypatch)
    with pytest.raises(ClusterError, match=r"run 'sweep' does not answer for .* `rlsys logs sweep`"):
        runs.look("sweep")


def test_waiting_ends_when_as_many_are_ready_as_were_asked_for(ray: FakeRay, monkeypatch: pytest.MonkeyPatch) -> None:
    ready = iter([1, 1, 2, 3])
    monkeypatch.setattr(runs, "LOOK_S", 0.0)
    ray.controllers["sweep"].status = Controller._method(lambda: status(ready=next(ready)))
    assert runs.wait_for_workers("sweep", {"rollout": 3}).workers["rollout"].ready == 3
    assert next(ready, None) is None


def test_waiting_ends_with_the_run(ray: FakeRay) -> None:
    ray.controllers["sweep"].status = Controller._method(lambda: status(ready=1, phase="saving"))
    with pytest.raises(ClusterError, match=r"run 'sweep' is saving"):
        runs.wait_for_workers("sweep", {"rollout": 3})


def status(*, ready: int, phase: str = "training") -> Status:
    return Status(phase=phase, workers={"rollout": WorkerCounts(desired=3, ready=ready, restarts=0)})
