"""Prompts and what scores them: arithmetic, reasoning-gym, files, or a class of yours; resumable sources."""

from collections.abc import Callable
from typing import Any

from rlsys.config import TaskConfig
from rlsys.tasks.arithmetic import Arithmetic
from rlsys.tasks.base import Item, Task
from rlsys.tasks.custom import load_custom
from rlsys.tasks.encoding import check_lengths, make_encoder
from rlsys.tasks.jsonl import Jsonl
from rlsys.tasks.reasoning_gym import ReasoningGym
from rlsys.tasks.source import Encode, PromptSource, make_prompt

__all__ = ["Encode", "Item", "PromptSource", "Task", "build_task", "check_lengths", "make_encoder", "make_prompt"]

_TASKS: dict[str, Callable[[Any, int], Task]] = {
    "arithmetic": Arithmetic,
    "reasoning_gym": ReasoningGym,
    "jsonl": lambda config, _: Jsonl(config),
    "custom": lambda config, _: load_custom(config),
}


def build_task(config: TaskConfig, seed: int) -> Task:
    """The task a configuration names. Raises ConfigError or DataError, before anything else starts."""
    return _TASKS[config.name](config, seed)
