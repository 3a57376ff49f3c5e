"""Groups travel in bundles, and arrive as they were."""

import pickle

import numpy as np

from rlsys.actors.bundle import select
from rlsys.records import Rollout, RolloutGroup
from rlsys.versions import VersionSpan
from tests.fakes import make_prompt


def make_group(slot: int, lengths: tuple[int, ...] = (3, 0, 2)) -> RolloutGroup:
    rollouts = tuple(
        Rollout(
            sample=sample,
            response_ids=np.arange(10 * sample, 10 * sample + length, dtype=np.int32),
            behavior_logprobs=np.linspace(-2, -1, length, dtype=np.float32),
            loss_mask=np.arange(length) % 2 == 0,
            version_spans=(VersionSpan(start=0, stop=1, version=4), VersionSpan(start=1, stop=length, version=5)),
            finish_reason="length" if sample else "stop",
            text=f"é{sample}",
        )
        for sample, length in enumerate(lengths)
    )
    return RolloutGroup(
        slot=slot, attempt=2, worker="w", prompt=make_prompt(3), rollouts=rollouts, started_at=1.5, finished_at=2.5
    )


def test_a_group_survives_pickling_whole() -> None:
    group = make_group(7)
    back = pickle.loads(pickle.dumps(group))
    assert (back.slot, back.attempt, back.worker, back.prompt) == (7, 2, "w", group.prompt)
    assert (back.started_at, back.finished_at) == (1.5, 2.5)
    assert back.summary() == group.summary()
    for ours, theirs in zip(group.rollouts, back.rollouts, strict=True):
        for name in ("response_ids", "behavior_logprobs", "loss_mask"):
            a, b = getattr(ours, name), getattr(theirs, name)
            assert a.dtype == b.dtype
            assert a.tolist() == b.tolist()
        for name in ("sample", "version_spans", "finish_reason", "text"):
            assert getattr(ours, name) == getattr(theirs, name)


def test_select_takes_each_place_from_its_bundle_in_order() -> None:
    bundles = [[make_group(0), make_group(1)], [make_group(2)]]
    assert [group.slot for group in select([(1, 0), (0, 1), (0, 0)], bundles)] == [2, 1, 0]
