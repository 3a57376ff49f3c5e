"""The reference actor: log-probabilities of the frozen reference policy for the KL."""

from collections.abc import Sequence

import ray

from rlsys.actors.bundle import Bundle, Place, select
from rlsys.actors.process import settle
from rlsys.config.schema import RunConfig
from rlsys.observability.spans import Span, SpanLog
from rlsys.records import FloatArray


@ray.remote(concurrency_groups={"control": 1})
class ReferenceActor:
    """Scores the next batch while the learner works on the current one."""

    def __init__(self, path: str, config: RunConfig) -> None:
        on_gpu = config.resources.reference_gpus > 0
        settle("other", config, on_gpu=on_gpu)
        import torch

        from rlsys.learning.scorer import Scorer

        torch.set_num_threads(1)
        self._spans = SpanLog()
        self._scorer = Scorer(
            path,
            dtype=config.model.dtype,
            temperature=config.rollout.temperature,
            row_tokens=config.learner.row_tokens,
            micro_batch_tokens=config.learner.micro_batch_tokens,
            device="cuda" if on_gpu else "cpu",
        )

    def score(self, places: Sequence[Place], *bundles: Bundle) -> list[FloatArray]:
        """log π_ref per response, [T] each: groups in order, rollouts in order."""
        with self._spans.span("reference", groups=len(places)):
            return self._scorer.score(select(places, bundles))

    @ray.method(concurrency_group="control")
    def spans(self) -> list[Span]:
        """What it did since the last call."""
        return self._spans.take()

    @ray.method(concurrency_group="control")
    def ready(self) -> bool:
        """The model is loaded."""
        return True
