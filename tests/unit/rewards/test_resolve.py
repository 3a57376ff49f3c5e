"""`reward.function` becomes a function, or an error that says which part of it failed."""

import sys

import pytest

import rlsys.rewards
from rlsys.errors import ConfigError
from rlsys.records import Prompt, Response
from rlsys.rewards import exact_match, math_verify, resolve_reward

PROMPT = Prompt(epoch=0, index=0, text="?", token_ids=(1,), answer="19")
RESPONSE = Response(text="19", finished=True)


def task_score(prompt, response):
    return 0.25


def test_exports_are_pinned():
    assert set(rlsys.rewards.__all__) == {"RewardFn", "exact_match", "math_verify", "resolve_reward", "score_group"}


def test_built_in_names():
    assert resolve_reward("task", task_score) is task_score
    assert resolve_reward("exact_match", task_score) is exact_match
    assert resolve_reward("math_verify", task_score) is math_verify


def test_a_function_in_the_working_directory_is_found(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text("def half(prompt, response): return 0.5")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert resolve_reward("my_rewards:half", task_score)(PROMPT, RESPONSE) == 0.5


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", r"reward.function='nothing': expected one of task, exact_match, math_verify, or package"),
        ("no_such_module:f", r"reward.function='no_such_module:f': ModuleNotFoundError"),
        ("math:missing", r"reward.function='math:missing': AttributeError: .*no attribute 'missing'"),
        ("math:pi", r"reward.function='math:pi': expected a function, found 3.14"),
    ],
)
def test_what_failed_is_named(name, message):
    with pytest.raises(ConfigError, match=message):
        resolve_reward(name, task_score)
