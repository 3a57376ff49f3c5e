"""Groups that finished in the same decode step travel as one object, a bundle.

One Ray call costs as much as decoding several short responses; a bundle shares it among the groups in it.
"""

from collections.abc import Sequence

from rlsys.records import RolloutGroup

Bundle = Sequence[RolloutGroup]
Place = tuple[int, int]
"""Which of several bundles, and which group in it."""


def select(places: Sequence[Place], bundles: Sequence[Bundle]) -> list[RolloutGroup]:
    """The groups at `places`, in their order."""
    return [bundles[bundle][group] for bundle, group in places]
