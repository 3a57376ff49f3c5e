"""Sections for what the model is asked and how its answers become numbers."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from rlsys.config.section import Flag, NonNegative, Positive, PositiveFloat, Section, require_target


class ArithmeticTask(Section):
    """Questions such as `12+345=`, made on the fly; exact answer then end-of-sequence."""

    name: Literal["arithmetic"]
    operators: tuple[Literal["+", "-", "*"], ...] = ("+",)
    digits: Positive = 2
    """Operands have 1 to `digits` digits."""
    operands: Annotated[int, Field(strict=True, ge=2)] = 2
    eval_size: Positive = 512
    """Held-out questions; never sampled for training."""

    @field_validator("operators")
    @classmethod
    def _some(cls, operators: tuple[str, ...]) -> tuple[str, ...]:
        if not operators:
            raise ValueError("must name at least one of '+', '-', '*'")
        return operators


class ReasoningGymTask(Section):
    """Any dataset of the reasoning-gym library, scored by that dataset's own scorer."""

    name: Literal["reasoning_gym"]
    dataset: str
    options: dict[str, Any] = {}
    """Passed to the dataset, e.g. {min_terms: 2, max_terms: 3}."""
    size: Positive = 10_000
    eval_size: Positive = 256
    chat: Flag | None = None
    """Apply the tokenizer's chat template. None: if it has one."""


class JsonlTask(Section):
    """Prompt and answer columns of a .jsonl, .json, .csv or .parquet file."""

    name: Literal["jsonl"]
    path: Path
    prompt_column: str = "prompt"
    answer_column: str = "answer"
    eval_path: Path | None = None
    """Held-out file. None: the last `eval_size` rows of `path`."""
    eval_size: Positive = 256
    chat: Flag | None = None
    """Apply the tokenizer's chat template. None: if it has one."""


class CustomTask(Section):
    """A task class of yours, `package.module:Class`; see `rlsys.tasks.Task`."""

    name: Literal["custom"]
    target: str
    options: dict[str, Any] = {}

    @field_validator("target")
    @classmethod
    def _names_an_object(cls, target: str) -> str:
        return require_target(target)


TaskConfig = Annotated[ArithmeticTask | ReasoningGymTask | JsonlTask | CustomTask, Field(discriminator="name")]


class RewardConfig(Section):
    """How a response becomes a number."""

    function: str = "task"
    """`task` (the task's own scorer), `exact_match`, `math_verify`, or yours as `package.module:function`."""
    workers: Positive = 1
    timeout_s: PositiveFloat = 30.0
    retries: NonNegative = 2

    @field_validator("function")
    @classmethod
    def _known(cls, function: str) -> str:
        if function in ("task", "exact_match", "math_verify"):
            return function
        if ":" not in function:
            raise ValueError("must be 'task', 'exact_match', 'math_verify', or package.module:function")
        return require_target(function)
