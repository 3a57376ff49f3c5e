"""Exact answers about enumerable policies: values, visits, divergences, gradients. No sampling anywhere.

Policies are [prefixes, vocabulary] logits of a `Tree`; rewards are [responses]. J(π) = Σ_y π(y) r(y).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from rlsys.algo.importance import segment_sum
from rlsys.lab.tree import Tree


def expected_reward(tree: Tree, policy: Tensor, rewards: Tensor) -> Tensor:
    """J(π) = Σ_y π(y) r(y), a scalar with gradient."""
    return tree.probabilities(policy) @ rewards


def gradient(function: Callable[[Tensor], Tensor], policy: Tensor) -> Tensor:
    """∇ of a scalar function of the policy, at `policy`, by autograd. [prefixes, vocabulary]."""
    policy = policy.detach().requires_grad_()
    return torch.autograd.grad(function(policy), policy)[0]


def reward_gradient(tree: Tree, policy: Tensor, rewards: Tensor) -> Tensor:
    """∇J(π) = Σ_y r(y) ∇π(y): the truth every estimator is held against."""
    return gradient(lambda p: expected_reward(tree, p, rewards), policy)


def occupancy(tree: Tree, policy: Tensor) -> Tensor:
    """d(s), the probability that a response passes through each prefix, [prefixes]; d(empty) = 1."""
    return segment_sum(tree.probabilities(policy)[tree.response_index], tree.prefix_ids, tree.prefixes)


def action_values(tree: Tree, policy: Tensor, rewards: Tensor) -> Tensor:
    """Q^π(s, a) = E_π[r | s, a], [prefixes, vocabulary].

    By Σ_{y ∋ (s,a)} π(y) r(y) / Σ_{y ∋ (s,a)} π(y); exact zeros of π cannot occur under a softmax.
    """
    probability = tree.probabilities(policy)[tree.response_index]
    cells = tree.prefixes * tree.vocabulary
    earned = segment_sum(probability * rewards[tree.response_index], tree.cells, cells)
    return (earned / segment_sum(probability, tree.cells, cells)).view(tree.prefixes, tree.vocabulary)


def sequence_kl(tree: Tree, policy: Tensor, other: Tensor) -> Tensor:
    """KL(π‖π') = Σ_y π(y) log π(y)/π'(y), nats per response, a scalar with gradient."""
    log_p = tree.log_probabilities(policy)
    return log_p.exp() @ (log_p - tree.log_probabilities(other))


def token_kl(policy: Tensor, other: Tensor) -> Tensor:
    """KL(π(·|s)‖π'(·|s)) of every prefix, [prefixes], with gradient."""
    log_p = policy.log_softmax(-1)
    return (log_p.exp() * (log_p - other.log_softmax(-1))).sum(-1)


def token_chi2(policy: Tensor, other: Tensor) -> Tensor:
    """χ²(s) = Σ_a π(a|s)²/π'(a|s) − 1 of every prefix: the variance under π' of the weight π/π'. [prefixes]."""
    return (2 * policy.log_softmax(-1) - other.log_softmax(-1)).exp().sum(-1) - 1


def sequence_chi2(tree: Tree, policy: Tensor, other: Tensor) -> Tensor:
    """Var_{π'} w = Σ_y π(y)²/π'(y) − 1, the variance of the sequence weight w = π/π'."""
    return (2 * tree.log_probabilities(policy) - tree.log_probabilities(other)).exp().sum() - 1


def mean_token_chi2(tree: Tree, policy: Tensor, other: Tensor) -> Tensor:
    """χ² of the token weight over the tokens that π' samples: mean of χ²(s), weighted by visits under π'."""
    visits = occupancy(tree, other)
    return visits @ token_chi2(policy, other) / visits.sum()
