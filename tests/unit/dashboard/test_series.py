"""Fewer points show the same extremes, and a table holds every step once."""

import numpy as np
import pytest

from rlsys.dashboard.series import MetricStore, Table, downsample, numbers


def table(**columns: list[float]) -> Table:
    rows = len(next(iter(columns.values())))
    return Table(
        steps=np.arange(1, rows + 1),
        times=np.arange(rows, dtype=float),
        values={name: np.array(column, dtype=float) for name, column in columns.items()},
    )


def test_few_rows_are_left_as_they_are() -> None:
    small = table(a=[1, 2, 3, 4])
    assert downsample(small, 4) is small


def test_every_bucket_keeps_its_lowest_and_its_highest_value_in_the_order_they_came() -> None:
    # Nine rows, five points: buckets of rows 1-4 and 5-8, and the last row.
    small = downsample(table(a=[5, 1, 9, 4, 2, 8, 3, 7, 6], b=[1, 2, 3, 4, 8, 7, 6, 5, 0]), 5)
    assert small.steps.tolist() == [1, 4, 5, 8, 9]
    assert small.times.tolist() == [0, 3, 4, 7, 8]
    assert small.values["a"].tolist() == [1, 9, 2, 8, 6]  # 1 before 9, 2 before 8
    assert small.values["b"].tolist() == [1, 4, 8, 5, 0]  # the highest first where it came first


def test_a_bucket_without_values_is_empty_and_a_single_value_fills_it() -> None:
    nan = float("nan")
    small = downsample(table(a=[nan, nan, nan, nan, nan, 6, nan, nan, 7]), 5)
    assert numbers(small.values["a"]) == [None, None, 6, 6, 7]


def test_the_newest_value_is_the_last_whether_the_last_row_has_it_or_its_bucket() -> None:
    nan = float("nan")
    every: list[float] = [5, 1, 9, 4, 2, 8, 3, 7, 6]
    small = downsample(table(every=every, some=[*every[:-1], nan], none=[*every[:4], *[nan] * 5]), 5)
    assert numbers(small.values["every"])[-1] == 6  # no extreme of its bucket: that is 2 to 8
    assert numbers(small.values["some"])[-1] == 7
    assert numbers(small.values["none"]) == [1, 9, None, None, None]


@pytest.mark.parametrize("rows", [801, 1000, 5000, 12345])
def test_one_outlier_among_thousands_survives_and_the_points_stay_few(rows: int) -> None:
    values = np.sin(np.arange(rows) / 50)
    values[rows // 3], values[rows // 2] = 40, -40
    small = downsample(table(a=values.tolist()))
    assert len(small.steps) <= 800
    assert small.values["a"].max() == 40
    assert small.values["a"].min() == -40
    assert (small.steps[0], small.steps[-1]) == (1, rows)
    assert (np.diff(small.steps) >= 0).all()


def test_a_step_and_its_evaluation_are_one_row() -> None:
    store = MetricStore()
    store.add({"step": 0, "time": 1.0, "eval/accuracy": 0.25})
    store.add({"step": 1, "time": 2.0, "reward/mean": 0.5, "importance/k3": None})
    store.add({"step": 1, "time": 3.0, "eval/accuracy": 0.75})
    whole = store.table(["reward/mean", "eval/accuracy", "policy/lr"])
    assert whole.steps.tolist() == [0, 1]
    assert whole.json()["values"] == {
        "reward/mean": [None, 0.5],
        "eval/accuracy": [0.25, 0.75],
        "policy/lr": [None, None],
    }
    assert store.names == {"reward/mean", "eval/accuracy"}
    assert (store.latest("reward/mean"), store.latest("policy/lr")) == (0.5, None)


def test_since_a_cursor_only_new_and_changed_rows_are_given() -> None:
    store = MetricStore()
    for step in range(1, 4):
        store.add({"step": step, "time": float(step), "reward/mean": step / 10})
    cursor = store.cursor
    assert store.since(cursor, ["reward/mean"]).steps.tolist() == []
    store.add({"step": 2, "time": 9.0, "eval/accuracy": 0.5})
    store.add({"step": 4, "time": 4.0, "reward/mean": 0.4})
    news = store.since(cursor, ["reward/mean", "eval/accuracy"])
    assert news.steps.tolist() == [2, 4]
    assert news.json()["values"] == {"reward/mean": [0.2, 0.4], "eval/accuracy": [0.5, None]}


def test_rows_out_of_order_and_odd_values_do_no_harm() -> None:
    store = MetricStore()
    store.add({"step": 5, "time": 5.0, "reward/mean": True, "name": "x"})
    store.add({"step": 3, "time": "late", "reward/mean": 0.3})
    store.add({"time": 1.0, "reward/mean": 0.9})
    assert store.table(["reward/mean"]).steps.tolist() == [3, 5]
    assert numbers(store.table(["reward/mean"]).values["reward/mean"]) == [0.3, None]
    assert store.span() == (5.0, 5.0)
