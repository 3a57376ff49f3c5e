"""The sections of a run's configuration. Frozen; unknown keys are errors; every field says what it means.

Nothing here imports torch, ray or vllm, so that a configuration can be checked anywhere in milliseconds.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

# Strict, because pydantic would otherwise read `workers: true` as 1 and `pin_cores: 1` as true.
Integer = Annotated[int, Field(strict=True)]
Positive = Annotated[int, Field(strict=True, ge=1)]
NonNegative = Annotated[int, Field(strict=True, ge=0)]
PositiveFloat = Annotated[float, Field(strict=True, gt=0)]
NonNegativeFloat = Annotated[float, Field(strict=True, ge=0)]
Fraction = Annotated[float, Field(strict=True, ge=0, le=1)]
Momentum = Annotated[float, Field(strict=True, ge=0, lt=1)]
Flag = Annotated[bool, Field(strict=True)]
Dtype = Literal["float32", "bfloat16"]


class Section(BaseModel):
    """Base of all sections: frozen, strict about unknown keys, documented by its attribute docstrings."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )


def refusal(field: str, value: object, allowed: str) -> PydanticCustomError:
    """An error about one field, to be raised by a validator of its section (or of a section above it)."""
    return PydanticCustomError(
        "refusal", "{field}={value}: {allowed}", {"field": field, "value": value, "allowed": allowed}
    )


def _refuse_unused(section: Section, name: str, allowed: frozenset[str], options: set[str]) -> None:
    unused = sorted(o for o in options - allowed if getattr(section, o) is not None)
    if unused:
        also = f" ({' and '.join(unused[1:])} neither)" if unused[1:] else ""
        takes = ", ".join(sorted(allowed)) or "no options"
        raise refusal(unused[0], getattr(section, unused[0]), f"not used by {name!r}, which takes {takes}{also}")


def _set_options(section: Section, options: set[str]) -> dict[str, float]:
    return {o: float(v) for o in sorted(options) if (v := getattr(section, o)) is not None}


def _require_target(target: str) -> str:
    module, _, attribute = target.partition(":")
    if not attribute.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
        raise ValueError("must be package.module:name")
    return target


class TinyModelConfig(Section):
    """Architecture of a small Qwen2 made from scratch with a character tokenizer."""

    hidden_size: Positive = 128
    layers: Positive = 4
    heads: Positive = 4
    kv_heads: Positive = 2
    intermediate_size: Positive = 384
    tie_embeddings: Flag = True
    """Share the input embedding and the output head."""
    max_positions: Positive = 512

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden_size % self.heads:
            raise refusal("heads", self.heads, f"must divide hidden_size={self.hidden_size}")
        if self.hidden_size // self.heads % 2:
            raise refusal("heads", self.heads, f"hidden_size/heads={self.hidden_size // self.heads} must be even")
        if self.heads % self.kv_heads:
            raise refusal("kv_heads", self.kv_heads, f"must divide heads={self.heads}")
        return self


class WarmstartConfig(Section):
    """Supervised phase that gives a tiny model something to improve. Cached by the hash of what it depends on."""

    steps: Positive = 500
    batch_size: Positive = 256
    lr: PositiveFloat = 2e-3
    label_noise: Fraction = 0.0
    """Share of training answers replaced by the answer of another prompt, so that the start is imperfect."""
    cache_dir: Path = Path(".cache/warmstart")


class ModelConfig(Section):
    """The policy: a Hugging Face causal-LM directory, or a tiny model warm-started on the task."""

    path: str | None = None
    """Directory (or hub name) of a Hugging Face causal LM with tokenizer. None: warm-start `tiny`."""
    tiny: TinyModelConfig = TinyModelConfig()
    warmstart: WarmstartConfig = WarmstartConfig()
    dtype: Dtype = "float32"
    """Learner's parameter type."""
    max_context: Positive = 64
    """Longest prompt plus response, in tokens."""


class ArithmeticTask(Section):
    """Questions such as `12+345=`, made on the fly; exact answer then end-of-sequence."""

    name: Literal["arithmetic"]
    operators: tuple[Literal["+", "-", "*"], ...] = ("+",)
    digits: Positive = 2
    """Operands have 1 to `digits` digits."""
    operands: Annotated[int, Field(strict=True, ge=2)] = 2
    eval_size: Positive = 512
    """Held-out questions; never sampled for training."""

    @field_validator("operators")
    @classmethod
    def _some(cls, operators: tuple[str, ...]) -> tuple[str, ...]:
        if not operators:
            raise ValueError("must name at least one of '+', '-', '*'")
        return operators


class ReasoningGymTask(Section):
    """Any dataset of the reasoning-gym library, scored by that dataset's own scorer."""

    name: Literal["reasoning_gym"]
    dataset: str
    options: dict[str, Any] = {}
    """Passed to the dataset, e.g. {min_terms: 2, max_terms: 3}."""
    size: Positive = 10_000
    eval_size: Positive = 256
    chat: Flag | None = None
    """Apply the tokenizer's chat template. None: if it has one."""


class JsonlTask(Section):
    """Prompt and answer columns of a .jsonl, .json, .csv or .parquet file."""

    name: Literal["jsonl"]
    path: Path
    prompt_column: str = "prompt"
    answer_column: str = "answer"
    eval_path: Path | None = None
    """Held-out file. None: the last `eval_size` rows of `path`."""
    eval_size: Positive = 256
    chat: Flag | None = None
    """Apply the tokenizer's chat template. None: if it has one."""


class CustomTask(Section):
    """A task class of yours, `package.module:Class`; see `rlsys.tasks.Task`."""

    name: Literal["custom"]
    target: str
    options: dict[str, Any] = {}

    @field_validator("target")
    @classmethod
    def _names_an_object(cls, target: str) -> str:
        return _require_target(target)


TaskConfig = Annotated[ArithmeticTask | ReasoningGymTask | JsonlTask | CustomTask, Field(discriminator="name")]


class RewardConfig(Section):
    """How a response becomes a number."""

    function: str = "task"
    """`task` (the task's own scorer), `exact_match`, `math_verify`, or yours as `package.module:function`."""
    workers: Positive = 1
    timeout_s: PositiveFloat = 30.0
    retries: NonNegative = 2

    @field_validator("function")
    @classmethod
    def _known(cls, function: str) -> str:
        if function in ("task", "exact_match", "math_verify"):
            return function
        if ":" not in function:
            raise ValueError("must be 'task', 'exact_match', 'math_verify', or package.module:function")
        return _require_target(function)


# Engine arguments that would contradict a field of ours, or our promises about log-probabilities and safety.
RESERVED_ENGINE_OPTIONS = {
    "model": "set model.path instead",
    "tokenizer": "set model.path instead",
    "dtype": "set rollout.dtype instead",
    "max_model_len": "set model.max_context instead",
    "max_num_seqs": "set rollout.max_concurrent_sequences instead",
    "kv_cache_memory_bytes": "set rollout.kv_cache_gib instead",
    "seed": "set seed instead",
    "logprobs_mode": "must be left out: importance ratios need 'processed_logprobs'",
    "trust_remote_code": "must be left out: code that comes with a model is never run",
}


class RolloutConfig(Section):
    """What the rollout workers sample."""

    workers: Positive = 1
    prompts_per_step: Positive = 64
    """Groups in one learner batch (P)."""
    samples_per_prompt: Positive = 8
    """Responses per group (n)."""
    max_new_tokens: Positive = 16
    temperature: PositiveFloat = 1.0
    top_p: Annotated[float, Field(strict=True, gt=0, le=1)] = 1.0
    top_k: Integer = -1
    """-1: whole vocabulary."""
    dtype: Dtype = "float32"
    """Engine's parameter type."""
    kv_cache_gib: PositiveFloat = 0.0625
    max_concurrent_sequences: Positive = 256
    reset_kv_on_update: Flag = False
    """Recompute running requests' KV cache under each new version instead of keeping it (a mixed policy)."""
    engine_options: dict[str, Any] = {}
    """Further vLLM engine arguments, e.g. {gpu_memory_utilization: 0.5}."""

    @field_validator("engine_options")
    @classmethod
    def _ours_are_set_elsewhere(cls, options: dict[str, Any]) -> dict[str, Any]:
        for option in sorted(options):
            if option in RESERVED_ENGINE_OPTIONS:
                raise refusal(option, options[option], RESERVED_ENGINE_OPTIONS[option])
            if any(word in option for word in ("token", "secret", "password", "api_key")) and "tokens" not in option:
                raise refusal(
                    option, "***", "secrets belong in the environment: a run writes its configuration to disk"
                )
        return options

    @model_validator(mode="after")
    def _whole_vocabulary(self) -> Self:
        why = "truncated sampling scales every importance ratio by the mass it cuts off; lower the temperature instead"
        if self.top_p != 1.0:
            raise refusal("top_p", self.top_p, f"must be 1: {why}")
        if self.top_k not in (-1, 0):
            raise refusal("top_k", self.top_k, f"must be -1: {why}")
        return self


class StalenessConfig(Section):
    """How far behind the learner a trained token may be, in optimizer steps."""

    max: NonNegative = 4
    """Bound on the age of any trained token. 0: strictly synchronous."""
    serving_lag: NonNegative | None = None
    """Part of the bound given to workers that have not yet taken the newest version. None: min(1, max)."""
    window: Positive = 1
    """Completion window W: a batch may take a finished group up to W-1 places out of admission order."""

    @property
    def lag(self) -> int:
        """Versions a worker may be behind and still get requests (L)."""
        return min(1, self.max) if self.serving_lag is None else self.serving_lag

    @model_validator(mode="after")
    def _lag_within_bound(self) -> Self:
        if self.lag > self.max:
            raise refusal("serving_lag", self.serving_lag, f"must not exceed max={self.max}")
        return self


CorrectionName = Literal["none", "tis", "mask_token", "mask_sequence", "m2"]
CORRECTION_FIELDS: dict[str, frozenset[str]] = {
    "none": frozenset(),
    "tis": frozenset({"cap"}),
    "mask_token": frozenset({"low", "high"}),
    "mask_sequence": frozenset({"low", "high", "cap"}),
    "m2": frozenset({"tau"}),
}


class CorrectionConfig(Section):
    """What is done about q = π_V/μ, the ratio fixed during a step."""

    name: CorrectionName = "none"
    cap: PositiveFloat | None = None
    low: NonNegativeFloat | None = None
    high: PositiveFloat | None = None
    tau: PositiveFloat | None = None

    @model_validator(mode="after")
    def _only_its_options(self) -> Self:
        _refuse_unused(self, self.name, CORRECTION_FIELDS[self.name], {"cap", "low", "high", "tau"})
        if self.low is not None and self.high is not None and self.low >= self.high:
            raise refusal("low", self.low, f"must be less than high={self.high}")
        return self

    def options(self) -> dict[str, float]:
        """The options that were set, by name."""
        return _set_options(self, {"cap", "low", "high", "tau"})


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
    "is_sequence_truncated": frozenset({"clip"}),
    "is_token_truncated": frozenset({"clip"}),
    "ppo_clip": frozenset({"clip_low", "clip_high", "dual_clip"}),
    "decoupled_ppo": frozenset({"clip_low", "clip_high"}),
    "cispo": frozenset({"cap"}),
    "aipo": frozenset({"cap"}),
    "gspo": frozenset({"clip_low", "clip_high"}),
    "raft": frozenset(),
}
_OBJECTIVE_OPTIONS = {"clip", "clip_low", "clip_high", "dual_clip", "cap"}
SEQUENCE_OBJECTIVES = frozenset({"is_sequence", "is_sequence_truncated", "gspo"})


class ObjectiveConfig(Section):
    """The surrogate the learner maximises. Unset options take the objective's published default."""

    name: ObjectiveName = "ppo_clip"
    reduce: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"
    correction: CorrectionConfig = CorrectionConfig()
    """A correction's name, or a section with its options."""
    clip: PositiveFloat | None = None
    clip_low: PositiveFloat | None = None
    clip_high: PositiveFloat | None = None
    dual_clip: Annotated[float, Field(strict=True, gt=1)] | None = None
    cap: PositiveFloat | None = None

    @field_validator("correction", mode="before")
    @classmethod
    def _name_alone(cls, value: object) -> object:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _refuse_unused(self, self.name, OBJECTIVE_FIELDS[self.name], _OBJECTIVE_OPTIONS)
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
        return _set_options(self, _OBJECTIVE_OPTIONS)


class AdvantageConfig(Section):
    """How rewards of a group become advantages."""

    name: Literal["group_mean", "grpo", "rloo", "batch_whiten"] = "grpo"


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

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.coef > 0 and not self.reference:
            raise refusal(
                "reference", False, f"must be true with coef={self.coef}: a KL term needs the reference actor"
            )
        if self.coef > 0 and self.placement == "loss" and self.estimator == "k1":
            raise refusal(
                "estimator",
                "k1",
                "must be 'k2' or 'k3' with placement=loss, where k1 has zero expected gradient; or set placement=reward",
            )
        if self.schedule == "adaptive" and not self.coef > 0:
            raise refusal("coef", self.coef, "must be greater than 0 with schedule=adaptive, which starts from it")
        return self


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
    """Row length for sequence packing; grows to the longest sequence."""
    gradient_checkpointing: Flag = False
    max_nonfinite_steps: Positive = 3
    """Stop after this many refused steps in a row."""


class EvalConfig(Section):
    """Held-out evaluation, greedy."""

    every: NonNegative = 25
    """Steps between evaluations; 0: only before and after."""
    max_prompts: Positive = 512


class CheckpointConfig(Section):
    """When the learner's state is written. A last one is always written at the end."""

    every: NonNegative = 50
    """Steps between checkpoints; 0: only at the end."""
    keep: Positive = 2


class RecordsConfig(Section):
    """What a run keeps for later audit."""

    rollouts_every: NonNegative = 1
    """Write the batch's responses of every n-th step to parquet; 0: never."""
    tensorboard: Flag = True


class ResourcesConfig(Section):
    """Where the parts run."""

    address: str | None = None
    """Ray cluster to join; None: start one on this machine and stop it afterwards."""
    pin_cores: Flag = True
    """Give the learner a core of its own and the rollout workers the others (CPU only)."""
    learner_gpus: NonNegativeFloat = 0.0
    rollout_gpus: NonNegativeFloat = 0.0
    reference_gpus: NonNegativeFloat = 0.0
    learner_threads: Positive = 1


class RunConfig(Section):
    """Everything a run depends on."""

    name: str = "run"
    """Directory below `run_dir`."""
    run_dir: Path = Path("runs")
    seed: Integer = 0
    model: ModelConfig = ModelConfig()
    task: TaskConfig
    reward: RewardConfig = RewardConfig()
    rollout: RolloutConfig = RolloutConfig()
    staleness: StalenessConfig = StalenessConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    kl: KLConfig = KLConfig()
    learner: LearnerConfig = LearnerConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    records: RecordsConfig = RecordsConfig()
    resources: ResourcesConfig = ResourcesConfig()

    @property
    def path(self) -> Path:
        """The run's directory."""
        return self.run_dir / self.name

    @field_validator("name")
    @classmethod
    def _plain_name(cls, name: str) -> str:
        if not name or name in (".", "..") or any(c in name for c in "/\\\0") or name != name.strip():
            raise ValueError("must be a plain directory name without slashes")
        return name

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        rollout, model, staleness = self.rollout, self.model, self.staleness
        if rollout.max_new_tokens >= model.max_context:
            raise refusal(
                "rollout.max_new_tokens",
                rollout.max_new_tokens,
                f"must be less than model.max_context={model.max_context}, which also holds the prompt",
            )
        if model.path is None and model.max_context > model.tiny.max_positions:
            raise refusal(
                "model.max_context",
                model.max_context,
                f"must not exceed model.tiny.max_positions={model.tiny.max_positions}",
            )
        if self.slots < rollout.prompts_per_step:
            raise refusal(
                "staleness.window",
                staleness.window,
                f"must be at most {(staleness.max - staleness.lag) * rollout.prompts_per_step + 1}: it leaves "
                f"{self.slots} open prompts, fewer than rollout.prompts_per_step={rollout.prompts_per_step}",
            )
        if self.learner.updates_per_batch > rollout.prompts_per_step:
            raise refusal(
                "learner.updates_per_batch",
                self.learner.updates_per_batch,
                f"must not exceed rollout.prompts_per_step={rollout.prompts_per_step}",
            )
        if self.advantage.name != "batch_whiten" and rollout.samples_per_prompt < 2:
            raise refusal(
                "rollout.samples_per_prompt",
                rollout.samples_per_prompt,
                f"must be at least 2 with advantage.name={self.advantage.name}, which compares responses of one group",
            )
        return self

    @property
    def slots(self) -> int:
        """Prompts that may be open at once, B = (S+1)P - (W-1) with S = max - L."""
        s = self.staleness
        return (s.max - s.lag + 1) * self.rollout.prompts_per_step - (s.window - 1)
