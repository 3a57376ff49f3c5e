"""From `reward.function` in a configuration to the function."""

import importlib
import sys
from pathlib import Path
from typing import cast

from rlsys.errors import ConfigError
from rlsys.rewards.base import RewardFn
from rlsys.rewards.verifiable import exact_match, math_verify


def resolve_reward(name: str, task_score: RewardFn) -> RewardFn:
    """The function for `task`, `exact_match`, `math_verify`, or `package.module:function` (working directory included).

    Raises ConfigError naming `reward.function`, its value, and what failed.
    """
    known: dict[str, RewardFn] = {"task": task_score, "exact_match": exact_match, "math_verify": math_verify}
    if name in known:
        return known[name]
    module, _, attribute = name.partition(":")
    if not (module and attribute):
        raise ConfigError(f"reward.function={name!r}: expected one of {', '.join(known)}, or package.module:function")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        function = getattr(importlib.import_module(module), attribute)
    except Exception as error:
        raise ConfigError(f"reward.function={name!r}: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise ConfigError(f"reward.function={name!r}: expected a function, found {function!r:.80}")
    return cast(RewardFn, function)
