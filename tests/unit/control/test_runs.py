"""Runs found by name, on a made-up cluster."""

from collections.abc import Callable, Collection
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
        return SimpleNamespace(answer=answer, remote=lambda **arguments: (answer, arguments))


class FakeRay(SimpleNamespace):
    """A cluster with these controllers; the `silent` never answer. `waits` counts how often somebody waited."""

    def __init__(self, controllers: dict[str, Controller], silent: Collection[str] = ()) -> None:
        others = [{"name": "other", "namespace": "somebody"}]
        actors = [{"name": name, "namespace": NAMESPACE} for name in controllers]
        super().__init__(util=SimpleNamespace(list_named_actors=lambda all_namespaces: [*actors, *others]))
        self.controllers, self.killed, self.waits = controllers, list[Any](), 0
        self.silent = [controllers[name] for name in silent]

    def get_actor(self, name: str, namespace: str) -> Controller:
        assert namespace == NAMESPACE
        if name not in self.controllers:
            raise ValueError("Failed to look up actor")
        return self.controllers[name]

    def wait(self, references: list[Any], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        self.waits += 1
        methods = [
            method for one in self.silent for method in vars(one).values() if isinstance(method, SimpleNamespace)
        ]
        silent = [method.answer for method in methods]
        return [one for one in references if one[0] not in silent], [one for one in references if one[0] in silent]

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
    found, silent = runs.look_at_all()
    assert {name: live.status.version for name, live in found.items()} == {"quickstart": 3, "sweep": 7}
    assert silent == {}
    assert ray.waits == 1


def test_in_a_cluster_without_runs_nobody_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeRay({})
    use(fake, monkeypatch)
    assert (runs.look_at_all(), fake.waits) == (({}, {}), 0)


def test_a_silent_run_hides_no_other_and_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeRay({name: Controller(version) for version, name in enumerate("abc")}, silent="ab")
    use(fake, monkeypatch)
    found, silent = runs.look_at_all()
    assert list(found) == ["c"]
    assert list(silent) == ["a", "b"]
    assert str(silent["b"]) == "run 'b' does not answer for 60 s; `rlsys logs b` may say why"
    assert fake.waits == 1


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
    use(FakeRay({"sweep": Controller(1)}, silent=["sweep"]), monkeypatch)
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


def test_waiting_ends_when_the_run_settles_for_another_number(ray: FakeRay, monkeypatch: pytest.MonkeyPatch) -> None:
    desired = iter([3, 3, 1])
    monkeypatch.setattr(runs, "LOOK_S", 0.0)
    ray.controllers["sweep"].status = Controller._method(lambda: status(ready=1, desired=next(desired)))
    with pytest.raises(ClusterError, match=r"run 'sweep' wants 1 rollout workers by now, not 3"):
        runs.wait_for_workers("sweep", {"rollout": 3})


def test_a_run_that_still_starts_is_waited_for(ray: FakeRay, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = iter([Status(phase="starting"), status(ready=1), status(ready=3)])
    monkeypatch.setattr(runs, "LOOK_S", 0.0)
    ray.controllers["sweep"].status = Controller._method(lambda: next(seen))
    assert runs.wait_for_workers("sweep", {"rollout": 3}) == status(ready=3)


def test_who_waits_for_so_long_and_no_longer_is_told_how_many_are_ready(
    ray: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([100.0, 129.0, 131.0])
    monkeypatch.setattr(runs, "time", SimpleNamespace(monotonic=lambda: next(times), sleep=lambda seconds: None))
    ray.controllers["sweep"].status = Controller._method(lambda: status(ready=1))
    with pytest.raises(ClusterError, match=r"run 'sweep' has not got its workers ready within 30 s: rollout 1/3 ready"):
        runs.wait_for_workers("sweep", {"rollout": 3}, within_s=30)
    assert next(times, None) is None


def status(*, ready: int, desired: int = 3, phase: str = "training") -> Status:
    return Status(phase=phase, workers={"rollout": WorkerCounts(desired=desired, ready=ready, restarts=0)})
