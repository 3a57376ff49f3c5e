"""A task class of the user's own, named `package.module:Class`."""

import importlib
import sys
from pathlib import Path

from rlsys.config import CustomTask
from rlsys.errors import ConfigError
from rlsys.tasks.base import Task


def load_custom(config: CustomTask) -> Task:
    """`Class(**options)` of the named module, looked for in the working directory too.

    Raises ConfigError naming `task.target` or `task.options` if it cannot be imported or built, or is no Task.
    """
    module, _, name = config.target.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        target = getattr(importlib.import_module(module), name)
    except Exception as error:
        raise ConfigError(f"task.target={config.target!r}: {type(error).__name__}: {error}") from error
    if not (isinstance(target, type) and issubclass(target, Task)):
        raise ConfigError(f"task.target={config.target!r}: expected a subclass of rlsys.tasks.Task, found {target!r}")
    try:
        task = target(**config.options)
    except Exception as error:
        raise ConfigError(f"task.options={config.options}: {name} raised {type(error).__name__}: {error}") from error
    size = getattr(task, "size", None)
    if not isinstance(size, int) or size < 1:
        raise ConfigError(f"task.target={config.target!r}: its size is {size!r}; expected at least 1 training item")
    return task
