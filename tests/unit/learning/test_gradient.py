"""The gradient of a batch is that of the written-out loss, however the batch is cut or ordered."""

import numpy as np
import pytest
import torch

from rlsys.config.schema import KLConfig, LearnerConfig, ObjectiveConfig
from rlsys.learning.batch import flatten
from rlsys.learning.gradient import StepInputs, accumulate, divide
from rlsys.learning.metrics import TokenResults
from rlsys.learning.surrogate import Surrogate
from tests.unit.learning.samples import flat_gradient, make_batch, make_group, make_rollout, unpacked_logprobs


def gradient_of(make_learner, batch, *, reference=None, objective=None, kl=None, advantages=None, **sizes):
    """Gradient of one mini-batch, [all parameters], and what it noted."""
    learner = make_learner(learner=sizes, objective=objective or {}, kl=kl or {})
    flat = flatten(batch, reference)
    config = LearnerConfig(
        row_tokens=sizes.get("row_tokens", 32), micro_batch_tokens=sizes.get("micro_batch_tokens", 8192)
    )
    (mini,) = divide(flat, config, max_tokens=8, seed=0, version=0)
    surrogate = Surrogate(ObjectiveConfig(**(objective or {})), KLConfig(**(kl or {})))
    given = torch.linspace(-1.0, 2.0, flat.responses) if advantages is None else torch.tensor(advantages)
    start = learner._step_start(flat, [mini])
    inputs = StepInputs(
        batch=flat,
        advantages=given[flat.response_index],
        step_start_logprobs=start,
        correction=None if start is None else surrogate.correction_of_batch(flat, start),
        kl_coef=learner._kl_coef,
    )
    results = TokenResults.empty(len(flat.response_index), torch.device("cpu"))
    accumulate(learner.policy, learner._optimizer, surrogate, inputs, mini, results, 1.0)
    return flat_gradient(learner.policy.model), results, mini


def test_gradient_is_that_of_the_loss_written_out_by_hand(make_learner):
    """token_mean of −r·A with one masked token, plus β·min(r, 2)·k3, each response on its own."""
    batch = [
        make_group([3, 4, 5], [make_rollout([6, 7, 1], behavior=[-1.0, -9.0, -0.5]), make_rollout([6, 1])], [1, 0]),
        make_group([9, 8], [make_rollout([2, 3, 4, 1], behavior=-1.5, mask=[True, False, True, True])], [1]),
    ]
    reference = [np.full(3, -1.0), np.full(2, -2.5), np.full(4, -1.2)]
    advantages = [0.7, -1.3, 2.0]
    found, _, _ = gradient_of(
        make_learner,
        batch,
        reference=reference,
        objective={"name": "is_token"},
        kl={"coef": 0.3, "estimator": "k3"},
        advantages=advantages,
    )
    learner = make_learner()
    total, capped = torch.zeros(()), 0
    rollouts = [(group.group.prompt.token_ids, rollout) for group in batch for rollout in group.group.rollouts]
    for (prompt, rollout), advantage, ref in zip(rollouts, advantages, reference, strict=True):
        logprobs = unpacked_logprobs(learner, prompt, rollout.response_ids)
        ratio = (logprobs - torch.from_numpy(rollout.behavior_logprobs)).exp()
        d = torch.from_numpy(ref).float() - logprobs
        k3 = d.exp() - d - 1
        capped += int((ratio > 2).sum())
        term = -ratio * advantage + 0.3 * ratio.detach().clamp(max=2.0) * k3
        total = total + (term * torch.from_numpy(rollout.loss_mask)).sum()
    (total / 8).backward()  # 9 response tokens, one of them masked
    expected = flat_gradient(learner.policy.model)
    assert expected.abs().max() > 0.1
    assert capped > 0, "the cap must act for this to mean anything"
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


OBJECTIVES = [
    {"name": "ppo_clip"},
    {"name": "reinforce", "reduce": "sequence_mean"},
    {"name": "is_sequence", "reduce": "constant"},
    {"name": "gspo", "clip_low": 0.2, "clip_high": 0.2},
    {"name": "decoupled_ppo", "correction": "tis"},
    {"name": "ppo_clip", "correction": {"name": "m2", "tau": 0.3}},
    {"name": "is_token", "correction": "mask_sequence", "reduce": "sequence_mean"},
    {"name": "cispo", "correction": "mask_token"},
]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: f"{o['name']}-{o.get('correction', 'none')}")
def test_micro_batch_size_and_row_length_do_not_change_the_gradient(make_learner, objective):
    batch = make_batch(1, groups=7)
    reference = [np.full(len(r.response_ids), -2.0) for group in batch for r in group.group.rollouts]
    options = {"objective": objective, "reference": reference, "kl": {"coef": 0.1}}
    whole, seen, mini = gradient_of(make_learner, batch, micro_batch_tokens=8192, row_tokens=256, **options)
    assert len(mini.packing.micro_batches) == 1
    scale = float(whole.abs().max())
    assert scale > 0
    for micro_batch_tokens, row_tokens in ((1, 1), (24, 12), (64, 32)):
        cut, seen_cut, mini = gradient_of(
            make_learner, batch, micro_batch_tokens=micro_batch_tokens, row_tokens=row_tokens, **options
        )
        assert len(mini.packing.micro_batches) >= 2
        assert torch.allclose(cut, whole, rtol=1e-3, atol=1e-5 * scale)
        assert torch.equal(seen_cut.masked, seen.masked)
        assert torch.equal(seen_cut.clipped, seen.clipped)
    if objective.get("correction") not in (None, "tis"):
        assert 0 < int(seen.masked.sum()) < len(seen.masked), "the correction must act for this to mean anything"


def test_order_of_groups_and_of_responses_does_not_change_the_gradient(make_learner):
    batch = make_batch(2)
    advantages = np.linspace(-1, 1, 24).astype(np.float32)
    expected, _, _ = gradient_of(make_learner, batch, advantages=advantages.tolist())
    shuffled, moved = [], []
    for g in (3, 0, 5, 1, 4, 2):
        group = batch[g].group
        order = [2, 0, 3, 1]
        shuffled.append(
            make_group(group.prompt.token_ids, [group.rollouts[i] for i in order], batch[g].score.rewards[order], g)
        )
        moved += [float(advantages[4 * g + i]) for i in order]
    found, _, _ = gradient_of(make_learner, shuffled, advantages=moved)
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


def test_untrained_tokens_shape_the_prefix_but_carry_no_gradient(make_learner):
    trained = [True, False, False, True]
    base = make_rollout([5, 6, 7, 1], mask=trained, behavior=[-1, -1, -1, -1])
    odd = make_rollout([5, 6, 7, 1], mask=trained, behavior=[-1, float("nan"), float("inf"), -1])
    other = make_rollout([5, 8, 8, 1], mask=trained, behavior=[-1, -1, -1, -1])
    gradients = [
        gradient_of(make_learner, [make_group([3, 4], [rollout], [1.0])], advantages=[1.0])[0]
        for rollout in (base, odd, other)
    ]
    assert torch.equal(gradients[0], gradients[1])
    assert not torch.allclose(gradients[0], gradients[2], rtol=1e-2)


def test_mini_batches_partition_the_groups_and_depend_on_seed_and_version():
    flat = flatten(make_batch(3, groups=7), None)

    def members(seed: int, version: int) -> list[list[int]]:
        config = LearnerConfig(updates_per_batch=3, micro_batch_tokens=32, row_tokens=16)
        return [
            sorted(int(i) for micro in mini.packing.micro_batches for i in micro.responses)
            for mini in divide(flat, config, max_tokens=8, seed=seed, version=version)
        ]

    parts = members(0, 0)
    assert len(parts) == 3
    assert sorted(i for part in parts for i in part) == list(range(28))
    owner = flat.group_index.tolist()
    groups = [{owner[i] for i in part} for part in parts]
    assert sum(map(len, groups)) == 7, "no group is divided"
    assert parts == members(0, 0) != members(0, 1)
    assert parts != members(1, 0)


def test_totals_belong_to_the_mini_batch():
    flat = flatten(make_batch(4), None)
    minis = divide(flat, LearnerConfig(updates_per_batch=2, micro_batch_tokens=16), max_tokens=9, seed=0, version=0)
    assert sum(mini.totals.tokens for mini in minis) == flat.trained_tokens
    assert [mini.totals.responses for mini in minis] == [12, 12]
    assert {mini.totals.max_tokens for mini in minis} == {9}
    for mini in minis:
        assert mini.totals.tokens == sum(len(m.token_ids) for m in mini.packing.micro_batches)
