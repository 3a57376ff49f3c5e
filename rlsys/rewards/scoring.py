"""Rewards of a group: checked, bounded in time, retried, and never silently zero."""

import numbers
import queue
import threading
import time
from concurrent.futures import Future

import numpy as np

from rlsys.errors import RewardError
from rlsys.records import GroupScore, Prompt, Response, RolloutGroup
from rlsys.rewards.base import RewardFn

_BACKOFF_S = 0.1
_callers = threading.local()
"""The `_Caller` of each thread that scores."""

_LARGEST = float(np.finfo(np.float32).max)


def score_group(fn: RewardFn, group: RolloutGroup, *, timeout_s: float, retries: int) -> GroupScore:
    """The reward of every response of `group`, in order.

    Each call may take `timeout_s`; one that raises, hangs or returns anything but a finite number is tried
    `retries` times more, waiting twice as long each time. Then RewardError, chained to the last failure.
    """
    rewards = [
        _score(fn, group.prompt, Response(text=r.text, finished=r.finish_reason == "stop"), timeout_s, retries)
        for r in group.rollouts
    ]
    return GroupScore(
        slot=group.slot, attempt=group.attempt, rewards=np.array(rewards, dtype=np.float32), scored_at=time.time()
    )


def _score(fn: RewardFn, prompt: Prompt, response: Response, timeout_s: float, retries: int) -> float:
    for retry in range(retries + 1):
        caller = getattr(_callers, "mine", None) or _Caller()
        _callers.mine = caller
        future = caller.start(fn, prompt, response)
        try:
            error = future.exception(timeout_s)
        except TimeoutError:
            _callers.mine = None
            failure, error = f"did not return within {timeout_s} s", None
        else:
            if error is None and (reward := _finite(future.result())) is not None:
                return reward
            failure = f"raised {error!r}" if error else f"returned {future.result()!r:.200}, not a finite number"
        if retry < retries:
            time.sleep(_BACKOFF_S * 2**retry)
    raise RewardError(
        f"reward of prompt {prompt.index} of epoch {prompt.epoch} ({prompt.text!r:.80}), "
        f"response {response.text!r:.80}: {failure} (tried {retries + 1} times)"
    ) from error


class _Caller:
    """Calls reward functions in a daemon thread, one after another.

    Not an executor: Python joins an executor's threads when it exits, and a hung one never ends. A caller that
    hangs is left behind and a new one takes its place.
    """

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[Future[object], RewardFn, Prompt, Response]] = queue.SimpleQueue()
        threading.Thread(target=self._work, name="reward", daemon=True).start()

    def start(self, fn: RewardFn, prompt: Prompt, response: Response) -> Future[object]:
        """The future result of `fn(prompt, response)`."""
        future: Future[object] = Future()
        self._calls.put((future, fn, prompt, response))
        return future

    def _work(self) -> None:
        while True:
            future, fn, prompt, response = self._calls.get()
            try:
                future.set_result(fn(prompt, response))
            except BaseException as error:  # also SystemExit, which would end this thread
                future.set_exception(error)


def _finite(value: object) -> float | None:
    """`value` as a float if it is a real number that float32 can hold, else None."""
    if not isinstance(value, numbers.Real | np.bool_):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if abs(number) <= _LARGEST else None  # False for NaN
