"""What the learner's own model samples is distributed as the learner says, and reported as the engine reports it."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from rlsys.learning.packing import Sequences, pack
from rlsys.learning.policy import Policy, load_policy, load_tokenizer
from rlsys.learning.sampling import end_tokens, sample_groups
from rlsys.records import RolloutGroup
from tests.unit.learning.enumerated import (
    END,
    LONGEST,
    log_probabilities,
    make_policy_directory,
    make_prompts,
    responses,
)

PROMPTS = make_prompts((2,), (3, 2, 3, 3, 2), (2, 2, 3))


@pytest.fixture(scope="session")
def directory(tmp_path_factory, tiny_config) -> Path:
    return make_policy_directory(tmp_path_factory.mktemp("enumerable"), tiny_config(), 5)


@pytest.fixture(scope="session")
def policy(directory) -> Policy:
    return load_policy(directory, "float32")


def drawn(policy: Policy, directory: Path, *, samples: int, **options) -> list[RolloutGroup]:
    given = {"max_new_tokens": LONGEST, "temperature": 1.0, "seed": 7} | options
    return sample_groups(policy, load_tokenizer(directory), PROMPTS, samples=samples, **given)


def learner_logprobs(policy: Policy, groups: list[RolloutGroup], temperature: float) -> list[np.ndarray]:
    """log π of every response by the learner's packed forward pass."""
    sequences = Sequences(
        prompts=[group.prompt.token_ids for group in groups],
        responses=[rollout.response_ids for group in groups for rollout in group.rollouts],
        prompt_of=[i for i, group in enumerate(groups) for _ in group.rollouts],
    )
    flat = np.zeros(sequences.offsets()[-1])
    for micro in pack(sequences, row_tokens=32, micro_batch_tokens=512).micro_batches:
        with torch.no_grad():
            flat[micro.token_index.numpy()] = policy.token_logprobs(micro, temperature).logprobs.numpy()
    return np.split(flat, sequences.offsets()[1:-1])


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("micro_batch_tokens", [8192, 20])
def test_behaviour_logprobs_are_the_policys_whatever_the_padding(policy, directory, temperature, micro_batch_tokens):
    groups = drawn(policy, directory, samples=9, temperature=temperature, micro_batch_tokens=micro_batch_tokens)
    expected = learner_logprobs(policy, groups, temperature)
    found = [rollout.behavior_logprobs for group in groups for rollout in group.rollouts]
    assert [len(f) for f in found] == [len(e) for e in expected]
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-5)
    assert np.ptp(np.concatenate(expected)) > 1, "log-probabilities that hardly differ would prove little"


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_responses_are_drawn_with_their_probabilities(policy, directory, temperature):
    """Pearson's χ² over all 40 responses, rare ones together, at the 99.9% point (Wilson and Hilferty)."""
    samples = 4000
    for group in drawn(policy, directory, samples=samples, temperature=temperature):
        with torch.no_grad():
            probabilities = log_probabilities(policy, group.prompt.token_ids, temperature).exp()
        assert float(probabilities.sum()) == pytest.approx(1.0, abs=1e-5)
        count = Counter(tuple(rollout.response_ids.tolist()) for rollout in group.rollouts)
        cells = [(count.pop(y, 0), samples * float(p)) for y, p in zip(responses(), probabilities, strict=True)]
        assert not count, "a response that cannot be"
        common = [cell for cell in cells if cell[1] >= 5]
        rare = [sum(column) for column in zip(*(cell for cell in cells if cell[1] < 5), strict=True)] or [0, 0.0]
        cells = [*common, *([(rare[0], rare[1])] if rare[1] >= 5 else [])]
        assert len(cells) >= 8
        statistic = sum((found - expected) ** 2 / expected for found, expected in cells)
        degrees = len(cells) - 1
        limit = degrees * (1 - 2 / (9 * degrees) + 3.09 * math.sqrt(2 / (9 * degrees))) ** 3
        assert statistic < limit


def test_a_response_ends_with_its_end_token_or_is_cut_and_says_which(policy, directory):
    tokenizer = load_tokenizer(directory)
    assert end_tokens(policy, tokenizer) == {END}
    reasons = Counter[str]()
    for group in drawn(policy, directory, samples=200):
        for rollout in group.rollouts:
            ids = rollout.response_ids.tolist()
            reasons[rollout.finish_reason] += 1
            assert END not in ids[:-1]
            assert (rollout.finish_reason == "stop") == (ids[-1] == END)
            assert rollout.finish_reason == "stop" or len(ids) == LONGEST
            assert rollout.text == "".join("01"[token - 2] for token in ids if token >= 2)
    assert min(reasons["stop"], reasons["length"]) > 20


def test_groups_say_what_sampled_them_and_keep_the_order_of_the_prompts(policy, directory):
    groups = drawn(policy, directory, samples=3, version=6)
    assert [group.prompt for group in groups] == PROMPTS
    for group in groups:
        assert [rollout.sample for rollout in group.rollouts] == [0, 1, 2]
        for rollout in group.rollouts:
            assert rollout.loss_mask.all()
            assert rollout.token_versions().tolist() == [6] * len(rollout.response_ids)


def test_the_seed_decides_the_samples_and_samples_of_one_prompt_differ(policy, directory):
    def ids(seed: int) -> list[list[int]]:
        groups = drawn(policy, directory, samples=12, seed=seed)
        return [rollout.response_ids.tolist() for group in groups for rollout in group.rollouts]

    assert ids(1) == ids(1)
    assert ids(1) != ids(2)
    assert len({tuple(response) for response in ids(1)[:12]}) > 2


def test_sampling_leaves_the_model_in_its_mode(policy, directory):
    assert policy.model.training
    drawn(policy, directory, samples=1)
    assert policy.model.training
