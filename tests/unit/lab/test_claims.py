"""Every claim passes, in a reduced size; and every claim fails when what it speaks of is broken."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import rlsys.algo.objectives as objectives
from rlsys.algo.advantages import ADVANTAGES
from rlsys.algo.diagnostics import weight_diagnostics
from rlsys.algo.divergence import KL_ESTIMATORS, k2
from rlsys.lab import exact
from rlsys.lab.claims import CLAIMS, allocation, compounding, sampling, trust, variance, weights
from rlsys.lab.claims.outcome import Claim, Outcome, at_least, equal
from rlsys.lab.report import ClaimReport, claims_from_json, claims_to_json, claims_to_markdown, run_claim

TASKS = 12
SLOW = {2: 6, 5: 6, 9: 6, 17: 4}
"""Fewer of them, or fewer learners, where each takes long."""


@pytest.fixture(scope="module", autouse=True)
def computed_once() -> Iterator[None]:
    """What takes long and `BROKEN` leaves alone. A training is known by its source, its learners and its length.

    Half of the updates are enough for claim 17, and shorten what fewer learners do not.
    """
    train = compounding._train
    found: dict[Any, compounding.Trained] = {}

    def remembered(source: compounding.Source, start: torch.Tensor, length: int) -> compounding.Trained:
        key = (source, len(start), length)
        if key not in found:
            found[key] = train(source, start, length)
        return found[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compounding, "UPDATES", 75)
        patch.setattr(compounding, "_train", remembered)
        patch.setattr(sampling, "_draws_until", cache(sampling._draws_until))
        yield


def measured(number: int) -> Outcome:
    return CLAIMS[number].measure(SLOW.get(number, TASKS))


def test_there_are_the_seventeen_claims_of_the_table() -> None:
    assert list(CLAIMS) == list(range(1, 18))
    assert len({claim.measure for claim in CLAIMS.values()}) == 17
    assert all(claim.measure.__doc__ and "Falsified" in claim.measure.__doc__ for claim in CLAIMS.values())


@pytest.mark.parametrize("number", CLAIMS)
def test_a_claim_passes_and_is_drawn(number: int, tmp_path: Path) -> None:
    report = run_claim(CLAIMS[number], SLOW.get(number, TASKS), tmp_path)
    assert report.passed, [check for check in report.checks if not check.passed]
    assert report.plot is not None
    assert (tmp_path / report.plot).stat().st_size > 10_000
    assert len(report.checks) >= 3


def scaled(objective: Callable[..., Any]) -> Callable[..., Any]:
    """The objective with a term 1% too large."""

    def term(*arguments: Any, **options: float) -> Any:
        found = objective(*arguments, **options)
        return found._replace(value=1.01 * found.value)

    return term


def reversed_kl(policy: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    log_p = policy.log_softmax(-1)
    return (other.softmax(-1) * (other.log_softmax(-1) - log_p)).sum(-1)


def one_token_off(*arguments: Any, **options: Any) -> Any:
    """`weight_diagnostics` that forgets the last token of the batch."""
    log_ratio, mask, *rest = arguments
    return weight_diagnostics(log_ratio, mask & (torch.arange(len(mask)) < len(mask) - 1), *rest, **options)


table = objectives.OBJECTIVES
original_rewards = variance._token_rewards

BROKEN: dict[int, Callable[[pytest.MonkeyPatch], None]] = {
    1: lambda patch: patch.setitem(table, "is_token", scaled(objectives.is_token)),
    2: lambda patch: patch.setattr(weights, "weight_diagnostics", one_token_off),
    3: lambda patch: patch.setattr(weights, "_predicted_square", lambda chi2, t: chi2**2 * t**2 / 2),
    4: lambda patch: patch.setattr(exact, "token_kl", reversed_kl),
    5: lambda patch: patch.setitem(table, "is_sequence", objectives.is_token),
    6: lambda patch: patch.setitem(table, "is_sequence_truncated", objectives.is_token_truncated),
    7: lambda patch: patch.setattr(trust, "learner_steps", lambda tree, policy, *_: [policy, policy]),
    8: lambda patch: patch.setattr(trust, "exact_ascent", lambda t, p, r, k, lr: [exact_descent(t, p, r, lr)]),
    9: lambda patch: patch.setitem(table, "is_token", scaled(objectives.is_token)),
    10: lambda patch: patch.setitem(ADVANTAGES, "rloo", ADVANTAGES["group_mean"]),
    11: lambda patch: patch.setattr(
        variance, "_token_rewards", lambda kind, case: original_rewards("taken back", case)
    ),
    12: lambda patch: patch.setattr(sampling, "signal_loss", lambda p, n: p**n),
    13: lambda patch: patch.setattr(sampling, "stopped_pass_rate", lambda positives, drawn: positives / drawn),
    14: lambda patch: patch.setattr(allocation, "log_optimal", lambda rates, n: [n // len(rates)] * len(rates)),
    15: lambda patch: patch.setattr(allocation, "gvm", lambda p, g, n, alpha: [n // len(p)] * len(p)),
    16: lambda patch: patch.setitem(KL_ESTIMATORS, "k1", k2),
    17: lambda patch: patch.setitem(compounding.SOURCES, "on-policy RL", compounding.demonstrations),
}


def exact_descent(tree: Any, policy: torch.Tensor, rewards: torch.Tensor, rate: float) -> torch.Tensor:
    return policy - rate * exact.reward_gradient(tree, policy, rewards)


@pytest.mark.parametrize("number", CLAIMS)
def test_a_claim_fails_when_what_it_speaks_of_is_broken(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    BROKEN[number](monkeypatch)
    assert not measured(number).passed


def test_a_prediction_that_is_wrong_fails_its_claim(tmp_path: Path) -> None:
    outcome = Outcome(checks=(equal("a", 1.0, 1.0, 1e-9), at_least("b", 2.0, 1.9)), draw=lambda figure: None)
    claim = Claim(number=99, statement="s", source="Z", predicted="p", measure=lambda tasks: outcome)
    report = run_claim(claim, 1)
    assert not report.passed
    assert [check.passed for check in report.checks] == [True, False]
    assert not claims_to_json([report])["passed"]
    assert "**FAIL**" in claims_to_markdown([report])


def test_the_worst_of_several_numbers_counts_and_nan_is_worst() -> None:
    assert equal("x", 0.0, [0.0, -3.0, 2.0], 1.0).measured.value == -3.0
    assert at_least("x", 0.0, [5.0, 1.0]).measured.value == 1.0
    assert not equal("x", 0.0, [float("nan"), 0.0], 1.0).passed
    assert not at_least("x", 0.0, [0.0, float("nan")]).passed
    with pytest.raises(ValueError, match="empty"):
        at_least("x", 0.0, [])


def test_reports_survive_json_and_keep_their_schema() -> None:
    report = run_claim(CLAIMS[12], TASKS)
    data = claims_to_json([report])
    assert list(data) == ["schema", "passed", "claims"]
    assert list(data["claims"][0]) == [
        *("number", "statement", "source", "predicted", "passed", "seconds", "checks", "notes", "plot"),
    ]
    assert list(data["claims"][0]["checks"][0]) == ["quantity", "predicted", "measured", "passed"]
    (again,) = claims_from_json(data)
    assert claims_to_json([again]) == data
    assert isinstance(again, ClaimReport)
    assert replace(again, seconds=0.0).statement == report.statement
