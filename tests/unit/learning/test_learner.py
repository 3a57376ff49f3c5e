"""One batch in, one version on; a batch that must not be applied changes nothing."""

import json
import math

import numpy as np
import pytest
import torch

from rlsys.config.schema import KLConfig, LearnerConfig
from rlsys.errors import CheckpointError, ConfigError, NonFiniteError, StalenessViolation
from rlsys.learning.learner import next_kl_coef
from rlsys.learning.optimizer import learning_rate
from rlsys.learning.scorer import Scorer
from tests.unit.learning.samples import make_batch, make_group, make_rollout, parameters, unpacked_logprobs


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def poisoned(batch, slot: int = 0):
    """The batch with a NaN behaviour log-probability in one trained token."""
    group = batch[slot].group
    rollouts = [make_rollout(r.response_ids, behavior=r.behavior_logprobs) for r in group.rollouts]
    rollouts[0].behavior_logprobs[0] = np.nan
    return [
        *batch[:slot],
        make_group(group.prompt.token_ids, rollouts, batch[slot].score.rewards, slot),
        *batch[slot + 1 :],
    ]


def scored(batch, path) -> list[np.ndarray]:
    return Scorer(path, dtype="float32", temperature=1.0).score([group.group for group in batch])


# --- what a step does


def test_versions_count_batches_and_steps_move_every_parameter(make_learner):
    learner = make_learner(learner={"updates_per_batch": 3})
    before = parameters(learner)
    for version in (1, 2):
        step = learner.update(make_batch(version)).step
        assert (step.version, step.applied, learner.version) == (version, True, version)
    after = parameters(learner)
    assert not [name for name in before if torch.equal(before[name], after[name])]


def test_the_same_batches_give_the_same_parameters(make_learner):
    results = []
    for _ in range(2):
        learner = make_learner(learner={"updates_per_batch": 2})
        for seed in range(3):
            learner.update(make_batch(seed))
        results.append(parameters(learner))
    assert same(*results)


def test_rewarded_responses_become_likelier(make_learner):
    learner = make_learner(learner={"lr": 1e-3, "schedule": "constant"}, objective={"name": "is_token"})
    good, bad = [5, 6, 1], [7, 1]

    def probability(ids):
        with torch.no_grad():
            return float(unpacked_logprobs(learner, [3, 4], ids).sum().exp())

    before = probability(good), probability(bad)
    for version in range(10):
        with torch.no_grad():
            logprobs = [unpacked_logprobs(learner, [3, 4], ids).numpy() for ids in (good, bad)]
        rollouts = [
            make_rollout(ids, behavior=b, spans=[(0, len(ids), version)])
            for ids, b in zip((good, bad), logprobs, strict=True)
        ]
        learner.update([make_group([3, 4], rollouts, [1.0, 0.0])])
    assert probability(good) > before[0]
    assert probability(bad) < before[1]


def test_a_step_is_adamw_on_the_clipped_gradient(make_learner):
    """First step: moments are the gradient's own, so every parameter moves by lr·g/(|g| + ε) with the clipped g."""
    options = {"lr": 1e-2, "grad_clip": 1e-3, "schedule": "constant"}
    learner = make_learner(learner=options)
    before = parameters(learner)
    update = learner.update(make_batch(0))
    norm = update.step.metrics["policy/grad_norm"]
    assert norm > 0.1, "the norm reported is the one before clipping"
    state = learner.state().tensors
    name = "model.layers.0.mlp.up_proj.weight"
    clipped = state[f"{name}/exp_avg"] / (1 - 0.9)
    expected = before[name] - 1e-2 * clipped / (clipped.abs() + 1e-8)
    assert torch.allclose(parameters(learner)[name], expected, atol=1e-6)
    total = math.sqrt(sum(float((v / 0.1).square().sum()) for k, v in state.items() if k.endswith("/exp_avg")))
    assert total == pytest.approx(1e-3, rel=1e-3)


def test_several_updates_use_one_start_of_the_step(make_learner, tiny):
    batch = make_batch(5)
    learner = make_learner(learner={"updates_per_batch": 2, "lr": 5e-3})
    arrays = learner.update(batch).arrays
    assert np.allclose(arrays.step_start_logprobs, np.concatenate(scored(batch, tiny)), atol=2e-5)
    drift = np.abs(arrays.policy_logprobs - arrays.step_start_logprobs)
    per_group = [drift[arrays.offsets[4 * g] : arrays.offsets[4 * g + 4]].max() for g in range(6)]
    assert sum(d < 1e-5 for d in per_group) == 3, "the first mini-batch is taken at the start"
    assert sum(d > 1e-3 for d in per_group) == 3, "the second one after a step"


def test_one_update_is_taken_at_the_start(make_learner):
    arrays = make_learner().update(make_batch(5)).arrays
    assert np.array_equal(arrays.policy_logprobs, arrays.step_start_logprobs)


def test_arrays_follow_the_responses_in_order(make_learner):
    learner = make_learner(learner={"micro_batch_tokens": 24, "row_tokens": 12})
    batch = make_batch(6)
    rollouts = [(g.group.prompt.token_ids, r.response_ids) for g in batch for r in g.group.rollouts]
    with torch.no_grad():
        expected = [unpacked_logprobs(learner, prompt, ids).numpy() for prompt, ids in rollouts]
    arrays = learner.update(batch).arrays
    assert arrays.offsets.tolist() == np.concatenate([[0], np.cumsum([len(e) for e in expected])]).tolist()
    for i, values in enumerate(expected):
        assert np.allclose(arrays.policy_logprobs[arrays.offsets[i] : arrays.offsets[i + 1]], values, atol=2e-5)
    assert arrays.advantages.shape == (24,)


# --- refusals


def test_a_token_beyond_the_bound_is_refused_before_any_gradient(make_learner, monkeypatch):
    learner = make_learner(staleness_max=1)
    for seed in range(2):
        learner.update(make_batch(seed, version=learner.version))
    before, moments = parameters(learner), {k: v.clone() for k, v in learner.state().tensors.items()}
    monkeypatch.setattr("rlsys.learning.learner.accumulate", lambda *_: pytest.fail("a gradient was taken"))
    batch = make_batch(2, version=2)
    rollout = make_rollout([5, 6, 7, 1], spans=[(0, 1, 0), (1, 4, 2)])
    with pytest.raises(StalenessViolation, match=r"1 trained tokens .* staleness\.max=1.* version 0 .* version 2"):
        learner.update([*batch, make_group([3, 4], [rollout], [1.0], slot=9)])
    assert same(before, parameters(learner))
    assert same(moments, dict(learner.state().tensors))
    assert learner.version == 2


def test_the_bound_itself_and_untrained_tokens_beyond_it_are_allowed(make_learner):
    learner = make_learner(staleness_max=1)
    for seed in range(2):
        learner.update(make_batch(seed, version=learner.version))
    old_tool_output = make_rollout([5, 6, 7, 1], mask=[False, True, True, True], spans=[(0, 1, 0), (1, 4, 1)])
    assert learner.update([*make_batch(2, version=1), make_group([3], [old_tool_output], [1.0])]).step.applied


@pytest.mark.parametrize("updates", [1, 3])
def test_a_non_finite_batch_leaves_everything_bit_identical(make_learner, updates):
    learner, undisturbed = (make_learner(learner={"updates_per_batch": updates}) for _ in range(2))
    for one in (learner, undisturbed):
        one.update(make_batch(0))
    before, moments = parameters(learner), {k: v.clone() for k, v in learner.state().tensors.items()}
    for slot in range(6):  # so that with several updates each of them meets the NaN once
        step = learner.update(poisoned(make_batch(1), slot)).step
        assert (step.applied, step.version, learner.version) == (False, 1, 1)
        assert step.metrics["policy/grad_norm"] is None
        assert same(before, parameters(learner))
        assert same(moments, dict(learner.state().tensors))
        learner._refused = 0
    for one in (learner, undisturbed):
        assert one.update(make_batch(2)).step.applied
    assert same(parameters(learner), parameters(undisturbed))


def test_a_gradient_that_overflows_under_a_finite_loss_is_refused(make_learner):
    group = make_batch(0, groups=1)[0].group
    learner = make_learner(advantage={"name": "group_mean"}, objective={"name": "reinforce"})
    learner.update(make_batch(1))
    before = parameters(learner)
    step = learner.update([make_group(group.prompt.token_ids, group.rollouts, [1e25, -1e25, 0.0, 0.0])]).step
    assert step.metrics["policy/loss"] is not None, "the loss is finite"
    assert step.metrics["policy/grad_norm"] is None, "the squares of the gradient are not"
    assert not step.applied
    assert same(before, parameters(learner))


def test_giving_up_after_refusals_in_a_row(make_learner):
    learner = make_learner(learner={"max_nonfinite_steps": 3})
    for _ in range(2):
        assert not learner.update(poisoned(make_batch(0))).step.applied
    assert learner.update(make_batch(0)).step.applied, "a good batch in between starts the count again"
    for _ in range(2):
        assert not learner.update(poisoned(make_batch(0))).step.applied
    with pytest.raises(NonFiniteError, match=r"3 learner batches in a row.*version 1.*those before the last one"):
        learner.update(poisoned(make_batch(0)))
    with pytest.raises(NonFiniteError, match=r"1 learner batches .*with learner\.max_nonfinite_steps above 1"):
        make_learner(learner={"max_nonfinite_steps": 1}).update(poisoned(make_batch(0)))


def test_what_a_refused_batch_did_not_come_to_is_nan_and_its_start_is_known(make_learner, tiny):
    """Three mini-batches of two groups; whichever of them meets the NaN is the last one that was taken."""
    learner = make_learner(learner={"updates_per_batch": 3, "max_nonfinite_steps": 9})
    taken = []
    for slot in range(6):
        batch = poisoned(make_batch(1), slot)
        arrays = learner.update(batch).arrays
        assert np.allclose(arrays.step_start_logprobs, np.concatenate(scored(batch, tiny)), atol=2e-5)
        per_group = np.split(arrays.policy_logprobs, arrays.offsets[4:-1:4])
        unknown = [np.isnan(group).all() for group in per_group]
        assert not any(np.isnan(group).any() for group, no in zip(per_group, unknown, strict=True) if not no)
        taken.append(6 - sum(unknown))
    assert sorted(taken) == [2, 2, 4, 4, 6, 6]


def test_batches_without_a_trained_token_or_a_needed_reference_are_refused(make_learner):
    silent = make_rollout([5, 1], mask=[False, False])
    with pytest.raises(ValueError, match="no trained token"):
        make_learner().update([make_group([3], [silent], [1.0])])
    with pytest.raises(ConfigError, match=r"kl\.coef=0\.1 needs reference"):
        make_learner(kl={"coef": 0.1}).update(make_batch(0))


def test_lengths_that_disagree_are_named(make_learner):
    batch = make_batch(0, groups=2)
    with pytest.raises(ValueError, match="reference_logprobs: lengths differ"):
        make_learner().update(batch, [np.zeros(1, np.float32)] * 7)
    with pytest.raises(ValueError, match="slot 4: 1 rewards for 4 responses"):
        make_learner().update([make_group([3], batch[0].group.rollouts, [1.0], slot=4)])
    gap = make_rollout([5, 6, 1], spans=[(0, 1, 0), (2, 3, 0)])
    with pytest.raises(ValueError, match=r"version_spans: .* does not continue at token 1"):
        make_learner().update([make_group([3], [gap], [1.0])])


# --- KL and reference


def test_kl_in_the_reward_shifts_the_advantages_by_the_sequence_kl(make_learner):
    """group_mean: A_i = R_i − mean R with R_i = r_i − β Σ_t (log π_V − log π_ref)."""
    batch = make_batch(7, groups=2)
    reference = [np.full(len(r.response_ids), -1.7, np.float32) for g in batch for r in g.group.rollouts]
    learner = make_learner(kl={"coef": 0.5, "placement": "reward"}, advantage={"name": "group_mean"})
    arrays = learner.update(batch, reference).arrays
    log_ratio = arrays.step_start_logprobs - np.concatenate(reference)
    sums = np.add.reduceat(log_ratio, arrays.offsets[:-1])
    rewards = np.concatenate([g.score.rewards for g in batch]) - 0.5 * sums
    expected = (rewards.reshape(2, 4) - rewards.reshape(2, 4).mean(1, keepdims=True)).ravel()
    assert np.allclose(arrays.advantages, expected, atol=1e-4)
    assert np.array_equal(arrays.reference_logprobs, np.concatenate(reference))


def test_kl_in_the_reward_hides_no_group_without_signal(make_learner):
    group = make_batch(7, groups=1)[0].group
    batch = [make_group(group.prompt.token_ids, group.rollouts, [1.0] * 4)]
    reference = [np.full(len(r.response_ids), -1.7, np.float32) for r in group.rollouts]
    update = make_learner(kl={"coef": 0.5, "placement": "reward"}).update(batch, reference)
    assert np.abs(update.arrays.advantages).max() > 0.1, "the KL term tells the responses apart"
    assert update.step.metrics["advantage/zero_variance_fraction"] == 1.0


def test_the_scorer_agrees_with_the_policy_it_was_made_from(make_learner, tiny):
    batch = make_batch(8)
    scores = scored(batch, tiny)
    assert [len(s) for s in scores] == [len(r.response_ids) for g in batch for r in g.group.rollouts]
    narrow = Scorer(tiny, dtype="float32", temperature=1.0, row_tokens=12, micro_batch_tokens=24)
    for whole, cut in zip(scores, narrow.score([group.group for group in batch]), strict=True):
        assert np.allclose(whole, cut, atol=2e-5)
    step = make_learner(kl={"coef": 0.1}).update(batch, scores).step
    assert step.metrics["kl/reference_k1"] == pytest.approx(0.0, abs=1e-5)
    assert step.metrics["kl/sequence_mean"] == pytest.approx(0.0, abs=1e-4)


def test_without_a_reference_the_kl_is_unknown_not_zero(make_learner):
    metrics = make_learner().update(make_batch(0)).step.metrics
    assert metrics["kl/reference_k1"] is metrics["kl/reference_k3"] is metrics["kl/sequence_mean"] is None


def test_kl_coefficient_follows_its_schedule():
    linear = KLConfig(coef=0.4, schedule="linear", final_coef=0.1)
    assert [next_kl_coef(linear, 9.9, v, 3, 0.0, 8) for v in (0, 1, 3, 5)] == pytest.approx([0.4, 0.3, 0.1, 0.1])
    adaptive = KLConfig(coef=0.4, schedule="adaptive", target=2.0, horizon=1000)
    assert next_kl_coef(adaptive, 0.4, 1, 3, 2.2, 100) == pytest.approx(0.4 * (1 + 0.1 * 0.1))
    assert next_kl_coef(adaptive, 0.4, 1, 3, 99.0, 100) == pytest.approx(0.4 * (1 + 0.1 * 0.2))
    assert next_kl_coef(adaptive, 0.4, 1, 3, 0.0, 100) == pytest.approx(0.4 * (1 - 0.1 * 0.2))


def test_a_linear_coefficient_may_start_at_nothing(make_learner):
    """From 0 to 0.4 over 4 steps: the second batch is the first one with a KL term."""
    learner = make_learner(learner={"steps": 4}, kl={"schedule": "linear", "final_coef": 0.4})
    batch = make_batch(9)
    reference = [np.full(len(r.response_ids), -9.0, np.float32) for g in batch for r in g.group.rollouts]
    coefficients = [learner.update(batch, reference).step.metrics["kl/coef"] for _ in range(3)]
    assert coefficients == pytest.approx([0.0, 0.1, 0.2])
    with pytest.raises(ConfigError, match=r"kl\.coef=0\.3.* needs reference"):
        learner.update(batch)


def test_the_adaptive_coefficient_moves_between_batches(make_learner):
    learner = make_learner(kl={"coef": 0.1, "schedule": "adaptive", "target": 0.01, "horizon": 24})
    batch = make_batch(9)
    reference = [np.full(len(r.response_ids), -9.0, np.float32) for g in batch for r in g.group.rollouts]
    coefficients = [learner.update(batch, reference).step.metrics["kl/coef"] for _ in range(2)]
    assert coefficients == pytest.approx([0.1, 0.1 * 1.2])


# --- numbers


def test_staleness_is_divided_where_the_response_finished(make_learner):
    learner = make_learner()
    for seed in range(5):
        learner.update(make_batch(seed, version=learner.version))
    early = make_rollout([5, 6, 7, 1], spans=[(0, 1, 1), (1, 4, 3)])  # ages 4, 2, 2, 2; finished under 3
    late = make_rollout([5, 1], spans=[(0, 2, 5)], mask=[True, False])  # age 0
    metrics = learner.update([make_group([3], [early, late], [1.0, 0.0])]).step.metrics
    assert metrics["staleness/mean"] == pytest.approx((4 + 2 + 2 + 2 + 0) / 5)
    assert metrics["staleness/in_flight/mean"] == pytest.approx((2 + 0 + 0 + 0 + 0) / 5)
    assert metrics["staleness/in_queue/mean"] == pytest.approx((2 + 2 + 2 + 2 + 0) / 5)
    assert (metrics["staleness/max"], metrics["staleness/p95"]) == (4.0, 4.0)
    assert metrics["importance/ess_token/by_staleness/1"] is None
    assert metrics["importance/ess_token/by_staleness/4+"] == pytest.approx(1.0)


def test_metrics_of_a_known_batch(make_learner):
    rollouts = [make_rollout([5, 1], behavior=-1.0), make_rollout([6, 7, 1], behavior=-1.0)]
    batch = [make_group([3, 4], rollouts, [1.0, 0.0]), make_group([8], rollouts, [1.0, 1.0], 1)]
    learner = make_learner(learner={"lr": 1e-3, "warmup_steps": 4})
    update = learner.update(batch)
    metrics = update.step.metrics
    assert metrics["reward/mean"] == metrics["reward/pass_rate"] == pytest.approx(0.75)
    assert metrics["reward/std"] == pytest.approx(0.5)
    assert metrics["advantage/zero_variance_fraction"] == pytest.approx(0.5)
    assert metrics["advantage/mean"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["policy/response_tokens"] == pytest.approx(2.5)
    assert metrics["policy/lr"] == pytest.approx(1e-3 / 5)
    assert 0 < metrics["policy/entropy"] < math.log(14)
    log_ratio = update.arrays.policy_logprobs.astype(float) + 1.0
    assert metrics["importance/k3"] == pytest.approx(np.mean(np.exp(log_ratio) - log_ratio - 1), rel=1e-5)
    assert metrics["importance/clip_fraction"] == pytest.approx(update.arrays.clipped.mean())
    assert update.step.trained_tokens == 4 + 5 + 3 + 4, "prompt and response of every sample"
    json.dumps(dict(metrics), allow_nan=False)


def test_masked_tokens_are_counted_and_recorded(make_learner):
    objective = {"name": "ppo_clip", "correction": {"name": "mask_token", "low": 0.5, "high": 2.0}}
    update = make_learner(objective=objective).update(make_batch(10))
    q = update.arrays.step_start_logprobs - np.concatenate(
        [r.behavior_logprobs for g in make_batch(10) for r in g.group.rollouts]
    )
    expected = np.abs(q) > math.log(2.0)
    assert np.array_equal(update.arrays.masked, expected)
    assert 0 < expected.mean() < 1
    assert update.step.metrics["importance/masked_fraction"] == pytest.approx(expected.mean())


def test_clamps_of_the_ratio_and_of_the_kl_term_are_counted_token_by_token(make_learner):
    """Of three tokens one was sampled 30 nats off, and another one is that far from the reference."""
    rollout = make_rollout([5, 6, 1], behavior=[-40.0, -2.0, -2.0])
    reference = [np.array([-2.0, 40.0, -2.0], np.float32)]
    learner = make_learner(kl={"coef": 0.1}, advantage={"name": "group_mean"})
    metrics = learner.update([make_group([3], [rollout], [1.0])], reference).step.metrics
    assert metrics["importance/clamped_fraction"] == pytest.approx(2 / 3)


def test_raft_weights_accepted_responses_by_one_and_others_by_none(make_learner):
    """Accepted is what passes: part of the reward is not enough."""
    rewards = [1.0, 0.0, 0.05, 1.5]
    batch = [make_group(g.group.prompt.token_ids, g.group.rollouts, rewards, i) for i, g in enumerate(make_batch(11))]
    update = make_learner(objective={"name": "raft"}).update(batch)
    assert update.arrays.advantages.tolist() == [1.0, 0.0, 0.0, 1.0] * 6
    assert update.step.metrics["reward/pass_rate"] == update.arrays.advantages.mean() == 0.5


def test_clip_options_reach_the_objective(make_learner):
    batch = make_batch(12)
    objective = {"name": "is_token_truncated", "clip_low": 0.5, "clip_high": 0.75}
    arrays = make_learner(objective=objective).update(batch).arrays
    ratio = np.exp(
        arrays.policy_logprobs - np.concatenate([r.behavior_logprobs for g in batch for r in g.group.rollouts])
    )
    assert np.array_equal(arrays.clipped, (ratio < 0.5) | (ratio > 1.75))


def test_learning_rate_warms_up_then_decays_to_zero():
    linear = LearnerConfig(lr=1.0, steps=10, warmup_steps=2)
    assert [learning_rate(linear, v) for v in (0, 1, 2, 6, 9, 10, 11)] == pytest.approx(
        [1 / 3, 2 / 3, 1, 0.5, 0.125, 0, 0]
    )
    constant = LearnerConfig(lr=1.0, steps=10, warmup_steps=0, schedule="constant")
    assert [learning_rate(constant, v) for v in (0, 5, 50)] == [1.0, 1.0, 1.0]


# --- bfloat16


def test_bfloat16_parameters_are_their_float32_masters_rounded_and_small_steps_add_up(make_learner):
    learner = make_learner(model={"dtype": "bfloat16"}, learner={"lr": 2e-5, "schedule": "constant", "steps": 99})
    before = parameters(learner)
    assert {t.dtype for t in before.values()} == {torch.bfloat16}
    for _ in range(40):
        assert learner.update(make_batch(0, version=learner.version)).step.applied
    state = learner.state().tensors
    for name, tensor in learner.named_tensors():
        assert state[f"{name}/master"].dtype == torch.float32
        assert torch.equal(tensor, state[f"{name}/master"].bfloat16())
    name = "model.layers.0.mlp.up_proj.weight"
    moved = (state[f"{name}/master"] - before[name].float()).abs().median()
    assert moved > 1e-4, "each step is below half a bfloat16 unit of a weight near 0.1, forty are not lost"


def test_bfloat16_is_close_to_float32(make_learner):
    batch = make_batch(13)
    full = make_learner().update(batch).arrays.policy_logprobs
    half = make_learner(model={"dtype": "bfloat16"}).update(batch).arrays.policy_logprobs
    assert half.dtype == np.float32
    assert np.abs(full - half).mean() < 0.1
    assert np.corrcoef(full, half)[0, 1] > 0.99


def test_state_of_another_seed_or_model_is_refused(make_learner, tiny, untied):
    learner = make_learner(path=untied)
    learner.update(make_batch(0))
    with pytest.raises(CheckpointError, match="seed 0, not 1"):
        make_learner(path=untied, seed=1).load_state(learner.state())
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        make_learner(path=tiny).load_state(learner.state())
