"""The learner: one batch in, one version on.

    groups ─ flatten ─ staleness within the bound? ─ [log π_V, when something global needs it]
           ─ rewards (− β·KL) ─ advantages ─ for each mini-batch: pack ─ Σ micro-batches ∇ ─ clip ─ AdamW

All normalisers belong to the mini-batch as a whole, so how it is divided into micro-batches changes nothing.
`version` counts batches applied; everything random is a function of (seed, version).
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rlsys.algo.advantages import AdvantageOutput, compute_advantages
from rlsys.algo.batch import BatchTotals, TokenBatch
from rlsys.algo.corrections import Correction
from rlsys.algo.divergence import KL_SCHEDULES, kl_rewards
from rlsys.config.schema import AdvantageConfig, KLConfig, LearnerConfig, ModelConfig, ObjectiveConfig
from rlsys.errors import CheckpointError, ConfigError, NonFiniteError
from rlsys.learning.batch import BatchArrays, FlatBatch, flatten
from rlsys.learning.metrics import Metrics, TokenResults, finite, step_metrics
from rlsys.learning.optimizer import Optimizer, learning_rate
from rlsys.learning.packing import Packed, Packing, pack
from rlsys.learning.policy import Policy, load_policy
from rlsys.learning.surrogate import Surrogate
from rlsys.records import FloatArray, LearnerStep, ScoredGroup
from rlsys.versions import PolicyVersion


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerUpdate:
    """What `update` returns: the step for the controller, the arrays for the recorder, how well packing worked."""

    step: LearnerStep
    arrays: BatchArrays
    fill: float
    """Share of computed columns that held a token."""
    sharing: float
    """Prompt and response tokens standing in the batch per token computed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerState:
    """All a learner is beyond its parameters. Randomness needs no state: it follows from seed and version."""

    version: PolicyVersion
    seed: int
    kl_coef: float
    refused: int
    tensors: Mapping[str, Tensor] = field(repr=False)


@dataclass(frozen=True, slots=True)
class _Pass:
    """One mini-batch: its micro-batches and the normalisers of the whole."""

    packing: Packing
    totals: BatchTotals


class Learner:
    """Owns the policy's parameters and turns scored groups into better ones."""

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
    ) -> None:
        """`temperature` is the sampling temperature; `max_new_tokens` is the L of the `constant` reduction."""
        self.policy: Policy = load_policy(
            path, model.dtype, device=device, gradient_checkpointing=learner.gradient_checkpointing
        )
        self._config, self._objective, self._advantage, self._kl = learner, objective, advantage, kl
        self._temperature, self._bound, self._max_tokens = temperature, staleness_max, max_new_tokens
        self._surrogate = Surrogate(objective, kl)
        self._optimizer = Optimizer(self.policy.model, learner)
        self._seed, self._refused, self._kl_coef, self._version = seed, 0, kl.coef, 0

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
        passes = self._passes(batch)
        start = self._step_start(batch, passes)
        advantages = self._advantages(batch, start)
        results, norms = self._train(batch, passes, start, advantages.advantages)
        lr, kl_coef = learning_rate(self._config, self._version), self._kl_coef
        metrics: Metrics = {
            **step_metrics(
                batch, results, staleness, advantages.advantages, (advantages.zero_variance_groups, advantages.groups)
            ),
            "kl/coef": kl_coef,
            "policy/grad_norm": sum(norms) / len(norms),
            "policy/lr": lr,
        }
        applied = self._settle(all(map(math.isfinite, norms)), batch, metrics)
        step = LearnerStep(
            version=self._version,
            applied=applied,
            metrics=finite(metrics),
            trained_tokens=batch.trained_tokens,
            seconds=time.perf_counter() - started,
        )
        return LearnerUpdate(
            step=step,
            arrays=_arrays(batch, results, advantages.advantages),
            fill=sum(p.packing.fed_tokens for p in passes) / sum(p.packing.padded_tokens for p in passes),
            sharing=sum(p.packing.sequence_tokens for p in passes) / sum(p.packing.fed_tokens for p in passes),
        )

    def state(self) -> LearnerState:
        """What `load_state` needs beside the parameters; the tensors are the optimizer's own."""
        return LearnerState(
            version=self._version,
            seed=self._seed,
            kl_coef=self._kl_coef,
            refused=self._refused,
            tensors=self._optimizer.state(),
        )

    def load_state(self, state: LearnerState) -> None:
        """Continue where `state` was taken, on a learner loaded from the parameters saved with it."""
        if state.seed != self._seed:
            raise CheckpointError(f"the checkpoint belongs to a run with seed {state.seed}, not {self._seed}")
        self._optimizer.load_state(state.tensors)
        self._version, self._kl_coef, self._refused = state.version, state.kl_coef, state.refused

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, tensor) to publish; tied tensors once (see `tied_names`)."""
        return self.policy.named_tensors()

    def tied_names(self) -> Mapping[str, str]:
        """Names left out of `named_tensors` and the name whose tensor each shares."""
        return self.policy.tied_names()

    def _passes(self, batch: FlatBatch) -> list[_Pass]:
        """`updates_per_batch` mini-batches of whole groups (order drawn from seed and version), packed."""
        parts = [np.arange(batch.responses)]
        if self._config.updates_per_batch > 1:
            order = np.random.default_rng((self._seed, self._version)).permutation(len(batch.sequences.prompts))
            owner = batch.group_index.numpy()
            chosen = np.array_split(order, self._config.updates_per_batch)
            parts = [np.flatnonzero(np.isin(owner, groups)) for groups in chosen]
        passes = []
        lengths = torch.bincount(batch.response_index[batch.loss_mask], minlength=batch.responses)
        for members in parts:
            totals = BatchTotals(
                tokens=int(lengths[members].sum()),
                responses=int((lengths[members] > 0).sum()),
                max_tokens=self._max_tokens,
            )
            packing = pack(
                batch.sequences,
                row_tokens=self._config.row_tokens,
                micro_batch_tokens=self._config.micro_batch_tokens,
                members=members,
            )
            if totals.tokens:
                passes.append(_Pass(packing, totals))
        return passes

    def _step_start(self, batch: FlatBatch, passes: Sequence[_Pass]) -> Tensor | None:
        """log π_V of all tokens, [N], by a pass of its own; None when nothing needs it in advance.

        In a single update log π_V is log π_θ detached, and but for `m2` a correction needs one response only.
        """
        needs = (
            len(passes) > 1
            or (self._surrogate.correction_needs_batch and len(passes[0].packing.micro_batches) > 1)
            or (self._kl.placement == "reward" and self._kl_coef > 0)
        )
        if not needs:
            return None
        start = torch.zeros(len(batch.response_index), device=self.policy.device)
        with torch.no_grad():
            for micro in (m for p in passes for m in p.packing.micro_batches):
                micro = micro.to(self.policy.device)
                start[micro.token_index] = self.policy.token_logprobs(micro, self._temperature).logprobs
        return start

    def _advantages(self, batch: FlatBatch, start: Tensor | None) -> AdvantageOutput:
        """One advantage per response, [G], from rewards with the KL term where it is placed there.

        `raft` trains on accepted responses, so its advantage is acceptance whatever is configured.
        """
        rewards = batch.rewards
        if self._kl.placement == "reward" and self._kl_coef > 0:
            assert start is not None
            assert batch.reference_logprobs is not None
            rewards = rewards + kl_rewards(
                start.cpu(),
                batch.reference_logprobs,
                batch.loss_mask,
                batch.response_index,
                batch.responses,
                self._kl_coef,
            )
        name = "accepted" if self._objective.name == "raft" else self._advantage.name
        return compute_advantages(name, rewards, batch.group_index)

    def _train(
        self, batch: FlatBatch, passes: Sequence[_Pass], start: Tensor | None, advantages: Tensor
    ) -> tuple[TokenResults, list[float]]:
        """Gradients and optimizer steps; all undone when any is not finite. Returns the gradient norms."""
        batch = batch.to(self.policy.device)
        advantages = advantages.to(self.policy.device)[batch.response_index]
        results = TokenResults.empty(len(batch.response_index), self.policy.device)
        correction = None if start is None else self._surrogate.correction_of_batch(batch, start)
        backup = self._optimizer.snapshot() if len(passes) > 1 else None
        lr = learning_rate(self._config, self._version)
        norms: list[float] = []
        for mini in passes:
            loss = torch.zeros((), device=self.policy.device)
            for micro in mini.packing.micro_batches:
                loss += self._accumulate(batch, micro, mini.totals, start, correction, advantages, results)
            finite_loss = math.isfinite(float(loss))
            norms.append(self._optimizer.step(lr) if finite_loss else math.nan)
            if not math.isfinite(norms[-1]):
                self._optimizer.discard()
                if backup is not None:
                    self._optimizer.restore(backup)
                break
        return results.cpu(), norms

    def _accumulate(
        self,
        batch: FlatBatch,
        micro: Packed,
        totals: BatchTotals,
        start: Tensor | None,
        correction: Correction | None,
        advantages: Tensor,
        results: TokenResults,
    ) -> Tensor:
        """Forward, loss and backward of one micro-batch, noted in `results`. Returns its share of the loss."""
        micro = micro.to(self.policy.device)
        index = micro.token_index
        output = self.policy.token_logprobs(micro, self._temperature, with_entropy=True)
        assert output.entropy is not None
        tokens = TokenBatch(
            policy_logprobs=output.logprobs,
            behavior_logprobs=batch.behavior_logprobs[index],
            step_start_logprobs=output.logprobs.detach() if start is None else start[index],
            advantages=advantages[index],
            loss_mask=batch.loss_mask[index],
            response_index=micro.response_index,
            responses=len(micro.responses),
            reference_logprobs=None if batch.reference_logprobs is None else batch.reference_logprobs[index],
        )
        fixed = self._surrogate.correction(tokens) if correction is None else correction.take(index)
        loss = self._surrogate.loss(tokens, totals, fixed, self._kl_coef)
        torch.autograd.backward(loss.loss)
        self._optimizer.collect()
        results.policy_logprobs[index] = tokens.policy_logprobs.detach()
        results.step_start_logprobs[index] = tokens.step_start_logprobs
        results.entropy[index] = output.entropy
        results.clipped[index], results.outside[index] = loss.clipped, loss.outside
        results.masked[index] = ~fixed.keep & tokens.loss_mask
        return loss.loss.detach()

    def _settle(self, applied: bool, batch: FlatBatch, metrics: Metrics) -> bool:
        """Count the batch as applied, or as refused and, at the limit, give up. Returns `applied`."""
        if not applied:
            self._refused += 1
            if self._refused >= self._config.max_nonfinite_steps:
                raise NonFiniteError(
                    f"{self._refused} learner batches in a row had a non-finite loss or gradient; the policy stays at "
                    f"version {self._version}. Look at the batches written out: a log-probability or reward that is "
                    "NaN, or a learning rate too high"
                )
            return False
        self._refused = 0
        self._version += 1
        sequence_kl = metrics["kl/sequence_mean"]
        if self._kl_coef > 0 and sequence_kl is not None:
            self._kl_coef = next_kl_coef(
                self._kl, self._kl_coef, self._version, self._config.steps, sequence_kl, batch.responses
            )
        return True


def next_kl_coef(
    kl: KLConfig, coef: float, version: PolicyVersion, steps: int, sequence_kl: float, responses: int
) -> float:
    """β for the batch after `version`. `adaptive` gains K = min(1, responses/horizon) per batch (Ziegler 2019)."""
    options: dict[str, float] = {}
    if kl.schedule == "linear":
        options = {"initial": kl.coef, "final": kl.final_coef, "steps": steps}
    elif kl.schedule == "adaptive":
        options = {"target": kl.target, "gain": min(1.0, responses / kl.horizon)}
    return KL_SCHEDULES[kl.schedule](coef, step=version, sequence_kl=sequence_kl, **options)


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
