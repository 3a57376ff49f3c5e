"""A user's own task and reward, in a file of their own beside their script, trained through the public names."""

import json
from pathlib import Path

import pytest

from tests.integration.running import SMALL, python, responses, steps, write_config

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

MINE = '''
"""What a user would write."""

from rlsys.tasks import Item, Task


class Repeat(Task):
    """Say the letter again."""

    def __init__(self, letters: str) -> None:
        self._letters = letters
        self.size = len(letters) * 10

    def train_item(self, index: int) -> Item:
        letter, times = self._letters[index // 10], index % 10 + 1
        return Item(letter * times, letter, {"times": times})

    def eval_items(self) -> list[Item]:
        return [Item(letter * 11, letter, {"times": 11}) for letter in self._letters]


def closeness(prompt, response) -> float:
    assert prompt.info["times"] == len(prompt.text)
    return 1.0 if response.finished and response.text == prompt.answer else 0.25
'''

SCRIPT = """
import json
import sys

from rlsys import load_config, train

seen = []

if __name__ == "__main__":
    result = train(load_config("run.yaml", sys.argv[1:]), on_status=lambda status: seen.append(status.phase))
    print(json.dumps({
        "version": result.version,
        "before": result.before,
        "after": result.after,
        "checkpoint": str(result.checkpoint),
        "phases": sorted(set(seen)),
    }))
"""


def test_a_users_task_and_reward_train_through_the_public_names(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "script.py").write_text(SCRIPT)
    write_config(
        tmp_path,
        task={"name": "custom", "target": "mine:Repeat", "options": {"letters": "abcdef"}},
        reward={"function": "mine:closeness"},
    )
    outcome = python(tmp_path, "script.py", "learner.steps=3", "eval.max_prompts=6")
    assert outcome.code == 0, outcome.stderr
    result = json.loads(outcome.stdout.splitlines()[-1])
    assert result["version"] == 3
    assert "finished" in result["phases"]
    assert 0.25 <= result["before"] <= 1
    assert 0.25 <= result["after"] <= 1
    assert (Path(result["checkpoint"]) / "model.safetensors").is_file()
    run = tmp_path / "runs" / "run"
    assert len(steps(run)) == 3
    recorded = responses(run)
    assert {r["reward"] for r in recorded} <= {0.25, 1.0}
    assert all(set(r["prompt_text"]) <= set("abcdef") for r in recorded)
    assert len(recorded) == 3 * SMALL["rollout"]["prompts_per_step"] * SMALL["rollout"]["samples_per_prompt"]
    assert outcome.stderr == ""
    assert outcome.left == []
