"""A language model whose every response can be written down: two symbols, the end, the padding, three tokens."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlsys.config import RunConfig, parse_config
from rlsys.learning.packing import Packed, Sequences, pack
from rlsys.learning.policy import Policy
from rlsys.learning.tiny import make_tiny
from rlsys.records import GroupScore, Prompt, Rollout, RolloutGroup, ScoredGroup
from tests.unit.learning.samples import sharpen

SYMBOLS = "01"
END, TOKENS, LONGEST = 1, 4, 3


def responses(prefix: tuple[int, ...] = ()) -> list[tuple[int, ...]]:
    """Every response there is: it ends with END, or is LONGEST tokens long."""
    if len(prefix) == LONGEST or prefix[-1:] == (END,):
        return [prefix]
    return [response for token in range(TOKENS) for response in responses((*prefix, token))]


def make_policy_directory(path: Path, tiny: Any, seed: int) -> Path:
    make_tiny(tiny, SYMBOLS, path, seed=seed)
    sharpen(path)
    return path


def make_config(*overrides: str, **sections: Any) -> RunConfig:
    small = {"prompts_per_step": 2, "samples_per_prompt": 16, "max_new_tokens": LONGEST}
    learner = {"row_tokens": 16}
    return parse_config(
        {"task": {"name": "arithmetic"}, "rollout": small, "learner": learner, **sections}, list(overrides)
    )


def make_prompts(*token_ids: Sequence[int]) -> list[Prompt]:
    return [Prompt(epoch=0, index=i, text="", token_ids=tuple(ids), answer="") for i, ids in enumerate(token_ids)]


def everything(prompt: Sequence[int]) -> Packed:
    """All responses to a prompt, packed; their tokens in the order of `responses()`."""
    ids = [np.asarray(response, dtype=np.int32) for response in responses()]
    sequences = Sequences(prompts=[list(prompt)], responses=ids, prompt_of=[0] * len(ids))
    (packed,) = pack(sequences, row_tokens=256, micro_batch_tokens=8192).micro_batches
    return packed


def log_probabilities(policy: Policy, prompt: Sequence[int], temperature: float = 1.0) -> torch.Tensor:
    """log π(y|x) of every response, in the order of `responses()`, with gradient."""
    packed = everything(prompt)
    tokens = policy.token_logprobs(packed, temperature).logprobs
    return torch.zeros(len(packed.responses)).index_add(0, packed.response_index, tokens)


def reward_of(rollout: Rollout) -> float:
    """A score with a signal at every token: the symbols of one kind, less half of a response that was cut."""
    return float((rollout.response_ids == 3).sum()) - 0.5 * (rollout.finish_reason == "length")


def reward(group: RolloutGroup) -> GroupScore:
    rewards = np.array([reward_of(rollout) for rollout in group.rollouts], dtype=np.float32)
    return GroupScore(slot=group.slot, attempt=group.attempt, rewards=rewards, scored_at=0.0)


def scored(groups: Sequence[RolloutGroup]) -> list[ScoredGroup]:
    return [ScoredGroup(group=group, score=reward(group)) for group in groups]
