"""Rewards for answers that can be checked. A response that was cut off is wrong."""

import threading
from typing import Any

from rlsys.errors import DataError
from rlsys.records import Prompt, Response

_TIMEOUT_S = 5


def exact_match(prompt: Prompt, response: Response) -> float:
    """1.0 if the response is the answer up to surrounding whitespace, else 0.0."""
    return float(response.finished and response.text.strip() == prompt.answer.strip())


def math_verify(prompt: Prompt, response: Response) -> float:
    """1.0 if the response's last mathematical expression equals the answer (1/2 = 0.5 = \\frac{1}{2}), else 0.0.

    A response without one is wrong. Raises DataError if the *answer* has none.
    """
    from math_verify import verify

    gold = _parse(f"${prompt.answer}$") or _parse(prompt.answer)
    if not gold:
        raise DataError(f"prompt {prompt.index} of epoch {prompt.epoch}: answer {prompt.answer!r} is not mathematics")
    if not response.finished:
        return 0.0
    if response.text.strip() == prompt.answer.strip():
        return 1.0
    return float(verify(gold, _parse(response.text), timeout_seconds=_timeout()))


def _parse(text: str) -> list[Any]:
    """The expressions the library finds, or [] if it finds none beside the bare text itself."""
    from math_verify import parse

    found = parse(text, parsing_timeout=_timeout())
    return found if any(not isinstance(one, str) for one in found) else []


def _timeout() -> int | None:
    """The library's timeouts are signals, which only the main thread gets; elsewhere `score_group` has its own."""
    return _TIMEOUT_S if threading.current_thread() is threading.main_thread() else None
