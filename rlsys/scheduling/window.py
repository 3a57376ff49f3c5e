"""How many versions of age to admit: additive increase, multiplicative decrease on the ESS.

Staleness costs effective samples. Fewer open prompts make younger data, and a learner that waits more. The rule of
TCP finds the widest window that keeps a target: widen a little while all is well, halve when it is not.
"""

from dataclasses import InitVar, dataclass, field


@dataclass(slots=True, kw_only=True)
class AimdWindow:
    """S, the learner steps whose prompts may be open beside the current one; between 0 and `widest`.

    It starts at `widest`, or at `start`, where a resumed run stood.

    >>> window = AimdWindow(target=0.7, increase=0.5, decrease=0.5, widest=4)
    >>> [window.after(ess) for ess in (0.9, 0.6, 0.6, 0.8, 0.8, None)]
    [4, 2.0, 1.0, 1.5, 2.0, 2.0]
    """

    target: float
    increase: float
    decrease: float
    widest: float
    start: InitVar[float | None] = None
    size: float = field(init=False)

    def __post_init__(self, start: float | None) -> None:
        self.size = self.widest if start is None else min(start, self.widest)

    def after(self, ess: float | None) -> float:
        """S after a step whose effective sample size was `ess`; an unknown one changes nothing."""
        if ess is not None:
            self.size = self.size * self.decrease if ess < self.target else min(self.widest, self.size + self.increase)
        return self.size

    def slots(self, groups_per_step: int, window: int = 1) -> int:
        """Open prompts: (S + 1)·P − (W − 1), at least P, so that a step can always be assembled."""
        return max(groups_per_step, int((self.size + 1) * groups_per_step) - (window - 1))
