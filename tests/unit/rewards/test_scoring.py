"""A reward is a finite number or an error; nothing becomes zero silently."""

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from rlsys.errors import RewardError
from rlsys.records import Prompt, Rollout, RolloutGroup
from rlsys.rewards import scoring
from rlsys.rewards.scoring import score_group


@pytest.fixture(autouse=True)
def no_backoff(monkeypatch):
    monkeypatch.setattr(scoring, "_BACKOFF_S", 0.0)


def group(*texts):
    empty = np.zeros(0)
    rollouts = tuple(
        Rollout(
            sample=number,
            response_ids=empty.astype(np.int32),
            behavior_logprobs=empty.astype(np.float32),
            loss_mask=empty.astype(np.bool_),
            version_spans=(),
            finish_reason="length" if text.endswith("...") else "stop",
            text=text,
        )
        for number, text in enumerate(texts)
    )
    prompt = Prompt(epoch=2, index=4, text="12+7=", token_ids=(1,), answer="19")
    return RolloutGroup(
        slot=7, attempt=1, worker="w", prompt=prompt, rollouts=rollouts, started_at=0.0, finished_at=1.0
    )


def scored(fn, *texts, timeout_s=5.0, retries=0):
    return score_group(fn, group(*texts), timeout_s=timeout_s, retries=retries)


def test_rewards_come_in_the_order_of_the_responses():
    score = scored(lambda prompt, response: len(response.text) + response.finished, "a", "abc", "ab...")
    assert score.rewards.tolist() == [2.0, 4.0, 5.0]
    assert score.rewards.dtype == np.float32
    assert (score.slot, score.attempt) == (7, 1)
    assert score.scored_at > 1.0


@pytest.mark.parametrize("value", [1, 1.0, True, np.float32(1), np.float64(1), np.int64(1), np.bool_(True)])
def test_every_kind_of_real_number_is_a_reward(value):
    assert scored(lambda prompt, response: value, "a").rewards.tolist() == [1.0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e39, 10**400, None, "1", 1j, [1.0], np.ones(1)])
def test_anything_else_is_an_error_naming_prompt_and_value(value):
    with pytest.raises(
        RewardError, match=r"prompt 4 of epoch 2 \('12\+7='\), response 'a': returned .*finite"
    ) as caught:
        scored(lambda prompt, response: value, "a")
    assert repr(value)[:20] in str(caught.value)


def test_an_exception_is_retried_and_then_chained():
    calls = []

    def broken(prompt, response):
        calls.append(response.text)
        raise KeyError("missing")

    with pytest.raises(RewardError, match=r"raised KeyError\('missing'\) \(tried 3 times\)") as caught:
        scored(broken, "a", "b", retries=2)
    assert calls == ["a"] * 3
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_reward_that_recovers_within_its_retries_is_used():
    values = iter([float("nan"), None, 0.5])
    assert scored(lambda prompt, response: next(values), "a", retries=2).rewards.tolist() == [0.5]


def test_waits_between_tries_double(monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr(scoring, "_BACKOFF_S", 0.1)
    monkeypatch.setattr("rlsys.rewards.scoring.time.sleep", waits.append)
    with pytest.raises(RewardError):
        scored(lambda prompt, response: None, "a", retries=3)
    assert waits == [0.1, 0.2, 0.4]


def test_a_hang_is_an_error():
    release = threading.Event()
    with pytest.raises(RewardError, match=r"did not return within 0.05 s \(tried 2 times\)"):
        scored(lambda prompt, response: release.wait(), "a", timeout_s=0.05, retries=1)
    release.set()


def test_a_reward_that_raises_timeout_error_did_not_hang():
    def impatient(prompt, response):
        raise TimeoutError("the judge is slow")

    with pytest.raises(RewardError, match=r"raised TimeoutError\('the judge is slow'\)"):
        scored(impatient, "a")


def test_a_reward_that_exits_does_not_take_the_process_along():
    with pytest.raises(RewardError, match="raised SystemExit"):
        scored(lambda prompt, response: sys.exit(1), "a")


def test_a_hung_reward_does_not_keep_python_from_exiting():
    code = """
import threading
from tests.unit.rewards.test_scoring import group
from rlsys.rewards import score_group
try:
    score_group(lambda *_: threading.Event().wait(), group("a"), timeout_s=0.05, retries=0)
except Exception as error:
    print(type(error).__name__)
"""
    root = Path(__file__).parents[3]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout == "RewardError\n"
