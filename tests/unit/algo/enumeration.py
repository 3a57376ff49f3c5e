"""A policy small enough to enumerate: every expectation, KL and gradient below is exact (float64).

The tree holds every response of at most `horizon` tokens over a small vocabulary; token 0 ends a response
when `ends` is set. A policy is one row of logits per prefix. All tokens of all responses, concatenated, have
the layout of `TokenBatch`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rlsys.algo.batch import BatchTotals, TokenBatch
from rlsys.algo.importance import segment_sum

ONE = BatchTotals(tokens=1, responses=1, max_tokens=1)
"""Totals under which each reduction but `sequence_mean` is the plain sum over the tokens of one response."""


@dataclass(frozen=True)
class Tree:
    responses: list[tuple[int, ...]]
    prefixes: int
    vocabulary: int
    token_ids: Tensor  # [N]
    prefix_ids: Tensor  # [N] row of the logits that the token was sampled from
    response_index: Tensor  # [N]

    def logprobs(self, logits: Tensor) -> Tensor:
        """log π of every token of every response, [N]."""
        return logits.log_softmax(-1)[self.prefix_ids, self.token_ids]

    def probabilities(self, logits: Tensor) -> Tensor:
        """π(y), [responses]; sums to 1."""
        return segment_sum(self.logprobs(logits), self.response_index, len(self.responses)).exp()

    def occupancy(self, logits: Tensor) -> Tensor:
        """Probability that each prefix is visited, [prefixes]."""
        visited = torch.zeros(len(self.responses), self.prefixes, dtype=torch.float64)
        visited[self.response_index, self.prefix_ids] = 1.0
        return self.probabilities(logits) @ visited

    def action_values(self, logits: Tensor, rewards: Tensor) -> Tensor:
        """Q^π(s, a) = E[r | s, a], [prefixes, vocabulary]."""
        weight = self.probabilities(logits)[self.response_index]
        cell = self.prefix_ids * self.vocabulary + self.token_ids
        cells = self.prefixes * self.vocabulary
        reached = segment_sum(weight, cell, cells)
        earned = segment_sum(weight * rewards[self.response_index], cell, cells)
        return (earned / reached).view(self.prefixes, self.vocabulary)


def tree(vocabulary: int, horizon: int, *, ends: bool = False) -> Tree:
    prefix_rows: dict[tuple[int, ...], int] = {}
    finished: list[tuple[int, ...]] = []

    def grow(prefix: tuple[int, ...]) -> None:
        if len(prefix) == horizon or (ends and prefix[-1:] == (0,)):
            finished.append(prefix)
            return
        prefix_rows[prefix] = len(prefix_rows)
        for token in range(vocabulary):
            grow((*prefix, token))

    grow(())
    return Tree(
        responses=finished,
        prefixes=len(prefix_rows),
        vocabulary=vocabulary,
        token_ids=torch.tensor([token for y in finished for token in y]),
        prefix_ids=torch.tensor([prefix_rows[y[:t]] for y in finished for t in range(len(y))]),
        response_index=torch.tensor([i for i, y in enumerate(finished) for _ in y]),
    )


def random_logits(space: Tree, seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(space.prefixes, space.vocabulary, generator=generator, dtype=torch.float64)


def gradient(scalar: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(scalar, logits, allow_unused=True, materialize_grads=True)[0]


def reward_gradient(space: Tree, logits: Tensor, rewards: Tensor) -> Tensor:
    """∇_θ Σ_y π_θ(y) r(y): the truth every objective is held against."""
    logits = logits.detach().requires_grad_()
    return gradient((space.probabilities(logits) * rewards).sum(), logits)


def expected_gradient(
    space: Tree,
    logits: Tensor,
    behavior_logits: Tensor,
    rewards: Tensor,
    loss: Callable[[TokenBatch], Tensor],
    *,
    start_logits: Tensor | None = None,
    reference_logits: Tensor | None = None,
) -> Tensor:
    """−E_{y∼μ}[∇ loss(batch of y alone)]: the ascent direction of one sampled response, in expectation."""
    logits = logits.detach().requires_grad_()
    policy, behavior = space.logprobs(logits), space.logprobs(behavior_logits)
    start = policy.detach() if start_logits is None else space.logprobs(start_logits)
    total = torch.zeros((), dtype=torch.float64)
    for i, probability in enumerate(space.probabilities(behavior_logits)):
        own = space.response_index == i
        batch = TokenBatch(
            policy_logprobs=policy[own],
            behavior_logprobs=behavior[own],
            step_start_logprobs=start[own],
            advantages=rewards[i].expand(int(own.sum())),
            loss_mask=torch.ones(int(own.sum()), dtype=torch.bool),
            response_index=torch.zeros(int(own.sum()), dtype=torch.int64),
            responses=1,
            reference_logprobs=None if reference_logits is None else space.logprobs(reference_logits)[own],
        )
        total = total - probability.detach() * loss(batch)
    return gradient(total, logits)


def relative_error(measured: Tensor, exact: Tensor) -> float:
    return float((measured - exact).norm() / exact.norm())
