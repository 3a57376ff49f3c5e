"""Run configuration: YAML plus dotted overrides, checked before anything starts."""

from rlsys.config.load import dump_config, load_config, parse_config
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
    "dump_config",
    "load_config",
    "parse_config",
]
