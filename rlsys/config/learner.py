"""The optimizer step, and the processes that take it together."""

from typing import Literal, Self

from pydantic import model_validator

from rlsys.config.section import (
    Flag,
    Momentum,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Section,
    refusal,
)

Sharding = Literal["replicated", "fsdp"]


class LearnerConfig(Section):
    """The optimizer step."""

    steps: Positive = 100
    """Optimizer batches to train."""
    lr: PositiveFloat = 5e-4
    warmup_steps: NonNegative = 5
    schedule: Literal["constant", "linear"] = "linear"
    """After warm-up: constant, or linear decay to zero at `steps`."""
    betas: tuple[Momentum, Momentum] = (0.9, 0.95)
    weight_decay: NonNegativeFloat = 0.0
    grad_clip: PositiveFloat = 1.0
    updates_per_batch: Positive = 1
    """Mini-batches (optimizer updates) made from one batch."""
    micro_batch_tokens: Positive = 8192
    """Tokens of one forward/backward pass; the gradient does not depend on it."""
    row_tokens: Positive = 64
    """Row length for sequence packing; grows to the longest sequence. In a row a shared prefix is computed once."""
    gradient_checkpointing: Flag = False
    max_nonfinite_steps: Positive = 3
    """Stop after this many refused steps in a row."""
    ranks: Positive = 1
    """Processes that share each batch, with the gradient of one; each has `resources.learner_threads` and `_gpus`."""
    sharding: Sharding = "replicated"
    """replicated: each rank holds the whole policy. fsdp: it and the optimizer state are divided among them (FSDP2)."""
    rank_timeout_s: PositiveFloat = 300.0
    """A rank that keeps the others waiting for longer ends the run."""

    @model_validator(mode="after")
    def _nothing_to_divide(self) -> Self:
        if self.sharding == "fsdp" and self.ranks == 1:
            raise refusal("sharding", self.sharding, "needs ranks of at least 2: one rank holds everything")
        return self
