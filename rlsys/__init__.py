"""Asynchronous actor/learner reinforcement learning for language models, with staleness visible and measured.

from rlsys import load_config, train

result = train(load_config("configs/quickstart.yaml", ["rollout.workers=2"]))
print(result.before, result.after)
"""

from typing import TYPE_CHECKING, Any

from rlsys.config import RunConfig, load_config
from rlsys.errors import RlsysError

if TYPE_CHECKING:
    from rlsys.control.lifecycle import TrainResult, train

__all__ = ["RlsysError", "RunConfig", "TrainResult", "load_config", "train"]


def __getattr__(name: str) -> Any:
    """Import what needs Ray only when it is used."""
    if name in ("TrainResult", "train"):
        from rlsys.control import lifecycle

        return getattr(lifecycle, name)
    raise AttributeError(f"module 'rlsys' has no attribute {name!r}")
