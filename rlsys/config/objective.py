"""Sections for what the learner maximises: the surrogate, its correction, advantages, and the KL term."""

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from rlsys.config.section import (
    Flag,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Section,
    refusal,
    refuse_unused,
    set_options,
)

CorrectionName = Literal["none", "tis", "mask_token", "mask_sequence", "m2"]
CORRECTION_FIELDS: dict[str, frozenset[str]] = {
    "none": frozenset(),
    "tis": frozenset({"cap"}),
    "mask_token": frozenset({"low", "high"}),
    "mask_sequence": frozenset({"low", "high", "cap"}),
    "m2": frozenset({"tau"}),
}
CORRECTION_BANDS: dict[str, tuple[float, float]] = {"mask_token": (0.5, 5.0), "mask_sequence": (0.8, 1.25)}
"""`low` and `high` where they are not set."""


class CorrectionConfig(Section):
    """What is done about q = π_V/μ, the ratio fixed during a step."""

    name: CorrectionName = "none"
    cap: PositiveFloat | None = None
    low: NonNegativeFloat | None = None
    high: PositiveFloat | None = None
    tau: PositiveFloat | None = None

    @model_validator(mode="after")
    def _only_its_options(self) -> Self:
        refuse_unused(self, self.name, CORRECTION_FIELDS[self.name], {"cap", "low", "high", "tau"})
        if self.name in CORRECTION_BANDS:
            self._require_interval(*CORRECTION_BANDS[self.name])
        return self

    def _require_interval(self, lowest: float, highest: float) -> None:
        """Refuse a band, of what is set and of the defaults given, that holds nothing."""
        low, high = lowest if self.low is None else self.low, highest if self.high is None else self.high
        if low < high:
            return
        if self.low is None:
            raise refusal("high", high, f"must be greater than low={low}, its default with name={self.name}")
        default = f", its default with name={self.name}" if self.high is None else ""
        raise refusal("low", low, f"must be less than high={high}{default}")

    def options(self) -> dict[str, float]:
        """The options that were set, by name."""
        return set_options(self, {"cap", "low", "high", "tau"})


ObjectiveName = Literal[
    "reinforce",
    "is_token",
    "is_sequence",
    "is_sequence_truncated",
    "is_token_truncated",
    "ppo_clip",
    "decoupled_ppo",
    "cispo",
    "aipo",
    "gspo",
    "raft",
]
OBJECTIVE_FIELDS: dict[str, frozenset[str]] = {
    "reinforce": frozenset(),
    "is_token": frozenset(),
    "is_sequence": frozenset(),
    "is_sequence_truncated": frozenset({"clip_low", "clip_high"}),
    "is_token_truncated": frozenset({"clip_low", "clip_high"}),
    "ppo_clip": frozenset({"clip_low", "clip_high", "dual_clip"}),
    "decoupled_ppo": frozenset({"clip_low", "clip_high"}),
    "cispo": frozenset({"cap"}),
    "aipo": frozenset({"cap"}),
    "gspo": frozenset({"clip_low", "clip_high"}),
    "raft": frozenset(),
}
_OBJECTIVE_OPTIONS = {"clip_low", "clip_high", "dual_clip", "cap"}
SEQUENCE_OBJECTIVES = frozenset({"is_sequence", "is_sequence_truncated", "gspo"})


class ObjectiveConfig(Section):
    """The surrogate the learner maximises. Unset options take the objective's published default."""

    name: ObjectiveName = "ppo_clip"
    reduce: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"
    correction: CorrectionConfig = CorrectionConfig()
    """A correction's name, or a section with its options."""
    clip_low: PositiveFloat | None = None
    """Ratios below 1 - clip_low are clipped."""
    clip_high: PositiveFloat | None = None
    """Ratios above 1 + clip_high are clipped."""
    dual_clip: Annotated[float, Field(strict=True, gt=1)] | None = None
    """`ppo_clip`: with a negative advantage A the term is no lower than dual_clip·A."""
    cap: PositiveFloat | None = None
    """`cispo`, `aipo`: largest importance weight."""

    @field_validator("correction", mode="before")
    @classmethod
    def _name_alone(cls, value: object) -> object:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        refuse_unused(self, self.name, OBJECTIVE_FIELDS[self.name], _OBJECTIVE_OPTIONS)
        if self.name in SEQUENCE_OBJECTIVES and self.correction.name in ("mask_token", "m2"):
            raise refusal(
                "correction.name",
                self.correction.name,
                f"masks single tokens, but {self.name!r} has one weight per response; "
                "must be 'none', 'tis' or 'mask_sequence'",
            )
        return self

    def options(self) -> dict[str, float]:
        """The options that were set, by name."""
        return set_options(self, _OBJECTIVE_OPTIONS)


class AdvantageConfig(Section):
    """How rewards of a group become advantages."""

    name: Literal["group_mean", "grpo", "rloo", "batch_whiten", "reinforce_ada"] = "grpo"
    """`reinforce_ada` compares with all samples drawn for a prompt; where all of them are trained, as `group_mean`."""


KL_SCHEDULE_FIELDS: dict[str, frozenset[str]] = {
    "fixed": frozenset(),
    "linear": frozenset({"final_coef"}),
    "adaptive": frozenset({"target", "horizon"}),
}


class KLConfig(Section):
    """KL to the frozen reference policy."""

    coef: NonNegativeFloat = 0.0
    """Coefficient β; the initial one when `schedule` is not fixed."""
    estimator: Literal["k1", "k2", "k3"] = "k3"
    placement: Literal["loss", "reward"] = "loss"
    cap: PositiveFloat = 2.0
    """Cap of the importance weight on the KL term in the loss."""
    schedule: Literal["fixed", "linear", "adaptive"] = "fixed"
    final_coef: NonNegativeFloat = 0.0
    """Where `linear` ends."""
    target: PositiveFloat = 1.0
    """Per-sequence KL that `adaptive` aims at."""
    horizon: Positive = 10_000
    """Responses over which `adaptive` reacts (Ziegler 2019)."""
    reference: Flag = True
    """Run the reference actor even when coef is 0, so that the KL is reported."""

    @property
    def acts(self) -> bool:
        """Whether β is above 0 at some step."""
        return self.coef > 0 or (self.schedule == "linear" and self.final_coef > 0)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        refuse_unused(self, self.schedule, KL_SCHEDULE_FIELDS[self.schedule], {"final_coef", "target", "horizon"})
        if self.acts and not self.reference:
            positive = f"coef={self.coef}" if self.coef > 0 else f"final_coef={self.final_coef}"
            raise refusal("reference", False, f"must be true with {positive}: a KL term needs the reference actor")
        if self.acts and self.placement == "loss" and self.estimator == "k1":
            raise refusal(
                "estimator",
                "k1",
                "must be 'k2' or 'k3' with placement=loss, where the gradient of k1 is zero on average; "
                "or set placement=reward",
            )
        if self.schedule == "adaptive" and not self.coef > 0:
            raise refusal("coef", self.coef, "must be greater than 0 with schedule=adaptive, which starts from it")
        return self
