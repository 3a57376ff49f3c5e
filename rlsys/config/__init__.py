"""Run configuration: YAML plus dotted overrides, checked before anything starts."""

from rlsys.config.load import load_config, parse_config
from rlsys.config.schema import (
    ArithmeticTask,
    CustomTask,
    JsonlTask,
    ReasoningGymTask,
    RunConfig,
    TaskConfig,
)

__all__ = [
    "ArithmeticTask",
    "CustomTask",
    "JsonlTask",
    "ReasoningGymTask",
    "RunConfig",
    "TaskConfig",
    "load_config",
    "parse_config",
]
