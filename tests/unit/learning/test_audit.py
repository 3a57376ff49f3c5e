"""The audit's gradients are the learner's and the exact ones, and its cosine says what it should."""

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rlsys.errors import NonFiniteError, RewardError
from rlsys.learning.audit import AuditResult, Gradient, GradientAudit, dot, kept_of
from rlsys.learning.learner import Learner
from rlsys.learning.policy import load_policy, load_tokenizer
from rlsys.records import ScoredGroup
from tests.unit.learning.enumerated import (
    LONGEST,
    log_probabilities,
    make_config,
    make_policy_directory,
    make_prompts,
    responses,
    reward,
    reward_of,
    scored,
)
from tests.unit.learning.samples import make_batch, make_group, make_rollout

PROMPTS = make_prompts((2,), (3, 2, 3), (2, 2), (3, 3, 2, 3))


@pytest.fixture(scope="session")
def directory(tmp_path_factory, tiny_config) -> Path:
    return make_policy_directory(tmp_path_factory.mktemp("fresh"), tiny_config(), 5)


@pytest.fixture(scope="session")
def other(tmp_path_factory, directory) -> Path:
    """A policy that the first has left behind: its matrices, each moved at random by 0.4 of its size; χ² about 1."""
    path = tmp_path_factory.mktemp("stale")
    policy = load_policy(directory, "float32")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.dim() > 1:
                parameter.add_(0.4 * parameter.std() * torch.randn(parameter.shape, generator=generator))
    policy.model.save_pretrained(path)
    load_tokenizer(directory).save_pretrained(path)
    return path


def flat(gradient: Gradient) -> torch.Tensor:
    return torch.cat([part.flatten() for part in gradient if part is not None])


def cosine(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left @ right) / (left.norm() * right.norm()))


# --- the gradients


OBJECTIVES = [
    {"name": "ppo_clip"},
    {"name": "ppo_clip", "correction": {"name": "m2", "tau": 0.3}},
    {"name": "is_token", "correction": "tis"},
    {"name": "decoupled_ppo", "correction": "tis"},
    {"name": "is_sequence", "reduce": "constant"},
    {"name": "gspo", "correction": "mask_sequence", "reduce": "sequence_mean"},
    {"name": "cispo", "correction": "mask_token"},
    {"name": "raft"},
]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: f"{o['name']}-{o.get('correction', 'none')}")
@pytest.mark.parametrize("micro_batch_tokens", [8192, 24])
def test_the_stale_gradient_is_the_one_the_learner_steps_on(tiny, objective, micro_batch_tokens):
    """The learner's first moments after its first step are (1 − β₁) times the gradient it did not have to clip."""
    config = make_config(
        "rollout.max_new_tokens=8",
        "learner.grad_clip=1000000.0",
        f"learner.micro_batch_tokens={micro_batch_tokens}",
        objective=objective,
        advantage={"name": "rloo"},
    )
    batch = make_batch(1, groups=7)
    learner = Learner.of(config, tiny)
    update = learner.update(batch)
    state = learner.state().tensors
    names = [name for name, _ in learner.policy.model.named_parameters()]
    expected = torch.cat([(state[f"{name}/exp_avg"] / 0.1).flatten() for name in names])
    found = flat(GradientAudit(config, tiny).gradient(batch))
    scale = float(expected.abs().max())
    assert scale > 0.01
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-5 * scale)
    assert float(found.norm()) == pytest.approx(update.step.metrics["policy/grad_norm"], rel=1e-4)


def test_the_stale_gradient_has_no_kl_term(tiny):
    batch = make_batch(2)
    plain, penalised = (
        flat(GradientAudit(make_config("rollout.max_new_tokens=8", kl={"coef": coef}), tiny).gradient(batch))
        for coef in (0.0, 5.0)
    )
    assert torch.equal(plain, penalised)


def test_an_audit_leaves_parameters_and_their_gradients_alone(directory):
    audit = GradientAudit(make_config(), directory)
    before = {name: tensor.clone() for name, tensor in audit.policy.named_tensors()}
    audit.measure(scored(audit.sample(PROMPTS, 4, seed=1)), reward, version=0, seed=0)
    assert all(torch.equal(before[name], tensor) for name, tensor in audit.policy.named_tensors())
    assert all(parameter.grad is None for parameter in audit.policy.model.parameters())


def exact_gradient(audit: GradientAudit, prompt: tuple[int, ...]) -> torch.Tensor:
    """−∇ Σ_y π(y) r(y) / L: the loss of `constant` is minus the expected reward over the longest length."""
    rollouts = [make_rollout(y) for y in responses()]
    cut = [
        replace(r, finish_reason="stop" if y[-1] == 1 else "length") for r, y in zip(rollouts, responses(), strict=True)
    ]
    rewards = torch.tensor([reward_of(rollout) for rollout in cut])
    loss = -(log_probabilities(audit.policy, prompt).exp() * rewards).sum() / LONGEST
    gradients = torch.autograd.grad(loss, list(audit.policy.model.parameters()))
    return torch.cat([gradient.flatten() for gradient in gradients])


@pytest.mark.parametrize("objective", ["ppo_clip", "reinforce", "is_sequence", "cispo"])
def test_with_more_samples_the_fresh_gradient_approaches_the_exact_one(directory, objective):
    """`rloo` with `constant` is unbiased, so that only noise is left, and it falls with √n."""
    config = make_config(objective={"name": objective, "reduce": "constant"}, advantage={"name": "rloo"})
    audit = GradientAudit(config, directory)
    prompt = PROMPTS[1]
    exact = exact_gradient(audit, prompt.token_ids)
    errors = []
    for samples in (100, 10_000):
        found = flat(audit.gradient(scored(audit.sample([prompt], samples, seed=2)), fresh=True))
        errors.append(float((found - exact).norm() / exact.norm()))
    assert errors[1] < 0.1
    assert errors[1] < errors[0] / 4
    assert cosine(found, exact) > 0.995


# --- what the audit says


def known(value: float | None) -> float:
    assert value is not None
    return value


def mean(values: Iterable[float | None]) -> float:
    return float(np.mean([known(value) for value in values]))


def test_an_on_policy_batch_is_as_near_to_the_fresh_gradient_as_fresh_ones_to_each_other(directory):
    audit = GradientAudit(make_config("rollout.samples_per_prompt=6"), directory)
    results = [
        audit.measure(scored(audit.sample(PROMPTS, 6, seed=1000 + seed)), reward, version=0, seed=seed)
        for seed in range(60)
    ]
    floor = mean(result.cosine_floor for result in results)
    assert 0.3 < floor < 0.95, "noise and signal must both be there for this to mean anything"
    differences = np.array([known(result.cosine) - known(result.cosine_floor) for result in results])
    assert abs(differences.mean()) < 3 * differences.std(ddof=1) / math.sqrt(len(differences))
    assert mean(result.norm_ratio for result in results) == pytest.approx(1.0, abs=0.1)
    assert kept_of(results) == pytest.approx(1.0, abs=0.1)


def test_the_sequence_weight_restores_what_staleness_took_from_an_uncorrected_batch(directory, other):
    """With many samples the floor is near 1. `is_sequence` is unbiased: it keeps everything, off-policy too."""
    cosine, floor, kept = dict[str, float](), dict[str, float](), dict[str, float]()
    behavior = GradientAudit(make_config(), other)
    batches = [scored(behavior.sample(PROMPTS, 400, seed=1000 + seed)) for seed in range(4)]
    for objective in ("is_sequence", "reinforce"):
        config = make_config(
            "rollout.samples_per_prompt=400",
            objective={"name": objective, "reduce": "constant"},
            advantage={"name": "rloo"},
        )
        audit = GradientAudit(config, directory)
        results = [audit.measure(batch, reward, version=0, seed=seed) for seed, batch in enumerate(batches)]
        cosine[objective] = mean(result.cosine for result in results)
        floor[objective] = mean(result.cosine_floor for result in results)
        kept[objective] = known(kept_of(results))
    assert floor["is_sequence"] == pytest.approx(floor["reinforce"], abs=1e-4)
    assert floor["reinforce"] > 0.99
    assert cosine["reinforce"] < floor["reinforce"] - 0.02
    assert kept["reinforce"] < 0.85
    assert cosine["is_sequence"] > floor["is_sequence"] - 0.01
    assert kept["is_sequence"] == pytest.approx(1.0, abs=0.07)


def test_reversed_advantages_point_away_from_the_fresh_gradient(directory):
    audit = GradientAudit(make_config(), directory)
    batch = [
        ScoredGroup(group=one.group, score=replace(one.score, rewards=-one.score.rewards))
        for one in scored(audit.sample(PROMPTS, 64, seed=3))
    ]
    result = audit.measure(batch, reward, version=0, seed=0, samples=64)
    assert known(result.cosine) < -0.5
    assert known(result.kept) < -0.5
    assert known(result.cosine_floor) > 0.5


def test_a_batch_without_a_signal_has_no_cosine(directory):
    audit = GradientAudit(make_config(), directory)
    batch = [
        ScoredGroup(group=one.group, score=replace(one.score, rewards=np.ones_like(one.score.rewards)))
        for one in scored(audit.sample(PROMPTS, 4, seed=3))
    ]
    result = audit.measure(batch, reward, version=0, seed=0)
    assert result.metrics()["audit/cosine"] is None
    assert result.metrics()["audit/norm_ratio"] == 0
    assert known(result.cosine_floor) > 0


def test_a_batch_that_the_learner_would_refuse_is_refused(directory):
    audit = GradientAudit(make_config(), directory)
    batch = scored(audit.sample(PROMPTS, 8, seed=3))
    batch[0].group.rollouts[0].behavior_logprobs[0] = np.nan
    with pytest.raises(NonFiniteError, match="not finite"):
        audit.measure(batch, reward, version=0, seed=0)


def test_what_is_no_number_is_reported_as_unknown():
    result = AuditResult(gg=math.inf, ga=1.0, gb=1.0, aa=1.0, ab=0.5, bb=1.0)
    assert result.metrics() == {"audit/cosine": 0.0, "audit/norm_ratio": None, "audit/cosine_floor": 0.5}
    result = AuditResult(gg=math.inf, ga=math.inf, gb=1.0, aa=1.0, ab=0.5, bb=1.0)
    assert result.metrics()["audit/cosine"] is None


def test_groups_without_a_trained_token_are_refused(directory):
    silent = make_rollout([3, 1], mask=[False, False])
    with pytest.raises(ValueError, match="no trained token"):
        GradientAudit(make_config(), directory).gradient([make_group([3], [silent, silent], [1.0, 0.0])])


def test_fresh_samples_differ_by_side_seed_and_version_and_are_scored_by_the_given_reward(directory):
    audit = GradientAudit(make_config(), directory)
    batch = scored(audit.sample(PROMPTS, 8, seed=3))
    results = [audit.measure(batch, reward, version=v, seed=s) for v, s in ((0, 0), (0, 0), (1, 0), (0, 1))]
    assert results[0] == results[1]
    assert len({result.ab for result in results}) == 3
    assert results[0].ga != results[0].gb

    def broken(group):
        raise RewardError("no reward")

    with pytest.raises(RewardError, match="no reward"):
        audit.measure(batch, broken, version=0, seed=0)


def test_the_numbers_follow_from_the_inner_products():
    """g = (3, 0), a = (1, 1), b = (1, −0.5): angles of 45° and atan(1/2)."""
    g, a, b = ([torch.tensor(v), None] for v in ([3.0, 0.0], [1.0, 1.0], [1.0, -0.5]))
    result = AuditResult(gg=dot(g, g), ga=dot(g, a), gb=dot(g, b), aa=dot(a, a), ab=dot(a, b), bb=dot(b, b))
    assert result.cosine == pytest.approx((math.cos(math.pi / 4) + math.cos(math.atan(0.5))) / 2)
    assert result.cosine_floor == pytest.approx(0.5 / math.sqrt(2 * 1.25))
    assert result.norm_ratio == pytest.approx(3 / math.sqrt(math.sqrt(2) * math.sqrt(1.25)))
    assert result.kept == pytest.approx(3 / 0.5)
    opposite = replace(result, ab=-0.5)
    assert opposite.kept is None
    assert kept_of([result, result, opposite]) == pytest.approx(9 / 0.5)
