"""The controller's phases, on a loop that is made up."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlsys.control import build, service
from rlsys.control.service import ControllerActor
from tests.fakes import make_config


class Loop:
    """Ends at once; remembers in which phase it ran, and whether it was to stop."""

    def __init__(self) -> None:
        self.progress = SimpleNamespace(version=3, published_version=3, metrics={}, acks={}, evaluations={}, workers={})
        self.ledger = SimpleNamespace(counts=dict)
        self.workers = SimpleNamespace(scale=lambda why, **asked: self.scaled.append(asked))
        self.scaled: list[dict[str, int]] = []
        self.stopped, self.ran_in = False, ""
        self.phase: Callable[[], str] = str

    def stop(self) -> None:
        self.stopped = True

    async def run(self) -> None:
        self.ran_in = self.phase()

    async def checkpoint(self) -> None:
        pass


class Journal:
    """Remembers whether it was closed."""

    closed = False

    def event(self, name: str, text: str) -> None:
        pass

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What `build` will return, once it is `built`."""
    made = SimpleNamespace(loop=Loop(), journal=Journal(), built=asyncio.Event())

    async def fake(*_: Any) -> tuple[Loop, None, Journal]:
        await made.built.wait()
        return made.loop, None, made.journal

    monkeypatch.setattr(build, "build", fake)
    monkeypatch.setattr(service, "settle", lambda *_: None)
    return made


def controller(tmp_path: Path, made: SimpleNamespace, *overrides: str) -> Any:
    """The class under the actor."""
    config = make_config(tmp_path, *overrides)
    actor = ControllerActor.__ray_metadata__.modified_class(config, "model", None)  # type: ignore[attr-defined]
    made.loop.phase = lambda: actor._phase
    return actor


def test_a_run_that_is_stopped_while_it_starts_never_says_that_it_trains(tmp_path: Path, made: SimpleNamespace) -> None:
    async def main() -> None:
        actor = controller(tmp_path, made)
        run = asyncio.create_task(actor.run())
        await asyncio.sleep(0)
        await actor.stop()
        assert (await actor.status()).phase == "stopping"
        made.built.set()
        assert (await run).phase == "finished"
        assert (made.loop.ran_in, made.loop.stopped) == ("stopping", True)

    asyncio.run(main())


def test_a_run_that_is_scaled_while_it_starts_trains_with_what_was_asked_for(
    tmp_path: Path, made: SimpleNamespace
) -> None:
    async def main() -> None:
        actor = controller(tmp_path, made)
        run = asyncio.create_task(actor.run())
        await asyncio.sleep(0)
        await actor.scale(rollout=2)
        made.built.set()
        await run
        assert (made.loop.ran_in, made.loop.stopped, made.loop.scaled) == ("training", False, [{"rollout": 2}])

    asyncio.run(main())


def test_the_journal_is_closed_whatever_fails(
    tmp_path: Path, made: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> str:
        raise ValueError("no such node")

    monkeypatch.setattr(service, "metrics_endpoint", fail)
    made.built.set()
    with pytest.raises(ValueError, match="no such node"):
        asyncio.run(controller(tmp_path, made, "observability.prometheus=true").run())
    assert made.journal.closed
