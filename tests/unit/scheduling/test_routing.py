"""No prompt goes to a worker whose weights are too old."""

from hypothesis import given
from hypothesis import strategies as st

from rlsys.scheduling.routing import Router


def fleet(*, max_lag: int = 1, capacity: int = 2, **serving: int) -> Router:
    router = Router(max_lag=max_lag, capacity=capacity)
    for name, version in serving.items():
        router.add(name)
        router.acknowledge(name, version)
    return router


def chosen(router: Router, learner_version: int) -> str | None:
    worker = router.choose(learner_version)
    return None if worker is None else worker.name


@given(
    st.integers(0, 3),
    st.integers(0, 12),
    st.dictionaries(st.sampled_from("abcd"), st.tuples(st.integers(0, 12), st.integers(0, 4))),
)
def test_the_choice_is_fresh_has_room_and_is_the_least_loaded(max_lag, version, workers) -> None:
    router = fleet(max_lag=max_lag, capacity=3, **{name: serving for name, (serving, _) in workers.items()})
    for name, (_, load) in workers.items():
        router.workers[name].in_flight = load
    usable = {name: load for name, (serving, load) in workers.items() if version - serving <= max_lag and load < 3}
    choice = router.choose(version)
    if choice is None:
        assert not usable
    else:
        assert usable[choice.name] == min(usable.values())


def test_a_worker_is_refused_from_one_version_beyond_the_lag() -> None:
    router = fleet(max_lag=2, a=5)
    assert chosen(router, 7) == "a"
    assert chosen(router, 8) is None


def test_a_worker_that_serves_nothing_yet_gets_nothing() -> None:
    router = fleet(max_lag=100)
    router.add("a")
    assert chosen(router, 0) is None
    router.acknowledge("a", 0)
    assert chosen(router, 0) == "a"


def test_a_full_worker_gets_nothing() -> None:
    router = fleet(capacity=2, a=0, b=0)
    router.workers["a"].in_flight = 2
    router.workers["b"].in_flight = 1
    assert chosen(router, 0) == "b"
    router.workers["b"].in_flight = 2
    assert chosen(router, 0) is None


def test_news_never_goes_backwards() -> None:
    router = fleet(max_lag=0, a=3)
    router.acknowledge("a", 2)
    assert chosen(router, 3) == "a"


def test_a_removed_worker_is_forgotten_and_news_of_it_too() -> None:
    router = fleet(a=3, b=1)
    router.remove("a")
    router.acknowledge("a", 4)
    assert list(router.workers) == ["b"]
    router.remove("a")
    router.add("a")
    assert chosen(router, 3) is None  # b is too old, and the new a has not said what it serves


def test_adding_a_worker_again_keeps_what_is_known_of_it() -> None:
    router = fleet(a=3)
    router.workers["a"].in_flight = 1
    router.add("a")
    assert (router.workers["a"].serving_version, router.workers["a"].in_flight) == (3, 1)


def test_the_lag_shown_is_that_of_the_slowest_serving_worker() -> None:
    router = fleet(a=3, b=5)
    router.add("c")
    assert router.serving_lag_max(6) == 3
    assert fleet().serving_lag_max(6) == 0
