"""Two learner ranks, in real processes, are one learner."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from safetensors import safe_open

from rlsys.config.schema import Sharding
from rlsys.errors import ClusterError
from rlsys.learning import checkpoint
from rlsys.learning.ranks import ALONE, join, listen
from rlsys.records import ScoredGroup
from rlsys.weights.buffer import WeightPacker
from tests.unit.learning.pair import HOST, Batch, Pair, desert, learner_on, pair, publish, refuse, train
from tests.unit.learning.samples import make_batch, make_group, make_rollout

SHARDINGS: tuple[Sharding, ...] = get_args(Sharding)


@pytest.fixture(scope="module")
def two() -> Iterator[Pair]:
    with pair() as ranks:
        yield ranks


def batch_of(seed: int, **options: Any) -> Batch:
    """A batch and reference log-probabilities."""
    groups = make_batch(seed, **options)
    random = np.random.default_rng(seed)
    reference = [random.normal(-2.0, 0.3, len(r.response_ids)) for group in groups for r in group.group.rollouts]
    return groups, [values.astype(np.float32) for values in reference]


def close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    """Equal but for rounding, in every tensor by its own scale."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = float(value.abs().max())
        assert torch.allclose(found[name], value, rtol=0, atol=tolerance * scale), name


CASES: list[dict[str, Any]] = [
    {},
    {"objective": {"name": "reinforce", "reduce": "sequence_mean"}, "advantage": {"name": "batch_whiten"}},
    {"objective": {"name": "is_token", "reduce": "constant", "correction": "mask_sequence"}},
    {"objective": {"name": "is_sequence", "reduce": "constant", "correction": "tis"}},
    {"objective": {"name": "gspo", "reduce": "sequence_mean", "clip_low": 0.2, "clip_high": 0.2}},
    {"objective": {"name": "decoupled_ppo", "correction": "tis"}, "learner": {"updates_per_batch": 3}},
    {"objective": {"name": "ppo_clip", "correction": {"name": "m2", "tau": 0.3}}},
    {"objective": {"correction": {"name": "m2", "tau": 0.3}}, "learner": {"updates_per_batch": 2}},
    {"kl": {"coef": 0.1, "placement": "reward"}, "advantage": {"name": "rloo"}},
    {"kl": {"coef": 0.1, "estimator": "k3", "schedule": "adaptive"}, "learner": {"micro_batch_tokens": 64}},
]


def named(case: dict[str, Any]) -> str:
    flat = {key: value for section in case.values() for key, value in section.items()}
    return " ".join(str(v["name"] if isinstance(v, dict) else v) for v in flat.values()) or "default"


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("case", CASES, ids=named)
def test_the_gradient_is_that_of_one_learner(two: Pair, tiny: Path, case: dict[str, Any], sharding: Sharding) -> None:
    """The first moments after one batch are its gradients (unclipped, of each mini-batch in turn, times 1 − β₁)."""
    batch = batch_of(1, groups=7)
    first, second = two(train, sharding, tiny, case, [batch])
    alone = train(ALONE, tiny, case, [batch])
    moments = {name: value for name, value in alone.optimizer.items() if name.endswith("exp_avg")}
    close({name: first.optimizer[name] for name in moments}, moments, 1e-4)
    (step,), (expected,) = first.steps, alone.steps
    assert step.applied
    assert step.trained_tokens == expected.trained_tokens
    assert second.steps[0].metrics == step.metrics, "every rank knows the whole batch"
    assert step.metrics.keys() == expected.metrics.keys()
    for name, value in expected.metrics.items():
        if value is None or name == "policy/packing_fill":  # rows come in pairs
            continue
        assert step.metrics[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
    for name in ("policy_logprobs", "step_start_logprobs", "advantages", "clipped", "masked"):
        found, wanted = getattr(first.arrays[0], name), getattr(alone.arrays[0], name)
        assert np.array_equal(found, getattr(second.arrays[0], name)), name
        assert np.allclose(found, wanted, rtol=0, atol=1e-4), name
    if case.get("objective", {}).get("correction") not in (None, "tis"):
        masked = alone.arrays[0].masked
        assert 0 < int(masked.sum()) < len(masked), "the correction must act for this to mean anything"


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"learner": {"updates_per_batch": 2, "grad_clip": 0.1}}, 1e-4),
        ({"learner": {"gradient_checkpointing": True, "micro_batch_tokens": 48}}, 1e-4),
        ({"model": {"dtype": "bfloat16"}}, 0.2),  # rounded to 8 bits after other sums
    ],
    ids=["clipped", "checkpointed", "bfloat16"],
)
@pytest.mark.parametrize("model", ["tiny", "untied"])
def test_parameters_stay_those_of_one_learner(
    two: Pair,
    model: str,
    options: dict[str, Any],
    tolerance: float,
    sharding: Sharding,
    request: pytest.FixtureRequest,
) -> None:
    path = request.getfixturevalue(model)
    batches = [batch_of(seed) for seed in range(3)]
    first, _ = two(train, sharding, path, options, batches)
    alone = train(ALONE, path, options, batches)
    before = train(ALONE, path, options, []).parameters
    assert [step.version for step in first.steps] == [1, 2, 3]
    assert first.parameters.keys() == alone.parameters.keys()
    moved, apart = (
        torch.cat([(alone.parameters[name] - other[name]).double().flatten() for name in before]).norm()
        for other in (before, first.parameters)
    )
    assert apart < tolerance * moved


def test_fsdp_holds_half_of_everything_on_each_rank(two: Pair, untied: Path) -> None:
    batches = [batch_of(0)]
    alone = train(ALONE, untied, {}, batches)
    for held in [rank.held for rank in two(train, "fsdp", untied, {}, batches)]:
        assert held == pytest.approx(alone.held / 2, rel=0.02)


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_a_rank_without_a_row_takes_part(two: Pair, tiny: Path, sharding: Sharding) -> None:
    """One response: a single tree, a single row, and nothing for the second rank."""
    group = make_group([3, 4], [make_rollout([5, 6, 7, 1], behavior=[-1.0, -2.0, -1.5, -1.0])], [1.0])
    options = {"advantage": {"name": "batch_whiten"}, "kl": {"coef": 0.1, "placement": "loss"}}
    batch: Batch = ([group], [np.full(4, -1.0, dtype=np.float32)])
    first, _ = two(train, sharding, tiny, options, [batch])
    alone = train(ALONE, tiny, options, [batch])
    moments = {name: value for name, value in alone.optimizer.items() if name.endswith("exp_avg")}
    assert max(float(value.abs().max()) for value in moments.values()) > 0
    close({name: first.optimizer[name] for name in moments}, moments, 1e-4)


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("updates", [1, 3])
def test_what_one_rank_cannot_apply_is_refused_by_both(two: Pair, tiny: Path, updates: int, sharding: Sharding) -> None:
    options = {"learner": {"updates_per_batch": updates}}
    good, bad = (make_batch(0), None), (poisoned(make_batch(1)), None)
    for step, unchanged, version in two(refuse, sharding, tiny, options, good, bad):
        assert not step.applied
        assert step.metrics["policy/grad_norm"] is None
        assert unchanged
        assert version == 1


def poisoned(batch: list[ScoredGroup]) -> list[ScoredGroup]:
    """NaN in one token of the batch: only one rank computes it."""
    batch[0].group.rollouts[0].behavior_logprobs[0] = np.nan
    return batch


def test_a_checkpoint_does_not_tell_how_many_ranks_wrote_it(two: Pair, tiny: Path, tmp_path: Path) -> None:
    def files(directory: Path) -> dict[str, dict[str, tuple[list[int], str]]]:
        found = {}
        for file in sorted(directory.rglob("*.safetensors")):
            with safe_open(file, framework="pt") as opened:
                parts = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
                found[file.name] = {name: (part.get_shape(), part.get_dtype()) for name, part in parts.items()}
        return found

    batches = [batch_of(seed) for seed in range(2)]
    train(ALONE, tiny, {}, batches, save=tmp_path / "one")
    two(train, "replicated", tiny, {}, batches, save=tmp_path / "replicated")
    two(train, "fsdp", tiny, {}, batches, save=tmp_path / "fsdp")
    names = {str(path.relative_to(tmp_path / "one")) for path in (tmp_path / "one").rglob("*")}
    expected = files(tmp_path / "one")
    assert expected["optimizer.safetensors"]
    for sharding in SHARDINGS:
        directory = tmp_path / sharding
        assert {str(path.relative_to(directory)) for path in directory.rglob("*")} == names
        assert files(directory) == expected
        assert json.loads((directory / "trainer" / "state.json").read_text())["extra"] == {"by": 2}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("saved", "resumed"), [(2, 1), (1, 2)])
def test_a_run_resumes_with_another_number_of_ranks(
    two: Pair, tiny: Path, tmp_path: Path, saved: int, resumed: int, dtype: str
) -> None:
    options = {"model": {"dtype": dtype}, "learner": {"lr": 2e-3}}
    before, after = [batch_of(seed) for seed in range(2)], [batch_of(2)]
    directory = tmp_path / "checkpoint"

    def run(size: int, *args: Any, **rest: Any) -> Any:
        return train(ALONE, *args, **rest) if size == 1 else two(train, "fsdp", *args, **rest)[0]

    stopped = run(saved, tiny, options, before, save=directory)
    loaded = run(resumed, directory, options, [], resume=True)
    for found, wanted in ((loaded.parameters, stopped.parameters), (loaded.optimizer, stopped.optimizer)):
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted), "a bit was lost on the way"
    continued = run(resumed, directory, options, after, resume=True)
    undisturbed = run(resumed, tiny, options, [*before, *after])
    assert continued.steps[0].version == 3
    assert continued.steps[0].metrics["policy/lr"] == undisturbed.steps[2].metrics["policy/lr"]
    moments = {n: v for n, v in undisturbed.optimizer.items() if n.endswith("exp_avg")}
    close({name: continued.optimizer[name] for name in moments}, moments, 1e-3 if dtype == "float32" else 0.05)


@pytest.mark.parametrize("model", ["tiny", "untied"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_published_from_shards_is_what_the_checkpoint_holds(
    two: Pair, model: str, dtype: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(model)
    batches = [batch_of(seed) for seed in range(2)]
    checksums, nothing = two(publish, "fsdp", path, {}, batches, dtype)
    two(train, "fsdp", path, {}, batches, save=tmp_path / "checkpoint")
    assert nothing == [], "only the first rank holds whole tensors"
    learner = learner_on(tmp_path / "checkpoint", {})
    learner.load_state(checkpoint.load(tmp_path / "checkpoint"))
    packer = WeightPacker(learner.named_tensors(), dtype=dtype, vocab_size=learner.policy.vocab_size)
    assert len(set(checksums)) == 2
    assert checksums[-1] == packer.pack(learner.named_tensors(), learner.version)[0].checksum


@pytest.mark.parametrize(
    ("how", "sharding", "timeout_s", "said"),
    [("dies", "fsdp", 300.0, "[Cc]onnection"), ("hangs", "replicated", 3.0, "[Tt]imed out")],
)
def test_a_rank_that_is_gone_fails_the_step_of_the_other(
    tiny: Path, how: str, sharding: Sharding, timeout_s: float, said: str
) -> None:
    """At once when it died, for its connection is closed; after the time that one may wait when it hangs."""
    with pair(timeout_s) as ranks:
        ranks.start(desert, sharding, tiny, batch_of(0), how)
        assert re.search(said, error := ranks.result(0)), error


def test_a_rank_that_finds_no_other_says_so() -> None:
    with listen(HOST) as listener:
        meeting = f"{HOST}:{listener.getsockname()[1]}"
        with pytest.raises(ClusterError, match=r"learner rank 0 of 2 did not find .* learner\.rank_timeout_s=1"):
            join(0, 2, meeting=meeting, host=HOST, timeout_s=1.0, listener=listener)
