"""The learner: one batch in, one version on.

    groups ─ flatten ─ staleness within the bound? ─ [log π_V, when something global needs it]
           ─ rewards (− β·KL) ─ advantages ─ for each mini-batch: pack ─ Σ micro-batches ∇ ─ clip ─ AdamW

All normalisers belong to the mini-batch as a whole, so how it is divided into micro-batches, or among `Ranks`,
changes nothing. `version` counts batches applied; everything random is a function of (seed, version).
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from rlsys.algo.advantages import AdvantageOutput, compute_advantages
from rlsys.algo.divergence import KL_SCHEDULES, kl_rewards
from rlsys.config.schema import AdvantageConfig, KLConfig, LearnerConfig, ModelConfig, ObjectiveConfig, RunConfig
from rlsys.errors import CheckpointError, ConfigError, NonFiniteError
from rlsys.learning.batch import FlatBatch, flatten
from rlsys.learning.gradient import MiniBatch, StepInputs, accumulate, divide, score
from rlsys.learning.metrics import Metrics, TokenResults, finite, step_metrics
from rlsys.learning.optimizer import Optimizer, learning_rate
from rlsys.learning.policy import Policy, load_policy
from rlsys.learning.ranks import ALONE, Ranks
from rlsys.learning.surrogate import Surrogate
from rlsys.records import BatchArrays, FloatArray, LearnerStep, ScoredGroup
from rlsys.versions import PolicyVersion


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerUpdate:
    """What `update` returns: the step for the controller, the arrays for the recorder, how well packing worked.

    `fill` is the share of computed columns that held a token; `sharing` the prompt and response tokens of the
    batch for every token computed.
    """

    step: LearnerStep
    arrays: BatchArrays
    fill: float
    sharing: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerState:
    """All a learner is beyond its parameters. Randomness needs no state: it follows from seed and version.

    Of several ranks the first has all tensors, the others none.
    """

    version: PolicyVersion
    seed: int
    kl_coef: float
    refused: int
    tensors: Mapping[str, Tensor] = field(repr=False)


class Learner:
    """Owns the policy's parameters and turns scored groups into better ones.

    With several `ranks` it is one in each process: `update` with the same batch, `state` and `named_tensors` have to
    be called on all of them.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        model: ModelConfig,
        learner: LearnerConfig,
        objective: ObjectiveConfig,
        advantage: AdvantageConfig,
        kl: KLConfig,
        temperature: float,
        staleness_max: int,
        max_new_tokens: int,
        seed: int = 0,
        device: str = "cpu",
        ranks: Ranks = ALONE,
    ) -> None:
        """Load the policy in `path`. `max_new_tokens` is the L of the `constant` reduction.

        `temperature` is the sampling temperature, so that both sides mean the same distribution.
        """
        self.policy: Policy = load_policy(
            path,
            model.dtype,
            device="cpu" if ranks.sharded else device,  # whole, it need not fit where its shards go
            gradient_checkpointing=learner.gradient_checkpointing,
        )
        self.ranks = ranks
        ranks.shard(self.policy)
        self._config, self._objective, self._advantage, self._kl = learner, objective, advantage, kl
        self._temperature, self._bound, self._max_tokens = temperature, staleness_max, max_new_tokens
        self._surrogate = Surrogate(objective, kl)
        self._optimizer = Optimizer(self.policy.model, learner, ranks)
        self._seed, self._refused, self._kl_coef, self._version = seed, 0, kl.coef, 0

    @classmethod
    def of(cls, config: RunConfig, path: str | Path, *, device: str = "cpu", ranks: Ranks = ALONE) -> "Learner":
        """The learner of a run, from the policy in `path`."""
        return cls(
            path,
            model=config.model,
            learner=config.learner,
            objective=config.objective,
            advantage=config.advantage,
            kl=config.kl,
            temperature=config.rollout.temperature,
            staleness_max=config.staleness.max,
            max_new_tokens=config.rollout.max_new_tokens,
            seed=config.seed,
            device=device,
            ranks=ranks,
        )

    @property
    def version(self) -> PolicyVersion:
        """Batches applied so far."""
        return self._version

    def update(
        self, groups: Sequence[ScoredGroup], reference_logprobs: Sequence[FloatArray] | None = None
    ) -> LearnerUpdate:
        """Train on one batch. `reference_logprobs`: [T] per response, groups in order, rollouts in order.

        Raises StalenessViolation, before any gradient, for a trained token older than the bound; ValueError for
        a batch without trained tokens; ConfigError when a KL term lacks its reference; NonFiniteError after
        `max_nonfinite_steps` refusals in a row. A refused batch changes nothing: `applied=False`, same version.
        """
        started = time.perf_counter()
        batch = flatten(groups, reference_logprobs)
        staleness = batch.staleness(self._version, self._bound)
        if not batch.trained_tokens:
            raise ValueError("the batch has no trained token: every response is empty or masked")
        if self._kl_coef > 0 and batch.reference_logprobs is None:
            raise ConfigError(f"kl.coef={self._kl_coef} needs reference log-probabilities with every batch")
        minis = divide(
            batch,
            self._config,
            max_tokens=self._max_tokens,
            seed=self._seed,
            version=self._version,
            ranks=self.ranks,
        )
        start = self._step_start(batch, minis)
        advantage = self._advantages(batch, start)
        lr, kl_coef = learning_rate(self._config, self._version), self._kl_coef
        results, norms, loss = self._train(batch, minis, start, advantage.advantages, lr)
        fed, padded, sequence_tokens = (
            sum(getattr(mini.packing, name) for mini in minis)
            for name in ("fed_tokens", "padded_tokens", "sequence_tokens")
        )
        metrics: Metrics = {
            **step_metrics(batch, results, staleness, advantage, bound=self._bound, cap=self._surrogate.truncation_cap),
            "kl/coef": kl_coef,
            "policy/grad_norm": sum(norms) / len(norms),
            "policy/loss": loss,
            "policy/lr": lr,
            "policy/packing_fill": fed / padded,
        }
        applied = self._settle(all(map(math.isfinite, norms)), metrics, batch.responses)
        step = LearnerStep(
            version=self._version,
            applied=applied,
            metrics=finite(metrics),
            trained_tokens=sequence_tokens,
            seconds=time.perf_counter() - started,
        )
        arrays = _arrays(batch, results, advantage.advantages)
        return LearnerUpdate(step=step, arrays=arrays, fill=fed / padded, sharing=sequence_tokens / fed)

    def state(self) -> LearnerState:
        """What `load_state` needs beside the parameters; the tensors are the optimizer's own, or gathered."""
        return LearnerState(
            version=self._version,
            seed=self._seed,
            kl_coef=self._kl_coef,
            refused=self._refused,
            tensors=dict(self.ranks.whole(self._optimizer.state().items())),
        )

    def load_state(self, state: LearnerState) -> None:
        """Continue where `state` was taken, on a learner loaded from the parameters saved with it."""
        if state.seed != self._seed:
            raise CheckpointError(f"the checkpoint belongs to a run with seed {state.seed}, not {self._seed}")
        self._optimizer.load_state(state.tensors)
        self._version, self._kl_coef, self._refused = state.version, state.kl_coef, state.refused

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, tensor) to publish; tied tensors once (see `tied_names`). On the first rank, whole."""
        return self.ranks.whole(self.policy.named_tensors())

    def tied_names(self) -> Mapping[str, str]:
        """Names left out of `named_tensors` and the name whose tensor each shares."""
        return self.policy.tied_names()

    def _step_start(self, batch: FlatBatch, minis: Sequence[MiniBatch]) -> Tensor | None:
        """log π_V of all tokens, [N], by a pass of its own; None when nothing needs it in advance.

        In a single update log π_V is log π_θ detached, and but for `m2` a correction needs one response only.
        """
        needed = (
            len(minis) > 1
            or (self._surrogate.correction_needs_batch and minis[0].packing.passes > 1)
            or (self._kl.placement == "reward" and self._kl_coef > 0)
        )
        if not needed:
            return None
        start = score(self.policy, minis, len(batch.response_index), self._temperature)
        self.ranks.sum_(start)
        return start

    def _advantages(self, batch: FlatBatch, start: Tensor | None) -> AdvantageOutput:
        """One advantage per response, [G], from rewards with the KL term where it is placed there."""
        divergence = None
        if self._kl.placement == "reward" and self._kl_coef > 0:
            assert start is not None
            assert batch.reference_logprobs is not None
            divergence = kl_rewards(
                start.cpu(),
                batch.reference_logprobs,
                batch.loss_mask,
                batch.response_index,
                batch.responses,
                self._kl_coef,
            )
        name = advantage_name(self._objective, self._advantage)
        return compute_advantages(name, batch.rewards, batch.group_index, kl_rewards=divergence)

    def _train(
        self, batch: FlatBatch, minis: Sequence[MiniBatch], start: Tensor | None, advantages: Tensor, lr: float
    ) -> tuple[TokenResults, list[float], float]:
        """One optimizer step per mini-batch; all undone when any is not finite. Returns norms and mean loss too."""
        device = self.policy.device
        on_device = batch.to(device)
        inputs = StepInputs(
            batch=on_device,
            advantages=advantages.to(device)[on_device.response_index],
            step_start_logprobs=start,
            correction=None if start is None else self._surrogate.correction_of_batch(on_device, start),
            kl_coef=self._kl_coef,
        )
        results = TokenResults.empty(len(batch.response_index), device)
        backup = self._optimizer.snapshot() if len(minis) > 1 else None
        norms, losses = [], []
        for mini in minis:
            loss = accumulate(self.policy, self._optimizer, self._surrogate, inputs, mini, results, self._temperature)
            self.ranks.sum_(loss)
            losses.append(float(loss))
            norms.append(self._optimizer.step(lr) if math.isfinite(losses[-1]) else math.nan)
            if not math.isfinite(norms[-1]):
                self._optimizer.discard()
                if backup is not None:
                    self._optimizer.restore(backup)
                break
        results.complete_(self.ranks)
        if start is not None:  # known also where training did not come to
            results.step_start_logprobs.copy_(start)
        return results.cpu(), norms, sum(losses) / len(losses)

    def _settle(self, applied: bool, metrics: Metrics, responses: int) -> bool:
        """Count the batch as applied, or as refused and, at the limit, give up. Returns `applied`."""
        if not applied:
            self._refused += 1
            if self._refused >= self._config.max_nonfinite_steps:
                before = "those before the last one are in rollouts/refused-*.parquet"
                if self._refused == 1:
                    before = "with learner.max_nonfinite_steps above 1 it would be in rollouts/refused-*.parquet"
                raise NonFiniteError(
                    f"{self._refused} learner batches in a row had a non-finite loss or gradient; the policy stays at "
                    f"version {self._version}. Look for a log-probability or reward that is NaN, or a learning rate "
                    f"too high; {before}"
                )
            return False
        self._refused = 0
        self._version += 1
        kl = metrics["kl/sequence_mean"]
        self._kl_coef = next_kl_coef(self._kl, self._kl_coef, self._version, self._config.steps, kl, responses)
        return True


def advantage_name(objective: ObjectiveConfig, advantage: AdvantageConfig) -> str:
    """The estimator in use. `raft` trains on accepted responses: its advantage is acceptance, whatever is set."""
    return "accepted" if objective.name == "raft" else advantage.name


def next_kl_coef(
    kl: KLConfig, coef: float, version: PolicyVersion, steps: int, sequence_kl: float | None, responses: int
) -> float:
    """β for the batch after `version`. `adaptive` gains K = min(1, responses/horizon) per batch (Ziegler 2019).

    It stays where it is after a batch whose KL is unknown.
    """
    options: dict[str, float] = {}
    if kl.schedule == "linear":
        options = {"initial": kl.coef, "final": kl.final_coef, "steps": steps}
    elif kl.schedule == "adaptive":
        if sequence_kl is None:
            return coef
        options = {"target": kl.target, "gain": min(1.0, responses / kl.horizon)}
    return KL_SCHEDULES[kl.schedule](coef, step=version, sequence_kl=sequence_kl or 0.0, **options)


def _arrays(batch: FlatBatch, results: TokenResults, advantages: Tensor) -> BatchArrays:
    reference = batch.reference_logprobs
    return BatchArrays(
        offsets=batch.offsets,
        policy_logprobs=results.policy_logprobs.numpy(),
        step_start_logprobs=results.step_start_logprobs.numpy(),
        reference_logprobs=None if reference is None else reference.numpy(),
        clipped=results.clipped.numpy(),
        masked=results.masked.numpy(),
        advantages=advantages.numpy(),
    )
