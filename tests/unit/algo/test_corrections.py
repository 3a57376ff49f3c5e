"""Corrections on hand-computed ratios q = π_V/μ: four trained tokens and one that must not matter."""

import math

import pytest
import torch
from torch import Tensor

from rlsys.algo.corrections import (
    CORRECTION_OPTIONS,
    CORRECTIONS,
    SEQUENCE_OBJECTIVES,
    Correction,
    compute_correction,
)
from rlsys.algo.objectives import OBJECTIVES
from rlsys.errors import ConfigError

INDEX = torch.tensor([0, 0, 1, 1, 1])
MASK = torch.tensor([True, True, True, False, True])
Q = torch.tensor([3.0, 0.4, 1.2, 100.0, 5.5], dtype=torch.float64)


def correct(
    name: str,
    objective: str = "ppo_clip",
    q: Tensor = Q,
    proximal_logprobs: Tensor | None = None,
    **options: float,
) -> Correction:
    """Of the five tokens above, or of one fully trained response when q has another length."""
    usual = len(q) == len(Q)
    start = torch.full_like(q, -1.0)
    return compute_correction(
        name,
        step_start_logprobs=start,
        behavior_logprobs=start - q.log(),
        loss_mask=MASK if usual else torch.ones(len(q), dtype=torch.bool),
        response_index=INDEX if usual else torch.zeros(len(q), dtype=torch.int64),
        responses=2 if usual else 1,
        objective=objective,
        proximal_logprobs=proximal_logprobs,
        **options,
    )


def kept(correction: Correction) -> list[bool]:
    return correction.keep[MASK].tolist()


def test_tis_truncates_each_token_and_moves_the_denominator() -> None:
    correction = correct("tis")
    assert correction.weight[MASK].tolist() == pytest.approx([2.0, 0.4, 1.2, 2.0])
    assert correction.truncated.tolist() == [True, False, False, False, True]
    assert correction.denominator == "step_start"


def test_tis_gives_a_sequence_objective_one_factor_per_response() -> None:
    """Π q = 1.2 and 6.6."""
    correction = correct("tis", "gspo")
    assert correction.weight[MASK].tolist() == pytest.approx([1.2, 1.2, 2.0, 2.0])
    assert correction.truncated.tolist() == [False, False, True, False, True]


def test_tis_for_decoupled_ppo_caps_proximal_over_behavior_in_place() -> None:
    """p = π_prox/μ = 3, .4, 1.2, 5.5 (π_prox = π_V): p·weight = min(p, 2), and the ratio's denominator stays."""
    correction = correct("tis", "decoupled_ppo")
    assert (correction.weight * Q)[MASK].tolist() == pytest.approx([2.0, 0.4, 1.2, 2.0])
    assert correction.denominator == "behavior"
    halved = correct("tis", "decoupled_ppo", proximal_logprobs=torch.full((5,), -1.0 - math.log(2)))
    assert (halved.weight * Q / 2)[MASK].tolist() == pytest.approx([1.5, 0.2, 0.6, 2.0])


def test_mask_token_keeps_the_band() -> None:
    assert kept(correct("mask_token")) == [True, False, True, False]
    assert kept(correct("mask_token", low=0.3, high=2.0)) == [False, True, True, False]


def test_mask_sequence_drops_by_geometric_mean_or_by_product() -> None:
    """Geometric means √1.2 = 1.095 (kept) and √6.6 = 2.57; ten tokens at 1.24 have mean 1.24 but product 8.6."""
    assert kept(correct("mask_sequence")) == [True, True, False, False]
    assert kept(correct("mask_sequence", high=3.0)) == [True, True, True, True]
    assert kept(correct("mask_sequence", high=3.0, cap=6.0)) == [True, True, False, False]
    long = torch.full((10,), 1.24, dtype=torch.float64)
    assert not correct("mask_sequence", q=long).keep.any()
    assert correct("mask_sequence", q=long[:9]).keep.all()  # 1.24^9 = 6.9


def test_m2_masks_the_largest_until_the_kept_second_moment_is_within_tau() -> None:
    """Squares .01, .04, .09, .16 have running means .01, .025, .047, .075."""
    q = torch.tensor([0.3, -0.2, 0.1, 9.0, -0.4], dtype=torch.float64).exp()
    assert kept(correct("m2", q=q)) == [False, True, True, False]
    assert kept(correct("m2", q=q, tau=0.05)) == [True, True, True, False]
    assert kept(correct("m2", q=q, tau=0.0751)) == [True, True, True, True]
    assert kept(correct("m2", q=q, tau=0.001)) == [False, False, False, False]


def test_m2_is_a_property_of_the_global_batch() -> None:
    """(.1)² beside (.3)²: alone the second token would go, in a calm batch it may stay."""
    noisy = torch.tensor([0.1, 0.3], dtype=torch.float64).exp()
    calm = torch.cat([noisy, torch.ones(8, dtype=torch.float64)])
    assert correct("m2", q=noisy).keep.tolist() == [True, False]
    assert correct("m2", q=calm).keep.all()


def test_m2_treats_ties_alike() -> None:
    q = torch.tensor([0.3, -0.3, 0.1], dtype=torch.float64).exp()
    assert correct("m2", q=q, tau=0.051).keep.tolist() == [False, False, True]


def test_take_gives_a_micro_batch_its_part() -> None:
    whole = correct("tis")
    for positions in (torch.tensor([2, 3, 4]), slice(2, 5), INDEX == 1):
        part = whole.take(positions)
        assert torch.equal(part.weight, whole.weight[2:])
        assert torch.equal(part.truncated, whole.truncated[2:])
        assert part.denominator == whole.denominator


@pytest.mark.parametrize("objective", sorted(SEQUENCE_OBJECTIVES))
@pytest.mark.parametrize("name", ["mask_token", "m2"])
def test_sequence_objectives_refuse_token_masks(name: str, objective: str) -> None:
    with pytest.raises(ConfigError, match="one term per response"):
        correct(name, objective)


def test_dpo_refuses_every_correction_and_unknown_names_are_refused() -> None:
    with pytest.raises(ConfigError, match="dpo"):
        correct("tis", "dpo")
    assert correct("none", "dpo").keep.all()
    with pytest.raises(ConfigError, match=r"objective.correction='icepop'"):
        correct("icepop")
    with pytest.raises(ConfigError, match="no option low"):
        correct("tis", low=0.1)


def test_registries_agree() -> None:
    assert CORRECTIONS.keys() == CORRECTION_OPTIONS.keys()
    assert set(OBJECTIVES) >= SEQUENCE_OBJECTIVES
