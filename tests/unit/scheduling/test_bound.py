"""The bound on staleness holds by construction: no order of events can break it, and some order reaches it.

`Run` plays admission, routing, decoding, updates in the middle of a response, completion and consumption with the
real `Ledger` and `Router`; who does what next is up to chance or to an adversary.
"""

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from rlsys.algo.staleness import staleness_bound
from rlsys.scheduling.ledger import End, Ledger, State
from rlsys.scheduling.routing import Router
from tests.fakes import make_prompt

FIRST = 10
"""Learner version at the start, so that workers can be behind from the first step on."""


@dataclass(frozen=True)
class Rules:
    """P groups a step, B slots, window W, serving lag L as promised; `router_lag` as the router enforces it."""

    groups: int
    slots: int
    window: int
    lag: int
    router_lag: int

    @classmethod
    def promising(
        cls, *, groups: int, spare: int, window: int, lag: int, more_slots: int = 0, more_lag: int = 0
    ) -> "Rules":
        """B = (S+1)P - (W-1) with S = `spare`, and how far to break the rules."""
        slots = (spare + 1) * groups - (window - 1)
        return cls(groups, slots + more_slots, window, lag, lag + more_lag)

    @property
    def bound(self) -> int:
        return staleness_bound(self.slots, self.window, self.groups, self.lag)


@dataclass
class Run:
    """One world: what workers serve, which versions sampled each slot's tokens, how old they were when trained."""

    rules: Rules
    workers: int = 2
    version: int = FIRST
    ages: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ledger = Ledger(capacity=self.rules.slots, window=self.rules.window)
        self.router = Router(max_lag=self.rules.router_lag, capacity=10**9)
        for name in self.names:
            self.router.add(name)
            self.router.acknowledge(name, max(0, self.version - self.rules.router_lag))
        self.tokens: dict[int, list[int]] = {}
        self.attempt: dict[int, int] = {}
        self.admit()

    @property
    def names(self) -> list[str]:
        return [f"w{number}" for number in range(self.workers)]

    def serving(self, name: str) -> int:
        version = self.router.workers[name].serving_version
        assert version is not None
        return version

    def admit(self) -> None:
        while self.ledger.has_room:
            self.ledger.admit(make_prompt(self.ledger.next_id), self.version)

    def route(self) -> bool:
        """Give out the next prompt; its first token is sampled at once."""
        slot, worker = self.ledger.next_waiting(), self.router.choose(self.version)
        if slot is None or worker is None:
            return False
        self.attempt[slot.id] = self.ledger.start(slot.id, worker.name)
        worker.in_flight += 1
        self.tokens[slot.id] = []
        self.decode(slot.id)
        return True

    def decode(self, slot: int) -> None:
        worker = next(s.worker for s in self.ledger.open if s.id == slot)
        assert worker is not None
        self.tokens[slot].append(self.serving(worker))

    def running(self) -> list[int]:
        return [slot.id for slot in self.ledger.open if slot.state is State.IN_FLIGHT]

    def _leave(self, slot: int) -> int:
        worker = next(s.worker for s in self.ledger.open if s.id == slot)
        assert worker is not None
        self.router.workers[worker].in_flight -= 1
        return self.attempt[slot]

    def finish(self, slot: int) -> None:
        assert self.ledger.finish(slot, self._leave(slot))

    def lose(self, slot: int) -> None:
        assert self.ledger.retry(slot, self._leave(slot))

    def fail(self, slot: int) -> None:
        assert self.ledger.fail(slot, self._leave(slot), End.FAILED_REWARD, self.version)
        self.admit()

    def sync(self, name: str, version: int) -> None:
        self.router.acknowledge(name, version)

    def learn(self) -> bool:
        if not self.ledger.batch_ready(self.rules.groups):
            return False
        batch = [slot.id for slot in self.ledger.take_batch(self.rules.groups)]
        self.ages += [self.version - token for slot in batch for token in self.tokens[slot]]
        self.version += 1
        self.ledger.commit(batch, self.version)
        self.admit()
        return True


def by_chance(rules: Rules, chance: random.Random, events: int = 120) -> Run:
    """Anything that can happen happens in any order, workers failing and workers lagging as far as they like."""
    run = Run(rules, workers=chance.randint(1, 3))
    habits = [chance.random() for _ in range(6)]
    for _ in range(events):
        what = chance.choices(["route", "decode", "finish", "sync", "learn", "trouble"], [*habits[:5], habits[5] / 10])[
            0
        ]
        slots = run.running()
        if what == "route":
            run.route()
        elif what == "learn":
            run.learn()
        elif what == "sync":
            name = chance.choice(run.names)
            run.sync(name, chance.randint(run.serving(name), run.version))
        elif slots and what == "trouble":
            chance.choice([run.lose, run.fail])(chance.choice(slots))
        elif slots:
            getattr(run, what)(chance.choice(slots))
    return run


def by_adversary(rules: Rules, victim: int, steps: int, *, hold_back_all: bool = False) -> int:
    """Hold back one slot, sampled from weights as old as the router lets pass, as long as others make batches.

    With `hold_back_all` also those admitted behind it, one of which finishes whenever no batch can be made.
    Returns the age of the oldest token trained.
    """
    run = Run(rules, workers=1)
    while run.version < FIRST + steps:
        run.sync("w0", run.version - rules.router_lag)  # only as new as it must be to get prompts
        while run.route():
            pass
        for slot in run.running():
            if slot < victim or (slot > victim and not hold_back_all):
                run.finish(slot)
        if not run.learn():
            run.finish(min(run.running()))
    return max(run.ages)


worlds = st.fixed_dictionaries(
    {
        "groups": st.integers(1, 4),
        "spare": st.integers(0, 3),
        "window": st.integers(1, 5),
        "lag": st.integers(0, 2),
    }
)


def possible(world: dict[str, int], **broken: int) -> Rules:
    rules = Rules.promising(**world, **broken)
    assume(rules.slots >= rules.groups)
    return rules


def reachable(world: dict[str, int], **broken: int) -> Rules:
    """Worlds in which a step can be filled without the slot that is held back, so that somebody can overtake it."""
    rules = possible(world, **broken)
    assume(rules.slots > rules.groups or rules.window == 1)
    return rules


@settings(max_examples=150, deadline=None)
@given(worlds, st.randoms(use_true_random=False))
def test_no_trained_token_is_older_than_the_bound(world, chance) -> None:
    rules = possible(world)
    run = by_chance(rules, chance)
    assert rules.bound == world["spare"] + world["lag"]  # staleness.max, since S = max - L
    assert max(run.ages, default=0) <= rules.bound
    assert run.ledger.counts()["lost"] == 0


@given(worlds)
@example({"groups": 4, "spare": 0, "window": 1, "lag": 0})
@example({"groups": 2, "spare": 3, "window": 5, "lag": 2})
def test_some_order_of_events_reaches_the_bound(world) -> None:
    rules = reachable(world)
    assert by_adversary(rules, victim=rules.slots - 1, steps=12) == world["spare"] + world["lag"]


@given(worlds)
def test_one_slot_more_breaks_the_promise(world) -> None:
    possible(world)
    rules = possible(world, more_slots=1)
    assert by_adversary(rules, victim=rules.slots - 1, steps=12) == world["spare"] + world["lag"] + 1


@given(worlds)
def test_a_router_that_ignores_the_lag_breaks_the_promise(world) -> None:
    rules = reachable(world, more_lag=1)
    assert by_adversary(rules, victim=rules.slots - 1, steps=12) == world["spare"] + world["lag"] + 1


@pytest.mark.parametrize("broken", [{"more_slots": 1}, {"more_lag": 1}])
def test_chance_alone_finds_a_broken_rule(broken: dict[str, int]) -> None:
    rules = Rules.promising(groups=1, spare=1, window=1, lag=1, **broken)
    worst = max(max(by_chance(rules, random.Random(seed)).ages, default=0) for seed in range(60))
    assert worst == 3  # the promise is 2


@given(worlds, st.integers(1, 3))
def test_the_next_batch_always_comes_once_everything_in_flight_has_finished(world, steps) -> None:
    run = Run(possible(world))
    for _ in range(steps):
        for name in run.names:
            run.sync(name, run.version)
        while run.route():
            pass
        for slot in run.running():
            run.finish(slot)
        assert run.learn()


@given(worlds)
@example({"groups": 1, "spare": 1, "window": 2, "lag": 0})
def test_holding_back_the_younger_ones_too_gains_the_adversary_nothing(world) -> None:
    rules = possible(world)
    worst = by_adversary(rules, victim=rules.slots - 1, steps=12, hold_back_all=True)
    assert worst <= world["spare"] + world["lag"]
