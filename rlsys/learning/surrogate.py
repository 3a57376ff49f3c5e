"""The configured loss: objective, correction and KL term, as one function of a micro-batch."""

from dataclasses import replace

from torch import Tensor

from rlsys.algo.batch import BatchTotals, LossOutput, TokenBatch
from rlsys.algo.corrections import CORRECTION_OPTIONS, Correction, compute_correction
from rlsys.algo.divergence import kl_loss
from rlsys.algo.objectives import policy_loss
from rlsys.config.schema import KLConfig, ObjectiveConfig
from rlsys.learning.batch import FlatBatch


class Surrogate:
    """Binds the `objective` and `kl` sections to the functions of `rlsys.algo`."""

    def __init__(self, objective: ObjectiveConfig, kl: KLConfig) -> None:
        self._objective, self._kl = objective, kl
        self._options = objective.options()

    @property
    def correction_needs_batch(self) -> bool:
        """Whether the correction depends on tokens of other responses, and so on log π_V of the whole batch."""
        return self._objective.correction.name == "m2"

    @property
    def truncation_cap(self) -> float | None:
        """Where the correction truncates weights; None for one that does not."""
        correction = self._objective.correction
        if correction.name != "tis":
            return None
        return CORRECTION_OPTIONS["tis"]["cap"] if correction.cap is None else correction.cap

    def correction(self, tokens: TokenBatch) -> Correction:
        """The correction of these tokens from π_V/μ; of a micro-batch only where it is a matter of one response."""
        return self._correct(
            tokens.step_start_logprobs,
            tokens.behavior_logprobs,
            tokens.loss_mask,
            tokens.response_index,
            tokens.responses,
        )

    def correction_of_batch(self, batch: FlatBatch, step_start_logprobs: Tensor) -> Correction:
        """The correction of the global batch, [N]."""
        return self._correct(
            step_start_logprobs, batch.behavior_logprobs, batch.loss_mask, batch.response_index, batch.responses
        )

    def loss(self, tokens: TokenBatch, totals: BatchTotals, correction: Correction, kl_coef: float) -> LossOutput:
        """Objective, plus β times the KL where that is placed in the loss; `clamped` is where either clamps.

        Metrics and other flags are the objective's.
        """
        output = policy_loss(
            tokens,
            totals,
            objective=self._objective.name,
            reduce=self._objective.reduce,
            correction=correction,
            **self._options,
        )
        if self._kl.placement == "reward" or not kl_coef > 0:
            return output
        divergence = kl_loss(
            tokens,
            totals,
            estimator=self._kl.estimator,
            reduce=self._objective.reduce,
            coef=kl_coef,
            cap=self._kl.cap,
        )
        return replace(output, loss=output.loss + divergence.loss, clamped=output.clamped | divergence.clamped)

    def _correct(self, start: Tensor, behavior: Tensor, mask: Tensor, index: Tensor, responses: int) -> Correction:
        return compute_correction(
            self._objective.correction.name,
            step_start_logprobs=start,
            behavior_logprobs=behavior,
            loss_mask=mask,
            response_index=index,
            responses=responses,
            objective=self._objective.name,
            proximal_logprobs=None,
            **self._objective.correction.options(),
        )
