"""What the README shows in Python works as it stands."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlsys.config import load_config
from rlsys.records import Response
from tests.fakes import make_prompt

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def shown(what: str) -> dict[str, Any]:
    """The names that the block which contains `what` defines."""
    (block,) = (block for block in BLOCKS if what in block)
    assert block.count("\n") < 20
    names: dict[str, Any] = {"__name__": "readme"}
    exec(block, names)
    return names


def test_the_task_asks_for_words_backwards_and_holds_out_words_that_are_not_trained() -> None:
    task = shown("class Reverse")["Reverse"]()
    trained = {task.train_item(index).text for index in range(task.size)}
    held_out = task.eval_items()
    assert len(trained) == task.size
    assert len({item.text for item in held_out} - trained) == len(held_out) == 200
    assert all(item.answer == item.text[-2::-1] for item in held_out)


def test_the_reward_is_one_for_a_finished_right_answer_and_zero_otherwise() -> None:
    score, prompt = shown("def score")["score"], replace(make_prompt(0), answer="42")
    assert score(prompt, Response(text="42", finished=True)) == 1.0
    assert score(prompt, Response(text="42", finished=False)) == 0.0
    assert score(prompt, Response(text="24", finished=True)) == 0.0


def test_the_training_example_names_a_configuration_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (block,) = (block for block in BLOCKS if "load_config" in block)
    path, override = re.findall(r'"([^"]+)"', block)
    assert load_config(path, [override]).rollout.workers == 2
