"""The three parts of the log-ratio add up to it, and each moves for its own reason alone."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from rlsys.config.schema import TinyModelConfig
from rlsys.learning.policy import load_policy
from rlsys.learning.probe import Probe, Split
from rlsys.learning.scorer import Scorer
from rlsys.learning.tiny import make_tiny
from rlsys.observability.catalogue import CATALOGUE
from rlsys.records import BatchArrays, FloatArray, Prompt, Rollout, RolloutGroup
from rlsys.versions import VersionSpan

EXACT = 1e-5
"""Nats: float32 sums in another order."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("probe")
    tiny = TinyModelConfig(hidden_size=16, layers=2, heads=2, kv_heads=1, intermediate_size=16, max_positions=32)
    make_tiny(tiny, "0123456789", path)
    return path


@pytest.fixture(scope="module")
def versions(directory: Path) -> list[dict[str, Tensor]]:
    """Parameters of versions 0, 1 and 2, each the one before with noise."""
    generator = torch.Generator().manual_seed(3)
    found = [{name: t.detach().clone() for name, t in load_policy(directory, "float32").named_tensors()}]
    for _ in range(2):
        found.append({n: t + 0.05 * torch.randn(t.shape, generator=generator) for n, t in found[-1].items()})
    return found


def logprobs(directory: Path, weights: Mapping[str, Tensor], group: RolloutGroup) -> list[FloatArray]:
    """log π of every response, by the scorer that the reference uses."""
    scorer = Scorer(directory, dtype="float32", temperature=1.0)
    for name, tensor in scorer._policy.named_tensors():
        tensor.copy_(weights[name])
    return scorer.score([group])


def make_group(spans: Sequence[Sequence[tuple[int, int]]], slot: int = 0) -> RolloutGroup:
    """Responses whose spans are (tokens, version) pairs; behaviour log-probabilities are filled in later."""
    random = np.random.default_rng(slot)
    rollouts = []
    for sample, parts in enumerate(spans):
        ends = np.cumsum([n for n, _ in parts]).tolist()
        starts = [0, *ends[:-1]]
        rollouts.append(
            Rollout(
                sample=sample,
                response_ids=random.integers(0, 10, ends[-1]).astype(np.int32),
                behavior_logprobs=np.zeros(ends[-1], dtype=np.float32),
                loss_mask=np.ones(ends[-1], dtype=np.bool_),
                version_spans=tuple(
                    VersionSpan(start=a, stop=b, version=v) for a, b, (_, v) in zip(starts, ends, parts, strict=True)
                ),
                finish_reason="stop",
                text="",
            )
        )
    prompt = Prompt(epoch=0, index=slot, text="12", token_ids=(1, 2), answer="")
    return RolloutGroup(
        slot=slot, attempt=1, worker="a", prompt=prompt, rollouts=tuple(rollouts), started_at=0.0, finished_at=0.0
    )


def sampled(directory: Path, versions: Sequence[Mapping[str, Tensor]], group: RolloutGroup) -> RolloutGroup:
    """The group as an exact engine would have sampled it: every token's log-probability under its own version."""
    under = [logprobs(directory, weights, group) for weights in versions]
    rollouts = []
    for i, rollout in enumerate(group.rollouts):
        own = rollout.token_versions()
        behavior = np.array([under[v][i][t] for t, v in enumerate(own)], dtype=np.float32)
        rollouts.append(replace(rollout, behavior_logprobs=behavior))
    return replace(group, rollouts=tuple(rollouts))


def arrays(policy: Sequence[FloatArray], start: Sequence[FloatArray]) -> BatchArrays:
    lengths = [len(part) for part in policy]
    nothing = np.zeros(sum(lengths), dtype=np.bool_)
    return BatchArrays(
        offsets=np.cumsum([0, *lengths]),
        policy_logprobs=np.concatenate(policy),
        step_start_logprobs=np.concatenate(start),
        reference_logprobs=None,
        clipped=nothing,
        masked=nothing,
        advantages=np.zeros(len(lengths), dtype=np.float32),
    )


def make_probe(directory: Path, versions: Sequence[Mapping[str, Tensor]], fraction: float = 1.0) -> Probe:
    probe = Probe(directory, dtype="float32", temperature=1.0, fraction=fraction, oldest=4)
    for version, weights in enumerate(versions):
        probe.keep(version, weights)
    return probe


MIXED = [[(3, 0), (2, 1)], [(4, 1)], [(2, 2), (1, 2)]]


def test_the_parts_are_what_the_policies_say_and_add_up_to_the_whole(
    directory: Path, versions: list[dict[str, Tensor]]
) -> None:
    group = make_group(MIXED)
    exact = sampled(directory, versions, group)
    noisy = replace(
        exact, rollouts=tuple(replace(r, behavior_logprobs=r.behavior_logprobs - 0.25) for r in exact.rollouts)
    )
    start = logprobs(directory, versions[2], group)
    policy = [part + 0.5 for part in start]
    split = make_probe(directory, versions).split(2, [noisy], arrays(policy, start), [0])
    behavior = np.concatenate([r.behavior_logprobs for r in noisy.rollouts])
    np.testing.assert_allclose(split.total, np.concatenate(policy) - behavior, atol=EXACT)
    np.testing.assert_allclose(split.drift, 0.5, atol=EXACT)
    np.testing.assert_allclose(split.engine, 0.25, atol=EXACT)
    expected = np.concatenate(start) - np.concatenate([r.behavior_logprobs for r in exact.rollouts])
    np.testing.assert_allclose(split.lag, expected, atol=EXACT)
    assert np.abs(split.lag[:9]).max() > 1e-2
    assert split.lag[9:].tolist() == [0.0, 0.0, 0.0]
    assert split.later.tolist() == [False] * 3 + [True] * 2 + [False] * 4 + [False] * 3


def test_on_policy_data_from_an_exact_engine_has_no_part_at_all(
    directory: Path, versions: list[dict[str, Tensor]]
) -> None:
    group = sampled(directory, versions, make_group([[(4, 2)], [(3, 2)]]))
    start = logprobs(directory, versions[2], group)
    found = make_probe(directory, versions).metrics(2, [group], arrays(start, start))
    for part in ("drift", "lag", "engine"):
        assert found[f"split/{part}/abs_mean"] == pytest.approx(0, abs=EXACT)
    assert found["split/engine_later_spans/k3"] is None
    assert found["split/tokens"] == 7
    assert set(found) == {name for name in CATALOGUE if name.startswith("split/")}


def test_the_means_are_over_the_tokens_of_each_part() -> None:
    split = Split(
        drift=np.array([0.0, 0.0, 0.0], dtype=np.float32),
        lag=np.array([0.5, -0.5, 0.0], dtype=np.float32),
        engine=np.array([0.1, 0.3, 0.8], dtype=np.float32),
        later=np.array([False, False, True]),
    )
    found = split.metrics()
    assert found["split/lag/mean"] == 0.0
    assert found["split/lag/abs_mean"] == pytest.approx(1 / 3)
    assert found["split/lag/k3"] == pytest.approx((math.exp(0.5) - 1.5 + math.exp(-0.5) - 0.5) / 3)
    assert found["split/engine/mean"] == pytest.approx(0.2)
    assert found["split/engine_later_spans/mean"] == pytest.approx(0.8)
    assert (found["split/tokens"], found["split/later_tokens"]) == (3, 1)


def test_masked_tokens_are_not_probed(directory: Path, versions: list[dict[str, Tensor]]) -> None:
    group = make_group([[(4, 2)]])
    mask = np.array([True, False, True, False])
    group = replace(group, rollouts=(replace(group.rollouts[0], loss_mask=mask),))
    start = logprobs(directory, versions[2], group)
    split = make_probe(directory, versions).split(2, [group], arrays(start, start), [0])
    assert len(split.total) == 2


def test_a_share_of_the_groups_is_drawn_anew_for_every_version_and_the_same_when_asked_again(
    directory: Path, versions: list[dict[str, Tensor]]
) -> None:
    probe = make_probe(directory, versions, fraction=0.25)
    draws = [tuple(probe.chosen(version, 8)) for version in range(20)]
    assert {len(draw) for draw in draws} == {2}
    assert len(set(draws)) > 5
    assert draws == [tuple(probe.chosen(version, 8)) for version in range(20)]
    assert len(probe.chosen(0, 2)) == 1


def test_some_of_the_groups_give_their_own_part_of_the_batch(
    directory: Path, versions: list[dict[str, Tensor]]
) -> None:
    groups = [sampled(directory, versions, make_group(MIXED, slot)) for slot in range(3)]
    start = [part for group in groups for part in logprobs(directory, versions[2], group)]
    probe = make_probe(directory, versions)
    everything, some = (probe.split(2, groups, arrays(start, start), chosen) for chosen in ([0, 1, 2], [2]))
    np.testing.assert_allclose(some.lag, everything.lag[-len(some.lag) :], atol=EXACT)


def test_versions_too_old_to_be_trained_are_let_go_and_asking_for_one_is_an_error(
    directory: Path, versions: list[dict[str, Tensor]]
) -> None:
    probe = Probe(directory, dtype="float32", temperature=1.0, fraction=1.0, oldest=1, ahead=1)
    for version in range(6):
        probe.keep(version, versions[0])
    assert sorted(probe._weights) == [2, 3, 4, 5]
    group = make_group([[(2, 1)]])
    start = logprobs(directory, versions[0], group)
    with pytest.raises(ValueError, match=r"version 1 is not held; held are \[3, 4, 5\]"):
        probe.metrics(4, [group], arrays(start, start))
