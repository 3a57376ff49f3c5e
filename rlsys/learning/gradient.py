"""One mini-batch's gradient, micro-batch by micro-batch.

A mini-batch is some groups of the batch with normalisers of its own; its micro-batches only limit memory:
their losses and gradients add up to the mini-batch's, however it is cut.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from rlsys.algo.batch import BatchTotals, TokenBatch
from rlsys.algo.corrections import Correction
from rlsys.config.schema import LearnerConfig
from rlsys.learning.batch import FlatBatch
from rlsys.learning.metrics import TokenResults
from rlsys.learning.packing import Packed, Packing, pack
from rlsys.learning.policy import Policy
from rlsys.learning.ranks import ALONE, Ranks
from rlsys.learning.surrogate import Surrogate
from rlsys.versions import PolicyVersion


class Collector(Protocol):
    """Where gradients add up: the `Optimizer`, or whoever only wants to look at them."""

    def collect(self) -> None:
        """Add the parameters' gradients of one backward pass to those before, and keep the sum."""


@dataclass(frozen=True, slots=True)
class MiniBatch:
    """The packed responses of one optimizer step, or this rank's share of them, and the normalisers of all."""

    packing: Packing
    totals: BatchTotals


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInputs:
    """What is fixed while a batch is trained, on the policy's device.

    `advantages` [N]; `step_start_logprobs` [N] and `correction` are None where one update makes them a matter
    of the micro-batch at hand.
    """

    batch: FlatBatch
    advantages: Tensor
    step_start_logprobs: Tensor | None
    correction: Correction | None
    kl_coef: float


def divide(
    batch: FlatBatch,
    config: LearnerConfig,
    *,
    max_tokens: int,
    seed: int,
    version: PolicyVersion,
    ranks: Ranks = ALONE,
) -> list[MiniBatch]:
    """`updates_per_batch` mini-batches of whole groups, in an order drawn from seed and version.

    A mini-batch without a trained token is left out. Of each, this rank packs its share.
    """
    parts = [np.arange(batch.responses)]
    if config.updates_per_batch > 1:
        order = np.random.default_rng((seed, version)).permutation(len(batch.sequences.prompts))
        owner = batch.group_index.numpy()
        parts = [np.flatnonzero(np.isin(owner, g)) for g in np.array_split(order, config.updates_per_batch)]
    lengths = torch.bincount(batch.response_index[batch.loss_mask], minlength=batch.responses)
    found = []
    for members in parts:
        trained = lengths[members]
        totals = BatchTotals(tokens=int(trained.sum()), responses=int((trained > 0).sum()), max_tokens=max_tokens)
        if totals.tokens:
            packing = pack(
                batch.sequences,
                row_tokens=config.row_tokens,
                micro_batch_tokens=config.micro_batch_tokens,
                members=members,
                rank=ranks.rank,
                ranks=ranks.size,
            )
            found.append(MiniBatch(packing, totals))
    return found


@torch.no_grad()
def score(policy: Policy, mini_batches: Sequence[MiniBatch], tokens: int, temperature: float) -> Tensor:
    """log π of a batch's tokens under the policy as it is, [tokens], on its device; 0 where packed nowhere."""
    logprobs = torch.zeros(tokens, device=policy.device)
    for mini in mini_batches:
        for micro in mini.packing.micro_batches:
            here = micro.to(policy.device)
            logprobs[here.token_index] = policy.token_logprobs(here, temperature).logprobs
    return logprobs


def accumulate(
    policy: Policy,
    collector: Collector,
    surrogate: Surrogate,
    inputs: StepInputs,
    mini: MiniBatch,
    results: TokenResults,
    temperature: float,
) -> Tensor:
    """Leave the mini-batch's gradient with the collector and what was seen in `results`. Returns the loss, scalar."""
    total = torch.zeros((), device=policy.device)
    for packed in mini.packing.micro_batches:
        micro = packed.to(policy.device)
        output = policy.token_logprobs(micro, temperature, with_entropy=True)
        tokens = _token_batch(inputs, micro, output.logprobs)
        fixed = inputs.correction
        correction = surrogate.correction(tokens) if fixed is None else fixed.take(micro.token_index)
        loss = surrogate.loss(tokens, mini.totals, correction, inputs.kl_coef)
        torch.autograd.backward(loss.loss)
        collector.collect()
        total += loss.loss.detach()
        results.note(
            micro.token_index,
            policy_logprobs=output.logprobs.detach(),
            step_start_logprobs=tokens.step_start_logprobs,
            entropy=output.entropy,
            clipped=loss.clipped,
            outside=loss.outside,
            masked=~correction.keep & tokens.loss_mask,
            truncated=correction.truncated,
            clamped=loss.clamped,
        )
    return total


def _token_batch(inputs: StepInputs, micro: Packed, policy_logprobs: Tensor) -> TokenBatch:
    """The micro-batch's slice of the batch. policy_logprobs: [n], with gradient."""
    batch, index, start = inputs.batch, micro.token_index, inputs.step_start_logprobs
    return TokenBatch(
        policy_logprobs=policy_logprobs,
        behavior_logprobs=batch.behavior_logprobs[index],
        step_start_logprobs=policy_logprobs.detach() if start is None else start[index],
        advantages=inputs.advantages[index],
        loss_mask=batch.loss_mask[index],
        response_index=micro.response_index,
        responses=len(micro.responses),
        reference_logprobs=None if batch.reference_logprobs is None else batch.reference_logprobs[index],
    )
