"""What a reward function is."""

from typing import Protocol

from rlsys.records import Prompt, Response


class RewardFn(Protocol):
    """Any callable from a prompt and one response to a finite number; higher is better.

    It is called from a worker thread, may be called again after it raised, and must not keep state.
    """

    def __call__(self, prompt: Prompt, response: Response, /) -> float: ...
