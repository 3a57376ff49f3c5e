"""Diagnostics of weights on hand-computed numbers, per token, per sequence and by staleness."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys.algo.diagnostics import (
    Metrics,
    effective_sample_size,
    flag_fractions,
    weight_diagnostics,
)


def number(metrics: Metrics, name: str) -> float:
    value = metrics[f"importance/{name}"]
    assert value is not None
    return value


# Two responses: weights (2, 1/2) with product 1, and (untrained, 3) with product 3.
WEIGHTS = torch.tensor([2.0, 0.5, 777.0, 3.0], dtype=torch.float64)
MASK = torch.tensor([True, True, False, True])
INDEX = torch.tensor([0, 0, 1, 1])


def test_weight_diagnostics_equal_the_hand_computed() -> None:
    found = weight_diagnostics(WEIGHTS.log(), MASK, INDEX, 2, cap=2.0)
    logs = [math.log(2), -math.log(2), math.log(3)]
    k3 = (2 + 0.5 + 3 - 3 - sum(logs)) / 3
    expected = {
        "ess_token": 5.5**2 / (3 * 13.25),
        "ess_sequence": 4**2 / (2 * 10),
        "ess_token_truncated": 4.5**2 / (3 * 8.25),
        "ess_sequence_truncated": 3**2 / (2 * 5),
        "chi2_token": 13.25 / 3 - 1,
        "chi2_sequence": 10 / 2 - 1,
        "mean_weight_token": 5.5 / 3,
        "mean_weight_sequence": 2.0,
        "k1": -math.log(3) / 3,
        "k3": k3,
        "log_ratio_p01": -math.log(2) + 0.02 * 2 * math.log(2),
        "log_ratio_p50": math.log(2),
        "log_ratio_p99": math.log(2) + 0.98 * math.log(1.5),
        "log_ratio_abs_max": math.log(3),
        # responses: |1 − 1 − (1 − 1/2)| = 1/2 and |3 − 1 − 2| = 0
        "linearization_gap": 0.25,
    }
    assert found == pytest.approx({f"importance/{name}": value for name, value in expected.items()})


def test_a_response_falls_into_the_bucket_of_its_oldest_token_and_empty_buckets_are_none() -> None:
    responses = 3  # the third has no trained token and belongs to no bucket
    found = weight_diagnostics(WEIGHTS.log(), MASK, INDEX, responses, torch.tensor([0, 2, 9, 7]))
    by_bucket = {
        name: [found[f"importance/{name}/by_staleness/{bucket}"] for bucket in ("0", "1", "2", "3", "4+")]
        for name in ("mean_weight_token", "mean_weight_sequence", "ess_token")
    }
    assert by_bucket["mean_weight_token"] == [pytest.approx(2), None, pytest.approx(0.5), None, pytest.approx(3)]
    assert by_bucket["mean_weight_sequence"] == [None, None, pytest.approx(1), None, pytest.approx(3)]
    assert by_bucket["ess_token"] == [pytest.approx(1), None, pytest.approx(1), None, pytest.approx(1)]
    assert len(found) == 6 * 13


def test_one_runaway_response_shows_in_the_sequence_ess_not_in_the_token_ess() -> None:
    """64 responses of 20 tokens; one drifts by .2 nats a token: w = e^4."""
    log_ratio = torch.zeros(64 * 20)
    log_ratio[:20] = 0.2
    index = torch.arange(64).repeat_interleave(20)
    found = weight_diagnostics(log_ratio, torch.ones(64 * 20, dtype=torch.bool), index, 64)
    assert number(found, "ess_token") > 0.999
    assert found["importance/ess_sequence"] == pytest.approx(
        (63 + math.exp(4)) ** 2 / 64 / (63 + math.exp(8)), rel=1e-4
    )
    assert number(found, "ess_sequence") < 0.08


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.floats(1e-3, 0.1))
def test_for_small_ratios_ess_is_one_over_one_plus_twice_k3(seed: int, spread: float) -> None:
    """Up to third order: a normal log-ratio with mean −σ²/2, so that E_μ[r] = 1."""
    generator = torch.Generator().manual_seed(seed)
    x = spread * torch.randn(4000, generator=generator) - spread**2 / 2
    found = weight_diagnostics(x, torch.ones(4000, dtype=torch.bool), torch.arange(4000), 4000)
    assert number(found, "ess_token") == pytest.approx(1 / (1 + 2 * number(found, "k3")), abs=10 * spread**3 + 1e-6)


def test_ess_counts_equal_weights_and_survives_any_scale() -> None:
    """Three equal weights and one negligible: 3/4, also where exp would overflow."""
    for shift in (0.0, 5000.0, -5000.0):
        x = torch.tensor([0.0, 0.0, 0.0, -60.0], dtype=torch.float64) + shift
        assert effective_sample_size(x) == pytest.approx(0.75)
    assert effective_sample_size(torch.zeros(0)) is None


def test_extreme_weights_saturate_and_stay_valid_json() -> None:
    x = torch.tensor([5000.0, -5000.0, 1.0, 5000.0])
    found = weight_diagnostics(x, torch.ones(4, dtype=torch.bool), INDEX, 2, torch.zeros(4, dtype=torch.int64))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert number(found, "chi2_sequence") > 1e300


def test_flag_fractions_split_by_sign_and_staleness() -> None:
    found = flag_fractions(
        {"clip_fraction": torch.tensor([True, False, True, True])},
        advantages=torch.tensor([1.0, 1.0, -1.0, -2.0]),
        loss_mask=MASK,
        staleness=torch.tensor([0, 4, 4, 5]),
    )
    prefix = "importance/clip_fraction"
    assert found == {
        prefix: pytest.approx(2 / 3),
        f"{prefix}/by_sign/positive": 0.5,
        f"{prefix}/by_sign/negative": 1.0,
        f"{prefix}/by_staleness/0": 1.0,
        f"{prefix}/by_staleness/1": None,
        f"{prefix}/by_staleness/2": None,
        f"{prefix}/by_staleness/3": None,
        f"{prefix}/by_staleness/4+": 0.5,
    }
