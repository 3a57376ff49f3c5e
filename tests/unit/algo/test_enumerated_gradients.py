"""Expected gradients of every objective and KL placement against exact ones, on enumerable policies."""

import pytest
import torch
from torch import Tensor

from rlsys.algo.batch import BatchTotals, TokenBatch
from rlsys.algo.corrections import compute_correction
from rlsys.algo.divergence import kl_loss, kl_rewards
from rlsys.algo.objectives import OBJECTIVES, dpo_loss, policy_loss

from .enumeration import (
    ONE,
    expected_gradient,
    gradient,
    random_logits,
    relative_error,
    reward_gradient,
    tree,
)

SPACE = tree(3, 3, ends=True)
POLICY = random_logits(SPACE, seed=1)
BEHAVIOR = POLICY + random_logits(SPACE, seed=2, scale=0.6)
REFERENCE = random_logits(SPACE, seed=3)
REWARDS = torch.rand(len(SPACE.responses), generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def ascent(objective: str, *, behavior: Tensor = BEHAVIOR, rewards: Tensor = REWARDS, **options: float) -> Tensor:
    def loss(batch: TokenBatch) -> Tensor:
        return policy_loss(batch, ONE, objective=objective, reduce="constant", correction=None, **options).loss

    return expected_gradient(SPACE, POLICY, behavior, rewards, loss)


def corrected_ascent(objective: str, correction: str, start: Tensor, **correction_options: float) -> Tensor:
    def loss(batch: TokenBatch) -> Tensor:
        fixed = compute_correction(
            correction,
            step_start_logprobs=batch.step_start_logprobs,
            behavior_logprobs=batch.behavior_logprobs,
            loss_mask=batch.loss_mask,
            response_index=batch.response_index,
            responses=batch.responses,
            objective=objective,
            proximal_logprobs=None,
            **correction_options,
        )
        return policy_loss(batch, ONE, objective=objective, reduce="constant", correction=fixed).loss

    return expected_gradient(SPACE, POLICY, BEHAVIOR, REWARDS, loss, start_logits=start)


# --- on-policy


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_on_policy_every_objective_has_the_gradient_of_expected_reward(objective: str) -> None:
    assert relative_error(ascent(objective, behavior=POLICY), reward_gradient(SPACE, POLICY, REWARDS)) < 1e-12


@pytest.mark.parametrize("reduce", ["token_mean", "sequence_mean", "constant"])
@pytest.mark.parametrize("objective", sorted(OBJECTIVES.keys() - {"raft"}))
def test_on_policy_every_objective_agrees_with_reinforce_in_one_sample(objective: str, reduce: str) -> None:
    policy = SPACE.logprobs(POLICY).requires_grad_()
    centred = (REWARDS - REWARDS.mean())[SPACE.response_index]
    batch = TokenBatch(
        policy_logprobs=policy,
        behavior_logprobs=policy.detach(),
        step_start_logprobs=policy.detach(),
        advantages=centred,
        loss_mask=torch.ones(len(policy), dtype=torch.bool),
        response_index=SPACE.response_index,
        responses=len(SPACE.responses),
    )
    totals = BatchTotals(tokens=len(policy), responses=len(SPACE.responses), max_tokens=3)
    ours, plain = (
        gradient(policy_loss(batch, totals, objective=name, reduce=reduce).loss, policy)
        for name in (objective, "reinforce")
    )
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=0)


def test_sequence_mean_is_not_parallel_to_the_gradient_of_expected_reward() -> None:
    def loss(batch: TokenBatch) -> Tensor:
        return policy_loss(batch, ONE, objective="reinforce", reduce="sequence_mean").loss

    measured = expected_gradient(SPACE, POLICY, POLICY, REWARDS, loss)
    exact = reward_gradient(SPACE, POLICY, REWARDS)
    assert torch.cosine_similarity(measured.flatten(), exact.flatten(), dim=0) < 0.995


def test_token_mean_over_the_whole_distribution_divides_by_the_mean_length() -> None:
    """Probabilities 1/4, 3/4 everywhere: 16 draws hold every response exactly as often as it is likely."""
    space = tree(2, 2, ends=True)  # (0), (1, 0), (1, 1)
    logits = torch.tensor([[1.0, 3.0], [1.0, 3.0]], dtype=torch.float64).log().requires_grad_()
    draws = [0] * 4 + [1] * 3 + [2] * 9
    rewards = torch.tensor([0.5, 1.0, -1.0], dtype=torch.float64)
    own = [(y, t) for y in draws for t in range(len(space.responses[y]))]
    rows = torch.tensor([int((space.response_index == y).nonzero()[0]) + t for y, t in own])
    lengths = [len(space.responses[y]) for y in draws]
    index = torch.repeat_interleave(torch.arange(16), torch.tensor(lengths))
    policy = space.logprobs(logits)[rows]
    batch = TokenBatch(
        policy_logprobs=policy,
        behavior_logprobs=policy.detach(),
        step_start_logprobs=policy.detach(),
        advantages=rewards[torch.tensor(draws)][index],
        loss_mask=torch.ones(len(rows), dtype=torch.bool),
        response_index=index,
        responses=16,
    )
    totals = BatchTotals(tokens=sum(lengths), responses=16, max_tokens=2)
    ascent = -gradient(policy_loss(batch, totals, objective="reinforce", reduce="token_mean").loss, logits)
    mean_length = 1 / 4 * 1 + 3 / 4 * 2
    assert relative_error(ascent * mean_length, reward_gradient(space, logits, rewards)) < 1e-12


# --- off-policy


def test_off_policy_is_sequence_is_unbiased_at_any_drift() -> None:
    assert relative_error(ascent("is_sequence"), reward_gradient(SPACE, POLICY, REWARDS)) < 1e-12


def test_off_policy_is_sequence_keeps_its_mean_gradient_under_a_baseline() -> None:
    assert relative_error(ascent("is_sequence", rewards=REWARDS - 0.7), ascent("is_sequence")) < 1e-12


def test_off_policy_a_baseline_changes_the_mean_gradient_of_reinforce_but_not_on_policy() -> None:
    assert relative_error(ascent("reinforce", rewards=REWARDS - 0.7), ascent("reinforce")) > 0.1
    on_policy = [ascent("reinforce", behavior=POLICY, rewards=r) for r in (REWARDS - 0.7, REWARDS)]
    assert relative_error(*on_policy) < 1e-12


def test_off_policy_is_token_climbs_the_surrogate_with_the_prefixes_and_values_of_the_behavior() -> None:
    """∇ L_tok = ∇ Σ_s d^μ(s) Σ_a π_θ(a|s) Q^μ(s, a), computed without any sampled ratio."""
    logits = POLICY.clone().requires_grad_()
    values = SPACE.action_values(BEHAVIOR, REWARDS)
    surrogate = (SPACE.occupancy(BEHAVIOR)[:, None] * logits.softmax(-1) * values).sum()
    assert relative_error(ascent("is_token"), gradient(surrogate, logits)) < 1e-12


def test_the_bias_of_is_token_is_of_first_order_in_the_drift_and_zero_for_one_token() -> None:
    direction = random_logits(SPACE, seed=5)
    exact = reward_gradient(SPACE, POLICY, REWARDS)
    far, near = (relative_error(ascent("is_token", behavior=POLICY + h * direction), exact) for h in (1e-2, 5e-3))
    assert far / near == pytest.approx(2.0, rel=0.02)

    one = tree(4, 1)
    policy, behavior = random_logits(one, 6), random_logits(one, 7)
    rewards = torch.tensor([1.0, 0.0, 0.5, -1.0], dtype=torch.float64)

    def loss(batch: TokenBatch) -> Tensor:
        return policy_loss(batch, ONE, objective="is_token", reduce="constant").loss

    measured = expected_gradient(one, policy, behavior, rewards, loss)
    assert relative_error(measured, reward_gradient(one, policy, rewards)) < 1e-12


def test_truncating_the_sequence_weight_loses_exactly_the_responses_outside() -> None:
    """E_μ ∇clip(w)·r = Σ over responses with w inside of r ∇π(y): rewards outside the band teach nothing."""
    weight = SPACE.probabilities(POLICY) / SPACE.probabilities(BEHAVIOR)
    inside = (weight >= 0.8) & (weight <= 1.2)
    assert 0 < inside.sum() < len(inside)
    expected = reward_gradient(SPACE, POLICY, REWARDS * inside)
    assert relative_error(ascent("is_sequence_truncated"), expected) < 1e-12


def test_ppo_clip_for_one_token_drops_a_token_only_where_it_was_already_pushed_too_far() -> None:
    """π = (.8, .2), μ = (.5, .5), r = (1.6, .4): A > 0 on the first and A < 0 on the second are both clipped."""
    space = tree(2, 1)
    policy = torch.tensor([[0.8, 0.2]], dtype=torch.float64).log()
    behavior = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()

    def measured(rewards: list[float]) -> Tensor:
        def loss(batch: TokenBatch) -> Tensor:
            return policy_loss(batch, ONE, objective="ppo_clip", reduce="constant").loss

        return expected_gradient(space, policy, behavior, torch.tensor(rewards, dtype=torch.float64), loss)[0]

    assert measured([1.0, -1.0]).tolist() == [0.0, 0.0]
    # ∂π_1/∂z = π_1(1 − π_1) = 0.16; with the signs reversed nothing is clipped: −2 · 0.16 on the first logit.
    torch.testing.assert_close(measured([-1.0, 1.0]), torch.tensor([-0.32, 0.32], dtype=torch.float64))


def test_uncapped_tis_leaves_the_expected_gradient_of_the_ratio_objectives_unchanged() -> None:
    """q · π_θ/π_V = π_θ/μ, per token and per response: the lag is not counted twice."""
    start = POLICY + random_logits(SPACE, seed=8, scale=0.3)
    for objective in ("is_token", "is_sequence"):
        measured = corrected_ascent(objective, "tis", start, cap=1e6)
        assert relative_error(measured, ascent(objective)) < 1e-12


def test_tis_at_the_start_of_a_step_is_the_capped_score_function() -> None:
    """At π_θ = π_V: min(q, C)·∇(π_θ/π_V) = min(r, C)·∇log π_θ, which is `cispo` with the same cap."""
    measured = corrected_ascent("is_token", "tis", POLICY, cap=1.3)
    assert relative_error(measured, ascent("cispo", cap=1.3)) < 1e-12
    assert relative_error(measured, ascent("is_token")) > 0.01


def test_tis_bounds_the_behavior_weight_of_decoupled_ppo() -> None:
    """At π_θ = π_prox = π_V: min(π_V/μ, C)·∇u, again `cispo`."""
    measured = corrected_ascent("decoupled_ppo", "tis", POLICY, cap=1.3)
    assert relative_error(measured, ascent("cispo", cap=1.3)) < 1e-12


def test_masking_sequences_keeps_exactly_the_gradient_of_the_kept_responses() -> None:
    ratio = SPACE.probabilities(POLICY) / SPACE.probabilities(BEHAVIOR)
    lengths = torch.tensor([len(y) for y in SPACE.responses])
    mean = ratio ** (1 / lengths)
    kept = (mean >= 0.8) & (mean <= 1.25) & (ratio <= 8.0)
    assert 0 < kept.sum() < len(kept)
    expected = reward_gradient(SPACE, POLICY, REWARDS * kept)
    assert relative_error(corrected_ascent("is_sequence", "mask_sequence", POLICY), expected) < 1e-12


# --- KL


def kl_descent(estimator: str, *, behavior: Tensor, cap: float = 1e6) -> Tensor:
    def loss(batch: TokenBatch) -> Tensor:
        return kl_loss(batch, ONE, estimator=estimator, reduce="constant", coef=1.0, cap=cap).loss

    return -expected_gradient(SPACE, POLICY, behavior, REWARDS, loss, reference_logits=REFERENCE)


def fixed_prefix_kl_gradient(visited_by: Tensor, *, reverse: bool = False) -> Tensor:
    """∇ Σ_s d(s) KL(π_θ(·|s) ‖ π_ref(·|s)), or with the arguments exchanged; d does not move."""
    logits = POLICY.clone().requires_grad_()
    policy, reference = logits.log_softmax(-1), REFERENCE.log_softmax(-1)
    first, second = (reference, policy) if reverse else (policy, reference)
    per_prefix = (first.exp() * (first - second)).sum(-1)
    return gradient((SPACE.occupancy(visited_by) * per_prefix).sum(), logits)


def sequence_kl_gradient() -> Tensor:
    logits = POLICY.clone().requires_grad_()
    probability = SPACE.probabilities(logits)
    return gradient((probability * (probability / SPACE.probabilities(REFERENCE)).log()).sum(), logits)


@pytest.mark.parametrize("behavior", [POLICY, BEHAVIOR], ids=["on_policy", "off_policy"])
def test_k2_and_k3_as_losses_have_their_kl_gradients_at_the_prefixes_of_the_behavior(behavior: Tensor) -> None:
    forward, reverse = (fixed_prefix_kl_gradient(behavior, reverse=flag) for flag in (False, True))
    assert relative_error(kl_descent("k2", behavior=behavior), forward) < 1e-12
    assert relative_error(kl_descent("k3", behavior=behavior), reverse) < 1e-12


@pytest.mark.parametrize("behavior", [POLICY, BEHAVIOR], ids=["on_policy", "off_policy"])
def test_k1_as_a_loss_has_no_expected_gradient_unless_the_cap_cuts(behavior: Tensor) -> None:
    scale = kl_descent("k2", behavior=behavior).norm()
    assert kl_descent("k1", behavior=behavior).norm() < 1e-12 * scale


def test_no_token_loss_has_the_gradient_of_the_sequence_kl_but_kl_in_the_reward_has() -> None:
    exact = sequence_kl_gradient()
    assert relative_error(kl_descent("k2", behavior=POLICY), exact) > 0.05
    penalty = kl_rewards(
        SPACE.logprobs(POLICY),
        SPACE.logprobs(REFERENCE),
        torch.ones(len(SPACE.token_ids), dtype=torch.bool),
        SPACE.response_index,
        len(SPACE.responses),
        coef=0.3,
    )
    assert relative_error(ascent("reinforce", behavior=POLICY, rewards=penalty), -0.3 * exact) < 1e-12


def test_for_one_token_k2_has_the_gradient_of_the_sequence_kl() -> None:
    space = tree(4, 1)
    policy, reference = random_logits(space, 1).requires_grad_(), random_logits(space, 2)
    probability = space.probabilities(policy)
    exact = gradient((probability * (probability / space.probabilities(reference)).log()).sum(), policy)

    def loss(batch: TokenBatch) -> Tensor:
        return kl_loss(batch, ONE, estimator="k2", reduce="constant", coef=1.0).loss

    zero = torch.zeros(4, dtype=torch.float64)
    measured = expected_gradient(space, policy, policy.detach(), zero, loss, reference_logits=reference)
    assert relative_error(-measured, exact) < 1e-12


# --- preferences


def test_dpo_at_the_reference_raises_chosen_and_lowers_rejected_by_half_beta() -> None:
    logits = POLICY.clone().requires_grad_()
    policy = SPACE.logprobs(logits)
    batch = TokenBatch(
        policy_logprobs=policy,
        behavior_logprobs=policy.detach(),
        step_start_logprobs=policy.detach(),
        reference_logprobs=policy.detach(),
        advantages=torch.zeros_like(policy),
        loss_mask=torch.ones(len(policy), dtype=torch.bool),
        response_index=SPACE.response_index,
        responses=len(SPACE.responses),
    )
    out = dpo_loss(batch, torch.tensor([[2, 5], [0, 1]]), total_pairs=2, beta=0.4)
    score = SPACE.probabilities(logits).log()
    by_hand = -0.4 / 2 * ((score[2] - score[5]) + (score[0] - score[1])) / 2
    assert out.loss.item() == pytest.approx(0.6931471805599453)
    assert relative_error(gradient(out.loss, logits), gradient(by_hand, logits)) < 1e-12
