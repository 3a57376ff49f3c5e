"""Each objective on five tokens worked out by hand: loss, gradient, and which tokens are clipped or outside.

Two responses of two trained tokens; every π_θ = 1/2, ratios over μ as below, advantages 1 and −2. The loss
is −1/4 of the sum (token_mean), and so is the gradient −1/4 of what is listed per token.
"""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rlsys.algo.batch import BatchTotals, TokenBatch
from rlsys.algo.corrections import Correction, no_correction
from rlsys.algo.objectives import OBJECTIVE_OPTIONS, OBJECTIVES, dpo_loss, policy_loss
from rlsys.errors import ConfigError

LN2 = math.log(2)
RATIO = torch.tensor([2.0, 0.5, 1.1, 9.9, 1.5], dtype=torch.float64)
MASK = torch.tensor([True, True, True, False, True])
TOTALS = BatchTotals(tokens=4, responses=2, max_tokens=8)
ROOT = math.sqrt(1.1 * 1.5)


def batch(ratio: Tensor = RATIO, advantages: tuple[float, float] = (1.0, -2.0)) -> TokenBatch:
    index = torch.tensor([0, 0, 1, 1, 1])
    policy = torch.full((5,), -LN2, dtype=torch.float64, requires_grad=True)
    return TokenBatch(
        policy_logprobs=policy,
        behavior_logprobs=policy.detach() - ratio.log(),
        step_start_logprobs=policy.detach(),
        advantages=torch.tensor(advantages, dtype=torch.float64)[index],
        loss_mask=MASK,
        response_index=index,
        responses=2,
    )


CASES = [
    # objective, options, −4·loss, −4·gradient per token, clipped, outside
    ("reinforce", {}, 2 * LN2, [1, 1, -2, 0, -2], "", ""),
    ("is_token", {}, -2.7, [2, 0.5, -2.2, 0, -3], "", ""),
    ("is_sequence", {}, 1 - 2 * 1.65, [1, 1, -3.3, 0, -3.3], "", ""),
    ("is_sequence_truncated", {}, 1 - 2 * 1.2, [1, 1, 0, 0, 0], "24", "24"),
    ("is_token_truncated", {}, 1.2 + 0.8 - 2.2 - 2.4, [0, 0, -2.2, 0, 0], "014", "014"),
    ("ppo_clip", {}, 1.28 + 0.5 - 2.2 - 3, [0, 0.5, -2.2, 0, -3], "0", "014"),
    ("ppo_clip", {"dual_clip": 1.2}, 1.28 + 0.5 - 2.2 - 2.4, [0, 0.5, -2.2, 0, 0], "04", "014"),
    ("decoupled_ppo", {}, 1.2 + 0.5 - 2.2 - 3, [0, 0.5, -2.2, 0, -3], "0", "014"),
    ("cispo", {"cap": 1.4}, -LN2 * (1.9 - 5), [1.4, 0.5, -2.2, 0, -2.8], "04", "04"),
    ("aipo", {}, -LN2 * (2.5 - 5.2), [2, 0.5, -2.2, 0, -3], "", ""),
    ("gspo", {}, 2 - 4 * ROOT, [1, 1, -2 * ROOT, 0, -2 * ROOT], "", "24"),
    ("raft", {}, -2 * LN2, [1, 1, 0, 0, 0], "", ""),
]


@pytest.mark.parametrize(("objective", "options", "value", "slope", "clipped", "outside"), CASES)
def test_objective_equals_the_hand_computed(objective, options, value, slope, clipped, outside) -> None:
    tokens = batch()
    if objective == "decoupled_ppo":  # π_prox = μ: the behavior weight is 1 and u = r
        tokens = replace(tokens, proximal_logprobs=tokens.behavior_logprobs)
    out = policy_loss(tokens, TOTALS, objective=objective, reduce="token_mean", **options)
    (gradient,) = torch.autograd.grad(out.loss, tokens.policy_logprobs)
    assert out.loss.item() == pytest.approx(-value / 4)
    assert gradient.tolist() == pytest.approx([-g / 4 for g in slope])
    assert "".join(str(int(t)) for t in out.clipped.nonzero()) == clipped
    assert "".join(str(int(t)) for t in out.outside.nonzero()) == outside
    assert int(out.metrics["clipped"]) == len(clipped)
    assert (int(out.metrics["tokens"]), int(out.metrics["responses"])) == (4, 2)


def test_gspo_clips_a_whole_response_by_the_sign_of_its_advantage() -> None:
    """s = √1.65 ≈ 1.285 > 1 + 4e-4: clipped for A > 0 (2 tokens · s·A = 2·1.0004), not for A < 0."""
    out = policy_loss(batch(advantages=(0.0, 1.0)), TOTALS, objective="gspo", reduce="token_mean")
    assert out.clipped.tolist() == [False, False, True, False, True]
    assert out.loss.item() == pytest.approx(-2 * 1.0004 / 4)


def test_an_advantage_of_zero_is_outside_but_never_clipped() -> None:
    out = policy_loss(batch(advantages=(0.0, 0.0)), TOTALS, objective="ppo_clip", reduce="token_mean")
    assert not out.clipped.any()
    assert out.outside.tolist() == [True, True, False, False, True]


def test_a_token_the_correction_dropped_is_outside_but_not_clipped() -> None:
    dropped = replace(no_correction(RATIO), keep=torch.tensor([False, True, True, True, True]))
    out = policy_loss(batch(), TOTALS, objective="ppo_clip", reduce="token_mean", correction=dropped)
    assert not out.clipped.any()
    assert out.outside.tolist() == [True, True, False, False, True]


def test_decoupled_ppo_weighs_the_clipped_term_by_proximal_over_behavior() -> None:
    """u = (1.5, .5, 1.1, 1.5) and π_prox/μ = (4/3, 1, 1, 1): only the first token changes, 1.2 -> 1.6."""
    tokens = batch()
    u = torch.tensor([1.5, 0.5, 1.1, 9.9, 1.5], dtype=torch.float64)
    tokens = replace(tokens, proximal_logprobs=tokens.policy_logprobs.detach() - u.log())
    out = policy_loss(tokens, TOTALS, objective="decoupled_ppo", reduce="token_mean")
    assert out.loss.item() == pytest.approx(-(1.6 + 0.5 - 2.2 - 3) / 4)


@pytest.mark.parametrize("advantage", [1.0, -2.0])
@pytest.mark.parametrize("ratio", [0.1, 0.79, 0.81, 1.0, 1.27, 1.29, 4.0])
def test_ppo_clip_is_the_minimum_of_the_clipped_and_the_unclipped_term(ratio: float, advantage: float) -> None:
    tokens = batch(torch.full((5,), ratio, dtype=torch.float64), (advantage, advantage))
    out = policy_loss(tokens, TOTALS, objective="ppo_clip", reduce="token_mean")
    bounded = min(max(ratio, 0.8), 1.28)
    assert out.loss.item() == pytest.approx(-min(ratio * advantage, bounded * advantage))


def test_reductions_weigh_a_token_by_one_over_tokens_own_length_or_a_constant() -> None:
    """Lengths 1 and 3, terms 10 and (1, 2, 3)."""
    tokens = TokenBatch(
        policy_logprobs=torch.zeros(5),
        behavior_logprobs=torch.zeros(5),
        step_start_logprobs=torch.zeros(5),
        advantages=torch.tensor([10.0, 1.0, 77.0, 2.0, 3.0]),
        loss_mask=torch.tensor([True, True, False, True, True]),
        response_index=torch.tensor([0, 1, 1, 1, 1]),
        responses=2,
    )
    totals = BatchTotals(tokens=4, responses=2, max_tokens=5)
    losses = {
        reduce: policy_loss(tokens, totals, objective="is_token", reduce=reduce).loss.item()
        for reduce in ("token_mean", "sequence_mean", "constant")
    }
    assert losses == pytest.approx({"token_mean": -16 / 4, "sequence_mean": -(10 + 2) / 2, "constant": -16 / 10})


def test_a_correction_scales_drops_and_moves_the_denominator_without_changing_the_normaliser() -> None:
    tokens = batch()
    tokens = replace(tokens, step_start_logprobs=tokens.policy_logprobs.detach() - math.log(1.1))
    correction = Correction(
        weight=torch.tensor([2.0, 0.5, 1.0, 7.0, 1.0], dtype=torch.float64),
        keep=torch.tensor([True, True, True, True, False]),
        denominator="step_start",
        truncated=torch.tensor([True, False, False, False, False]),
    )
    out = policy_loss(tokens, TOTALS, objective="ppo_clip", reduce="token_mean", correction=correction)
    assert out.loss.item() == pytest.approx(-1.1 * (2 + 0.5 - 2) / 4)
    assert {name: out.metrics[name].item() for name in ("tokens", "masked", "truncated", "weight", "ratio")} == (
        pytest.approx({"tokens": 4, "masked": 1, "truncated": 1, "weight": 4.5, "ratio": 4.4})
    )


def test_the_clamp_acts_once_on_the_sum_of_raw_logs_and_is_counted() -> None:
    """Log-ratios (+30, −25) sum to 5: no clamp for the sequence, one on each token."""
    ratio = torch.tensor([30.0, -25.0, 0.0, 0.0, 0.0], dtype=torch.float64).exp()
    tokens = batch(ratio, advantages=(1.0, 0.0))
    sequence = policy_loss(tokens, TOTALS, objective="is_sequence", reduce="token_mean")
    assert sequence.loss.item() == pytest.approx(-math.exp(5) / 4)
    assert not sequence.clamped.any()
    token = policy_loss(tokens, TOTALS, objective="is_token", reduce="token_mean")
    assert token.loss.item() == pytest.approx(-(math.exp(20) + math.exp(-20)) / 4)
    assert token.clamped.tolist() == [True, True, False, False, False]
    assert torch.autograd.grad(token.loss, tokens.policy_logprobs)[0].abs().sum() == 0


def test_dpo_is_the_log_sigmoid_of_the_scaled_margin_of_token_sums() -> None:
    """Log-ratios to the reference: chosen .3 + .2, rejected −.1 (its masked token ignored) − .4: margin β·1."""
    tokens = batch()
    gain = torch.tensor([0.3, 0.2, -0.1, 50.0, -0.4], dtype=torch.float64)
    tokens = replace(tokens, reference_logprobs=tokens.policy_logprobs.detach() - gain)
    out = dpo_loss(tokens, torch.tensor([[0, 1]]), total_pairs=4, beta=0.5)
    assert out.loss.item() == pytest.approx(math.log(1 + math.exp(-0.5)) / 4)
    (gradient,) = torch.autograd.grad(out.loss, tokens.policy_logprobs)
    push = 0.5 / (1 + math.exp(0.5)) / 4
    assert gradient.tolist() == pytest.approx([-push, -push, push, 0, push])
    assert {name: value.item() for name, value in out.metrics.items()} == {"pairs": 1, "margin": 0.5, "correct": 1}


@pytest.mark.parametrize("objective", ["is_sequence", "is_sequence_truncated", "gspo"])
def test_sequence_objectives_refuse_per_token_advantages(objective: str) -> None:
    tokens = replace(batch(), advantages=torch.arange(5.0, dtype=torch.float64))
    with pytest.raises(ConfigError, match="one advantage per response"):
        policy_loss(tokens, TOTALS, objective=objective, reduce="token_mean")


def test_mistakes_are_refused_by_name() -> None:
    tokens = batch()
    with pytest.raises(ConfigError, match=r"objective.name='ppo'.*ppo_clip"):
        policy_loss(tokens, TOTALS, objective="ppo", reduce="token_mean")
    with pytest.raises(ConfigError, match="'is_token' has no option clip_low; allowed: none"):
        policy_loss(tokens, TOTALS, objective="is_token", reduce="token_mean", clip_low=0.1)
    with pytest.raises(ConfigError, match=r"objective.reduce='mean'"):
        policy_loss(tokens, TOTALS, objective="is_token", reduce="mean")
    with pytest.raises(ConfigError, match=r"dual_clip=0.9"):
        policy_loss(tokens, TOTALS, objective="ppo_clip", reduce="token_mean", dual_clip=0.9)
    with pytest.raises(ConfigError, match="use dpo_loss"):
        policy_loss(tokens, TOTALS, objective="dpo", reduce="token_mean")
    with pytest.raises(ConfigError, match="reference"):
        dpo_loss(tokens, torch.tensor([[0, 1]]), 1)
    with pytest.raises(ValueError, match="advantages: expected"):
        replace(tokens, advantages=torch.zeros(2))


def test_every_objective_has_options_and_every_default_is_usable() -> None:
    assert OBJECTIVE_OPTIONS.keys() == OBJECTIVES.keys() | {"dpo"}
    for objective in OBJECTIVES:
        neutral = no_correction(batch().policy_logprobs)
        losses = [
            policy_loss(batch(), TOTALS, objective=objective, reduce="constant", correction=c).loss
            for c in (None, neutral)
        ]
        assert torch.equal(*losses)
