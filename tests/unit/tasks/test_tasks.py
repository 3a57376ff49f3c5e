"""The room's door: what it exports, how a task is built from a configuration, and what importing it costs."""

import subprocess
import sys

import pytest

import rlsys.tasks
from rlsys.config import ArithmeticTask, CustomTask, JsonlTask, ReasoningGymTask, TaskConfig
from rlsys.errors import ConfigError
from rlsys.records import Prompt, Response
from rlsys.tasks import build_task

MINE = """
from rlsys.tasks import Item, Task


class Reverse(Task):
    size = 1000

    def __init__(self, letters="abc"):
        self.letters = letters

    def train_item(self, index):
        word = f"{index:03d}{self.letters}"
        return Item(f"{word}>", word[::-1])

    def eval_items(self):
        return [Item("xyz>", "zyx")]


class Sizeless(Reverse):
    size = 0


def function():
    pass
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module `my_tasks` in the working directory, which is not on the import path."""
    (tmp_path / "my_tasks.py").write_text(MINE)
    (tmp_path / "broken_tasks.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("my_tasks", None)


def custom(target, **options):
    return build_task(CustomTask(name="custom", target=target, options=options), seed=0)


def test_exports_are_pinned():
    assert set(rlsys.tasks.__all__) == {
        *("Encode", "Item", "PromptSource", "Task"),
        *("build_task", "check_lengths", "make_encoder", "make_prompt"),
    }


def test_importing_tasks_and_rewards_loads_nothing_heavy():
    heavy = ("torch", "ray", "vllm", "transformers", "datasets", "reasoning_gym", "math_verify", "sympy")
    code = f"import sys, rlsys.tasks, rlsys.rewards; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_every_kind_of_configuration_is_built(tmp_path, mine):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "answer": "b"}\n' * 3)
    configs: list[TaskConfig] = [
        ArithmeticTask(name="arithmetic"),
        ReasoningGymTask(name="reasoning_gym", dataset="chain_sum"),
        JsonlTask(name="jsonl", path=path, eval_size=1),
        CustomTask(name="custom", target="my_tasks:Reverse"),
    ]
    assert [type(build_task(config, 0)).__name__ for config in configs] == [
        "Arithmetic",
        "ReasoningGym",
        "Jsonl",
        "Reverse",
    ]


def test_a_class_of_the_users_own_needs_only_its_items(mine):
    task = custom("my_tasks:Reverse", letters="q")
    prompt = Prompt(epoch=0, index=0, text="7>", token_ids=(1,), answer=task.train_item(7).answer)
    assert prompt.answer == "q700"
    assert task.alphabet() == "0123456789>qxyz"
    assert task.score(prompt, Response(text=" q700\n", finished=True)) == 1.0
    assert task.score(prompt, Response(text="q700", finished=False)) == 0.0
    assert task.score(prompt, Response(text="q70", finished=True)) == 0.0


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("no_such_module:Task", {}, r"task.target='no_such_module:Task': ModuleNotFoundError"),
        ("broken_tasks:Task", {}, r"task.target='broken_tasks:Task': ZeroDivisionError"),
        ("my_tasks:Missing", {}, r"task.target='my_tasks:Missing': AttributeError"),
        ("my_tasks:function", {}, r"task.target='my_tasks:function': expected a subclass of rlsys.tasks.Task"),
        ("my_tasks:Reverse", {"nope": 1}, r"task.options=\{'nope': 1\}: Reverse raised TypeError"),
        ("my_tasks:Sizeless", {}, r"task.target='my_tasks:Sizeless': its size is 0"),
    ],
)
def test_a_class_that_cannot_be_used_says_why(mine, target, options, message):
    with pytest.raises(ConfigError, match=message):
        custom(target, **options)
