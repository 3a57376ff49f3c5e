"""How old a token is, in learner versions, and how old it can become.

staleness of a token = learner version at consumption − version that sampled it
                     = in flight (until its response finished) + in queue (until consumed)
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rlsys.versions import PolicyVersion

STALENESS_BUCKETS = ("0", "1", "2", "3", "4+")


class Staleness(NamedTuple):
    """Ages in versions, [N] int64; total = in_flight + in_queue."""

    total: Tensor
    in_flight: Tensor
    in_queue: Tensor


def token_staleness(
    versions: Tensor, *, finished_version: Tensor | PolicyVersion, learner_version: PolicyVersion
) -> Staleness:
    """learner_version − versions, split where the response finished. versions: [N] int64.

    finished_version: the serving version when the response ended, a number or [N]. Raises ValueError when
    a token is younger than its response's end, or a response ended after the learner's version.
    """
    in_flight = finished_version - versions
    in_queue = (learner_version - finished_version) + torch.zeros_like(versions)
    wrong = (in_flight < 0) | (in_queue < 0)
    if bool(wrong.any()):
        token = int(wrong.nonzero()[0])
        sampled, age = int(versions[token]), int(in_flight[token])
        raise ValueError(
            f"versions: token {token} was sampled by version {sampled}, in a response that finished under "
            f"{sampled + age}, and reached learner version {learner_version}: these must not decrease"
        )
    return Staleness(in_flight + in_queue, in_flight, in_queue)


def response_staleness(staleness: Tensor, loss_mask: Tensor, response_index: Tensor, responses: int) -> Tensor:
    """The largest staleness among a response's trained tokens, [G] int64; −1 for a response with none."""
    oldest = torch.full((responses,), -1, dtype=torch.int64, device=staleness.device)
    return oldest.scatter_reduce(0, response_index[loss_mask], staleness[loss_mask], "amax")


def staleness_bucket(staleness: Tensor) -> Tensor:
    """Index into STALENESS_BUCKETS: min(staleness, 4)."""
    return staleness.clamp(max=len(STALENESS_BUCKETS) - 1)


def staleness_bound(slots: int, window: int, groups_per_step: int, serving_lag: int) -> int:
    """Oldest token that can be trained: ⌊(B + W − 2)/P⌋ + L versions.

    B slots (prompts admitted and not yet trained), completion window W (1: first in, first out), P groups per
    step, and a router that refuses workers more than L versions behind.
    """
    return (slots + window - 2) // groups_per_step + serving_lag
