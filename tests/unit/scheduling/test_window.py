"""The window that holds an ESS never leaves its bounds, shrinks when the ESS is low, and can always fill a batch."""

from hypothesis import given
from hypothesis import strategies as st

from rlsys.scheduling.window import AimdWindow

ess = st.one_of(st.none(), st.floats(0, 1))


def make(start: float | None = None, widest: float = 4.0) -> AimdWindow:
    return AimdWindow(target=0.7, increase=0.25, decrease=0.5, widest=widest, start=start)


@given(st.lists(ess, max_size=50), st.floats(0, 16), st.integers(1, 8), st.integers(1, 64))
def test_it_stays_between_strictly_synchronous_and_the_bound(
    seen: list[float | None], widest: float, window: int, groups: int
) -> None:
    w = make(widest=widest)
    for value in seen:
        assert 0 <= w.after(value) <= widest
        assert groups <= w.slots(groups, window) <= max(groups, (widest + 1) * groups - (window - 1))


def test_it_starts_at_its_widest_and_halves_below_the_target_and_grows_by_a_little_at_or_above_it() -> None:
    w = make()
    assert [w.after(value) for value in (0.69, 0.69, 0.7, 0.9)] == [2.0, 1.0, 1.25, 1.5]


def test_what_is_unknown_changes_nothing() -> None:
    w = make(start=1.5)
    assert w.after(None) == 1.5


def test_slots_are_those_of_the_bound() -> None:
    assert make(start=3.0).slots(64) == 256
    assert make(start=3.0).slots(64, window=8) == 249
    assert make(start=0.0).slots(64, window=8) == 64
    assert make(start=0.5).slots(64) == 96
