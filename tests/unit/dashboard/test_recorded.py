"""Ages, shares and histograms of recorded tokens, against counts made by hand."""

import pyarrow as pa
import pytest

from rlsys.dashboard.recorded import RolloutIndex, _coarse_to_fine, digest, flat, histogram, staleness_map
from tests.made_run import add_rollouts, make_run

# Step 5 consumes at version 4. Worker 0's tokens: versions 3, 4, 4; worker 1's: 2, 3, 3; two responses each.


def test_ages_are_the_version_that_consumes_less_the_one_that_sampled(tmp_path) -> None:
    root = make_run(tmp_path / "run", 5)
    found = digest(root / "rollouts" / "step-000005.parquet", 5)
    assert found.ages.tolist() == [4, 6, 2]
    assert found.workers == {"rollout-0": (6, 2), "rollout-1": (6, 8)}
    assert found.in_flight == 4  # the first token of each response was one version older than its end
    assert found.in_queue == 6  # worker 1's responses ended at version 3, one before they were consumed
    assert found.in_flight + found.in_queue == sum(age * count for age, count in enumerate(found.ages))


def test_the_map_shows_shares_of_tokens_and_means_of_ages(tmp_path) -> None:
    index = RolloutIndex(make_run(tmp_path / "run", 5) / "rollouts")
    index.look()
    digests, waiting = index.digests(60)
    page = staleness_map(digests)
    assert waiting == 0
    assert page["first"] == page["last"] == [1, 2, 3, 4, 5]
    assert page["shares"][0] == [1, 0, 0]  # the first step's tokens are all of version 0
    assert page["shares"][4] == [0.3333, 0.5, 0.1667]
    assert (page["in_flight"][4], page["in_queue"][4]) == (0.3333, 0.5)
    assert page["workers"] == {
        "rollout-0": [0, 0.3333, 0.3333, 0.3333, 0.3333],
        "rollout-1": [0, 1, 1.3333, 1.3333, 1.3333],
    }


def test_many_steps_share_a_column_by_their_tokens(tmp_path) -> None:
    index = RolloutIndex(make_run(tmp_path / "run", 5) / "rollouts")
    index.look()
    page = staleness_map(index.digests(60)[0], columns=2)
    assert (page["first"], page["last"]) == ([1, 4], [3, 5])
    assert page["shares"][1] == [0.3333, 0.5, 0.1667]
    assert all(sum(column) == pytest.approx(1, abs=1e-3) for column in page["shares"])


def test_a_slow_disk_gets_the_rest_read_by_the_next_calls(tmp_path) -> None:
    index = RolloutIndex(make_run(tmp_path / "run", 5) / "rollouts")
    index.look()
    waits = [index.digests(0)[1] for _ in range(5)]
    assert waits == [4, 3, 2, 1, 0]


def test_steps_are_read_coarsely_first_and_each_once() -> None:
    steps = list(range(100, 170))
    order = _coarse_to_fine(steps)
    assert order[:3] == [169, 100, 164]
    assert sorted(order) == steps


def test_a_file_that_is_no_parquet_is_passed_over(tmp_path) -> None:
    index = RolloutIndex(make_run(tmp_path / "run", 2) / "rollouts")
    (tmp_path / "run" / "rollouts" / "step-000003.parquet").write_bytes(b"cut short")
    index.look()
    digests, waiting = index.digests(60)
    assert (sorted(digests), waiting) == ([1, 2], 0)
    with pytest.raises(KeyError):
        index.table(3)
    add_rollouts(tmp_path / "run", 3)
    index.look()
    assert sorted(index.digests(60)[0]) == [1, 2, 3]


def test_the_histogram_counts_every_trained_token_once(tmp_path) -> None:
    index = RolloutIndex(make_run(tmp_path / "run", 5) / "rollouts")
    index.look()
    page = histogram(index, 4, 5, bins=3)
    assert (page["steps"], page["tokens"], page["beyond"]) == (2, 24, 0)
    assert page["edges"] == pytest.approx([-0.1, -0.1 / 3, 0.1 / 3, 0.1], abs=1e-6)
    # Log-ratios of a response are 0.1, -0.1, 0: the first token is the older one.
    assert page["counts"]["0"] == [4, 4, 0]
    assert page["counts"]["1"] == [4, 4, 4]
    assert page["counts"]["2"] == [0, 0, 4]
    assert page["quantiles"]["median"] == 0
    assert histogram(index, 80, 90)["tokens"] == 0


def test_flat_values_are_those_of_every_type_also_of_a_slice() -> None:
    table = pa.table({"flags": [[True, False], [], [True]] * 4, "ids": [[1], [2, 3], []] * 4})
    assert flat(table["flags"]).tolist() == [True, False, True] * 4
    assert flat(table.slice(1, 4)["flags"]).tolist() == [True, True, False]
    assert flat(table.slice(1, 4)["ids"]).tolist() == [2, 3, 1, 2, 3]
