"""The random problems that the claims are tried on."""

from typing import NamedTuple

import torch
from torch import Tensor

from rlsys.lab import exact
from rlsys.lab.estimators import Moments, Situation, enumerated
from rlsys.lab.tree import Tree, make_tree, random_policy, random_rewards, seeded


class Case(NamedTuple):
    """A tree, a policy on it, a verifiable reward, a direction to move the policy in, and the generator left over."""

    tree: Tree
    policy: Tensor
    rewards: Tensor
    direction: Tensor
    generator: torch.Generator


def random_case(vocabulary: int, horizon: int, *seed: int, ends: bool = False, pass_rate: float = 0.25) -> Case:
    """Normal logits, a reward that a quarter of the responses earn, a normal direction; all from the seed."""
    tree, generator = make_tree(vocabulary, horizon, ends=ends), seeded(vocabulary, horizon, *seed)
    policy = random_policy(tree, generator)
    rewards = random_rewards(tree, generator, pass_rate)
    return Case(tree, policy, rewards, random_policy(tree, generator), generator)


def both_views(case: Case, behavior: Tensor, policy: Tensor, baseline: float = 0.0) -> tuple[Moments, Moments]:
    """Exact moments of `is_token` and of `is_sequence`, in this order."""
    situation = Situation(tree=case.tree, behavior=behavior, policy=policy, rewards=case.rewards, baseline=baseline)
    return enumerated(situation, "is_token"), enumerated(situation, "is_sequence")


def relative_error(measured: Tensor, truth: Tensor) -> float:
    return float((measured - truth).norm() / truth.norm())


def token_drift(tree: Tree, policy: Tensor, behavior: Tensor) -> float:
    """How far a typical token weight is from 1: √E_μ(r_t − 1)²."""
    return float(exact.mean_token_chi2(tree, policy, behavior).clamp(min=0).sqrt())


def local_slope(f_far: float, f_near: float, step_ratio: float = 2.0) -> float:
    """Order of f in h from two values: log f(h·ratio)/f(h) over log ratio."""
    return float(torch.tensor(f_far / f_near).log() / torch.tensor(step_ratio).log())
