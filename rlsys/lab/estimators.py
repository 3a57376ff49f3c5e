"""What `rlsys.algo.policy_loss` estimates, and how well: the real loss, taken apart by enumeration.

A loss depends on the policy only through log π_θ(y_t|s_t), so one call yields, for each token, the coefficient

    c_t = −∂loss/∂log π_θ(y_t|s_t),

and the gradient estimate of a response is ĝ(y) = Σ_t c_t ∇log π_θ(y_t|s_t), where in a table
∇log π(a|s) = e_a − π(·|s) in row s. Mean and variance of ĝ under μ are then finite sums.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rlsys.algo.batch import BatchTotals, TokenBatch
from rlsys.algo.corrections import Correction, compute_correction
from rlsys.algo.importance import segment_sum
from rlsys.algo.objectives import policy_loss
from rlsys.lab.tree import Tree


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Situation:
    """Who sampled, who learns, and from what: policies μ, π_V and π_θ, rewards [responses], and their baseline.

    start is π_V, the policy when the learner step began; None: it begins here, π_V = π_θ.
    """

    tree: Tree
    behavior: Tensor
    policy: Tensor
    rewards: Tensor
    baseline: float = 0.0
    start: Tensor | None = None

    def advantages(self, objective: str) -> Tensor:
        """r − baseline of every response; the reward itself for `raft`, whose weight is acceptance."""
        return self.rewards if objective == "raft" else self.rewards - self.baseline

    def batch(self, objective: str, positions: Tensor, index: Tensor, responses: int) -> TokenBatch:
        """The tokens at `positions` of the tree as a learner's batch; `policy_logprobs` is a leaf with gradient."""
        tree, start = self.tree, self.policy if self.start is None else self.start
        return TokenBatch(
            policy_logprobs=tree.logprobs(self.policy, positions).detach().requires_grad_(),
            behavior_logprobs=tree.logprobs(self.behavior, positions),
            step_start_logprobs=tree.logprobs(start, positions),
            advantages=self.advantages(objective)[tree.response_index[positions]],
            loss_mask=torch.ones_like(positions, dtype=torch.bool),
            response_index=index,
            responses=responses,
        )

    def every_response(self, objective: str) -> TokenBatch:
        """Each response of the tree once."""
        tree = self.tree
        return self.batch(objective, torch.arange(len(tree.token_ids)), tree.response_index, tree.responses)


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """Mean [prefixes, vocabulary] and variance, E‖ĝ − Eĝ‖², of the estimate from one response of μ."""

    mean: Tensor
    variance: float


def correction_of(batch: TokenBatch, objective: str, name: str) -> Correction:
    """`compute_correction` of a batch with the options' defaults."""
    return compute_correction(
        name,
        step_start_logprobs=batch.step_start_logprobs,
        behavior_logprobs=batch.behavior_logprobs,
        loss_mask=batch.loss_mask,
        response_index=batch.response_index,
        responses=batch.responses,
        objective=objective,
    )


def coefficients(
    batch: TokenBatch, objective: str, correction: Correction | None = None, *, responses: int = 1
) -> Tensor:
    """c_t of every token, [N], with the reduction `constant` and L = 1, so that on-policy Σ_y π(y) ĝ(y) = ∇J.

    responses: how many of the batch's responses one estimate averages over; 1 gives each response's own ĝ(y).
    """
    totals = BatchTotals(tokens=1, responses=responses, max_tokens=1)
    out = policy_loss(batch, totals, objective=objective, reduce="constant", correction=correction)
    (slope,) = torch.autograd.grad(out.loss, batch.policy_logprobs, allow_unused=True, materialize_grads=True)
    return -slope


def response_coefficients(situation: Situation, objective: str, correction: str = "none") -> Tensor:
    """c_t of every token of the tree, [N], of an estimator that treats each response by itself: all but `m2`."""
    batch = situation.every_response(objective)
    return coefficients(batch, objective, correction_of(batch, objective, correction))


def enumerated(situation: Situation, objective: str, correction: str = "none") -> Moments:
    """Exact moments of an estimator that treats each response by itself."""
    c = response_coefficients(situation, objective, correction)
    return moments(situation.tree, situation.behavior, situation.policy, c)


def moments(tree: Tree, behavior: Tensor, policy: Tensor, c: Tensor) -> Moments:
    """Mean and variance under μ of ĝ(y) = Σ_t c_t ∇log π(y_t|s_t). c: [N].

    The prefixes of a response are distinct rows, so ‖ĝ(y)‖² = Σ_t c_t² ‖e_a − π(·|s_t)‖² has no cross terms.
    """
    probability = tree.probabilities(behavior)[tree.response_index]
    mean = scores(tree.prefix_ids, tree.cells, probability * c, policy)
    second = probability @ (c.square() * score_norms(tree, policy))
    return Moments(mean=mean, variance=float((second - mean.square().sum()).clamp(min=0)))


def score_norms(tree: Tree, policy: Tensor) -> Tensor:
    """‖∇log π(y_t|s_t)‖² = 1 − 2π(y_t|s_t) + Σ_a π(a|s_t)² of every token, [N]."""
    pi = policy.softmax(-1)
    return 1 - 2 * pi.flatten()[tree.cells] + pi.square().sum(-1)[tree.prefix_ids]


def scores(prefix_ids: Tensor, cells: Tensor, c: Tensor, policy: Tensor) -> Tensor:
    """Σ_t c_t ∇log π(y_t|s_t) over the given tokens, [prefixes, vocabulary]."""
    prefixes, vocabulary = policy.shape
    chosen = segment_sum(c, cells, prefixes * vocabulary).view(prefixes, vocabulary)
    return chosen - segment_sum(c, prefix_ids, prefixes)[:, None] * policy.softmax(-1)


def batch_gradients(
    tree: Tree, policy: Tensor, positions: Tensor, batch_index: Tensor, batches: int, c: Tensor
) -> Tensor:
    """ĝ of each of several batches, [batches, prefixes, vocabulary]. positions, batch_index, c: [tokens]."""
    prefixes, vocabulary = policy.shape
    size = prefixes * vocabulary
    chosen = segment_sum(c, batch_index * size + tree.cells[positions], batches * size)
    total = segment_sum(c, batch_index * prefixes + tree.prefix_ids[positions], batches * prefixes)
    return chosen.view(batches, prefixes, vocabulary) - total.view(batches, prefixes, 1) * policy.softmax(-1)
