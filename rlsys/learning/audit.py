"""The gradient audit: the stale, corrected gradient of a batch against fresh on-policy ones at the same parameters.

All at π_V, the policy the batch was trained from, and for the same prompts:

    g      the run's surrogate (objective, correction, its advantages) on the batch as it was, before any clipping
    a, b   the same surrogate on responses sampled from π_V itself, twice, independently: every ratio is 1, so it is
           the on-policy score-function gradient Σ A ∇log π under the run's own advantages and reduction

Each is its mean plus independent sampling noise: g = s + …, a = m + …, b = m + …. Hence

    E⟨g, a⟩ = ⟨s, m⟩        E⟨a, b⟩ = |m|²        but        E|a|² = |m|² + noise

so that the cosine of two gradients is below 1 by noise alone, however fresh they are. How to read the numbers:

`cosine_floor`  cos(a, b) → |m|²/(|m|² + noise): what noise leaves of a perfect 1. Near 0 the audit sees noise only;
                take more prompts or samples.
`cosine`        the mean of cos(g, a) and cos(g, b). With as many samples a prompt on both sides, an on-policy batch
                makes g, a and b exchangeable, and the expected cosine is exactly the floor. Below the floor is what
                staleness and its correction cost in direction. cosine/cosine_floor estimates cos(s, m) if g is as
                noisy, for its length, as a and b (Spearman's correction for attenuation, 1904).
`norm_ratio`    |g|/√(|a||b|): what clipping, masking and truncation cost in length, or heavy weights add in noise.
`kept`          ⟨g, (a + b)/2⟩/⟨a, b⟩ → ⟨s, m⟩/|m|²: how much of the on-policy gradient is still in the stale one,
                whatever the noise of either: both inner products are unbiased. Their ratio is not, when the floor
                is low; over several audits divide sums (`kept_of`). It is about norm_ratio·cosine/cosine_floor.

The KL term is left out of both sides. It is no estimate of the reward's gradient but a penalty with the same
reference and nearly the same value on both, and a vector added to both sides lifts the cosine without the data
being any fresher; besides, nothing then needs the reference policy. Several updates on a batch are audited as the
one at their start. `m2` and `batch_whiten`, properties of a whole batch, see the audited groups only.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from rlsys.algo.advantages import compute_advantages
from rlsys.config.schema import KLConfig, RunConfig
from rlsys.errors import NonFiniteError
from rlsys.learning.batch import flatten
from rlsys.learning.gradient import StepInputs, accumulate, divide, score
from rlsys.learning.learner import advantage_name
from rlsys.learning.metrics import Metrics, TokenResults, finite
from rlsys.learning.policy import load_policy, load_tokenizer
from rlsys.learning.sampling import sample_groups
from rlsys.learning.surrogate import Surrogate
from rlsys.records import GroupScore, Prompt, RolloutGroup, ScoredGroup
from rlsys.versions import PolicyVersion

Gradient = list[Tensor | None]
"""One float32 tensor per parameter, in the model's order; None where nothing depends on it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditResult:
    """Inner products of the stale gradient g and two fresh ones, a and b; everything else follows from them.

    A cosine with a gradient of 0 (no group with a signal) is None, not 0.
    """

    gg: float
    ga: float
    gb: float
    aa: float
    ab: float
    bb: float

    @property
    def cosine(self) -> float | None:
        """Mean of cos(g, a) and cos(g, b)."""
        first, second = _cosine(self.ga, self.gg, self.aa), _cosine(self.gb, self.gg, self.bb)
        return None if first is None or second is None else (first + second) / 2

    @property
    def cosine_floor(self) -> float | None:
        """cos(a, b)."""
        return _cosine(self.ab, self.aa, self.bb)

    @property
    def norm_ratio(self) -> float | None:
        """|g|/√(|a||b|)."""
        fresh = math.sqrt(self.aa * self.bb)
        return math.sqrt(self.gg / fresh) if fresh > 0 else None

    @property
    def kept(self) -> float | None:
        """⟨g, (a + b)/2⟩/⟨a, b⟩; None where noise has made the denominator negative."""
        return kept_of([self])

    def metrics(self) -> Metrics:
        """By catalogue name; None for what is not a finite number."""
        return finite(
            {
                "audit/cosine": self.cosine,
                "audit/norm_ratio": self.norm_ratio,
                "audit/cosine_floor": self.cosine_floor,
            }
        )


def kept_of(results: Iterable[AuditResult]) -> float | None:
    """Σ⟨g, (a + b)/2⟩ / Σ⟨a, b⟩ over audits: a ratio of sums, which their noise hardly biases. None if Σ⟨a, b⟩ ≤ 0."""
    results = list(results)
    shared = sum(result.ab for result in results)
    return sum(result.ga + result.gb for result in results) / 2 / shared if shared > 0 else None


class GradientAudit:
    """Holds a policy and takes gradients on it as the run's learner would, without ever stepping.

    Three gradients are in memory at once, in float32, beside the parameters. On a policy below float32 the sampler's
    cached decoding and the learner's packed forward differ by rounding; the fresh ratios are 1 all the same, because
    the packed forward's own log-probabilities stand for the behaviour's.
    """

    def __init__(self, config: RunConfig, path: str | Path, *, device: str = "cpu") -> None:
        """The policy in `path`, any version of the run's; its parameters may be overwritten between audits."""
        self.policy = load_policy(
            path,
            config.model.dtype,
            device=device,
            gradient_checkpointing=config.learner.gradient_checkpointing,
        )
        self._tokenizer = load_tokenizer(path)
        self._learner = config.learner.model_copy(update={"updates_per_batch": 1})
        self._rollout = config.rollout
        self._advantage = advantage_name(config.objective, config.advantage)
        self._surrogate = Surrogate(config.objective, KLConfig())

    def measure(
        self,
        groups: Sequence[ScoredGroup],
        reward: Callable[[RolloutGroup], GroupScore],
        *,
        version: PolicyVersion,
        seed: int,
        samples: int | None = None,
    ) -> AuditResult:
        """Audit `groups` of the batch trained at `version`, whose policy this is; `reward` scores what is sampled.

        `samples`: fresh responses a prompt, twice; None: as many as the run samples.
        """
        prompts = [scored.group.prompt for scored in groups]
        samples = self._rollout.samples_per_prompt if samples is None else samples
        first, second = (
            [
                ScoredGroup(group=group, score=reward(group))
                for group in self.sample(prompts, samples, version=version, seed=derived)
            ]
            for derived in _seeds(seed, version, 2)
        )
        return self.audit(groups, first, second)

    def sample(
        self, prompts: Sequence[Prompt], samples: int, *, seed: int, version: PolicyVersion = 0
    ) -> list[RolloutGroup]:
        """Responses as the run samples them, from the policy as it is."""
        return sample_groups(
            self.policy,
            self._tokenizer,
            prompts,
            samples=samples,
            max_new_tokens=self._rollout.max_new_tokens,
            temperature=self._rollout.temperature,
            seed=seed,
            version=version,
            micro_batch_tokens=self._learner.micro_batch_tokens,
        )

    def audit(
        self, groups: Sequence[ScoredGroup], fresh_a: Sequence[ScoredGroup], fresh_b: Sequence[ScoredGroup]
    ) -> AuditResult:
        """Compare the gradient of `groups` with those of two independent sets of responses of this policy."""
        g, a, b = self.gradient(groups), self.gradient(fresh_a, fresh=True), self.gradient(fresh_b, fresh=True)
        return AuditResult(gg=dot(g, g), ga=dot(g, a), gb=dot(g, b), aa=dot(a, a), ab=dot(a, b), bb=dot(b, b))

    def gradient(self, groups: Sequence[ScoredGroup], *, fresh: bool = False) -> Gradient:
        """∇ of the surrogate's loss over `groups` as one mini-batch: what the learner has before it clips the norm.

        `fresh`: the responses are this policy's own, so μ = π_V. Raises ValueError for groups without a trained token,
        NonFiniteError for those that the learner would refuse.
        """
        flat = flatten(groups, None)
        minis = divide(flat, self._learner, max_tokens=self._rollout.max_new_tokens, seed=0, version=0)
        if not minis:
            raise ValueError("the audited groups have no trained token: every response is empty or masked")
        start = score(self.policy, minis, len(flat.response_index), self._rollout.temperature)
        advantages = compute_advantages(self._advantage, flat.rewards, flat.group_index).advantages
        batch = flat.to(self.policy.device)
        if fresh:
            batch = replace(batch, behavior_logprobs=start)
        inputs = StepInputs(
            batch=batch,
            advantages=advantages.to(start.device)[batch.response_index],
            step_start_logprobs=start,
            correction=self._surrogate.correction_of_batch(batch, start),
            kl_coef=0.0,
        )
        total = _Total(self.policy.model)
        results = TokenResults.empty(len(start), start.device)
        loss = accumulate(self.policy, total, self._surrogate, inputs, minis[0], results, self._rollout.temperature)
        if not math.isfinite(loss):
            raise NonFiniteError("the loss of the audited groups is not finite")
        return total.gradient


class _Total:
    """A `Collector` that takes the gradients away from the parameters."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.gradient: Gradient = [None] * len(self._parameters)

    def collect(self) -> None:
        for i, parameter in enumerate(self._parameters):
            if parameter.grad is not None:
                before, found = self.gradient[i], parameter.grad.float()
                self.gradient[i] = found if before is None else before.add_(found)
                parameter.grad = None


def dot(left: Gradient, right: Gradient) -> float:
    """⟨left, right⟩ over all parameters, in float64."""
    return sum(
        float((x.double() * y.double()).sum())
        for x, y in zip(left, right, strict=True)
        if x is not None and y is not None
    )


def _cosine(product: float, left: float, right: float) -> float | None:
    """product/√(left·right) of squared lengths; None where one is 0."""
    return product / math.sqrt(left * right) if left * right > 0 else None


def _seeds(seed: int, version: PolicyVersion, count: int) -> list[int]:
    """Independent seeds of a version's samples."""
    drawn = np.random.SeedSequence((seed % (1 << 64), version)).generate_state(count, np.uint32)
    return [int(one) for one in drawn]
