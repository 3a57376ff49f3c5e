"""Reward functions: the protocol, verifiable answers, and scoring that fails loudly."""

from rlsys.rewards.base import RewardFn
from rlsys.rewards.resolve import resolve_reward
from rlsys.rewards.scoring import score_group
from rlsys.rewards.verifiable import exact_match, math_verify

__all__ = ["RewardFn", "exact_match", "math_verify", "resolve_reward", "score_group"]
