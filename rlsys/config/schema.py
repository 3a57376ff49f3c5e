"""The sections of a run's configuration. Frozen; unknown keys are errors; every field says what it means.

Nothing here imports torch, ray or vllm, so that a configuration can be checked anywhere in milliseconds.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from rlsys.config.learner import LearnerConfig, Sharding
from rlsys.config.objective import (
    CORRECTION_FIELDS,
    OBJECTIVE_FIELDS,
    SEQUENCE_OBJECTIVES,
    AdvantageConfig,
    CorrectionConfig,
    CorrectionName,
    KLConfig,
    ObjectiveConfig,
    ObjectiveName,
)
from rlsys.config.observing import (
    AlarmsConfig,
    AuditConfig,
    ObservabilityConfig,
    ProbeConfig,
    SinkName,
    StalenessController,
)
from rlsys.config.scaling import ScalingConfig
from rlsys.config.section import (
    Dtype,
    Flag,
    Fraction,
    Integer,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Section,
    Seed,
    refusal,
)
from rlsys.config.tasks import ArithmeticTask, CustomTask, JsonlTask, ReasoningGymTask, RewardConfig, TaskConfig
from rlsys.config.transport import WeightsConfig, require_fitting_transport

__all__ = [
    "AdvantageConfig",
    "AlarmsConfig",
    "ArithmeticTask",
    "AuditConfig",
    "CORRECTION_FIELDS",
    "CheckpointConfig",
    "CorrectionConfig",
    "CorrectionName",
    "CustomTask",
    "Dtype",
    "EvalConfig",
    "JsonlTask",
    "KLConfig",
    "LearnerConfig",
    "ModelConfig",
    "OBJECTIVE_FIELDS",
    "ObservabilityConfig",
    "ObjectiveConfig",
    "ObjectiveName",
    "ProbeConfig",
    "RESERVED_ENGINE_OPTIONS",
    "ReasoningGymTask",
    "RecordsConfig",
    "ResourcesConfig",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "SEQUENCE_OBJECTIVES",
    "ScalingConfig",
    "Sharding",
    "SinkName",
    "StalenessConfig",
    "StalenessController",
    "TaskConfig",
    "TinyModelConfig",
    "WarmstartConfig",
    "WeightsConfig",
]


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
    """Supervised phase that gives a tiny model something to improve. Cached by the hash of what it depends on.

    It learns right answers, then partly wrong ones: a model that knows more than it says, as RL likes it.
    """

    steps: Positive = 2000
    """Optimizer steps on right answers."""
    batch_size: Positive = 32
    lr: PositiveFloat = 2e-3
    label_noise: Fraction = 0.0
    """Share of answers with a wrong last character in a short second phase; 0: no such phase."""
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


# Engine arguments that would contradict a field of ours, or our promises about log-probabilities and safety.
RESERVED_ENGINE_OPTIONS = {
    "model": "set model.path instead",
    "tokenizer": "set model.path instead",
    "dtype": "set rollout.dtype instead",
    "max_model_len": "set model.max_context instead",
    "max_num_seqs": "set rollout.max_concurrent_sequences instead",
    "seed": "set seed instead",
    "async_scheduling": "must be left out: tokens decoded across a weight update would carry the wrong version",
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
            if {"token", "secret", "password", "key"} & set(option.split("_")):
                raise refusal(
                    option,
                    "***",
                    "must be left out: a run writes its configuration to disk; secrets belong in the environment",
                )
        return options

    @model_validator(mode="after")
    def _no_stale_prefixes(self) -> Self:
        if self.engine_options.get("enable_prefix_caching") and not self.reset_kv_on_update:
            raise refusal(
                "engine_options.enable_prefix_caching",
                True,
                "must be left out unless reset_kv_on_update=true: cached prefixes outlive a weight update",
            )
        return self

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
    backlog: NonNegative = 0
    """Finished batches kept waiting behind the one the learner takes: ages the data, to study staleness. 0: none."""
    controller: Literal["fixed", "ess"] = "fixed"
    """fixed: as many open prompts as the bound allows. ess: fewer while the ESS is below `ess.target`, never more."""
    ess: StalenessController = StalenessController()

    @property
    def lag(self) -> int:
        """Versions a worker may be behind and still get requests (L)."""
        return min(1, self.max) if self.serving_lag is None else self.serving_lag

    @model_validator(mode="after")
    def _lag_within_bound(self) -> Self:
        if self.lag > self.max:
            raise refusal("serving_lag", self.serving_lag, f"must not exceed max={self.max}")
        return self


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
    """Give each learner rank its cores and each rollout worker one; the other parts yield to them (CPU only)."""
    learner_gpus: NonNegativeFloat = 0.0
    """Of each rank."""
    rollout_gpus: NonNegativeFloat = 0.0
    reference_gpus: NonNegativeFloat = 0.0
    """Of the reference, and as much again of the probe."""
    learner_threads: Positive = 1
    """Of each rank."""
    object_store_gib: PositiveFloat = 1.0
    """Shared memory of a cluster started here; a few versions and batches must fit."""
    roles: Flag = False
    """Rollout workers, learner ranks and reward workers demand one unit of the Ray resource of their name each."""


class RunConfig(Section):
    """Everything a run depends on."""

    name: str = "run"
    """Directory below `run_dir`."""
    run_dir: Path = Path("runs")
    seed: Seed = 0
    model: ModelConfig = ModelConfig()
    task: TaskConfig
    reward: RewardConfig = RewardConfig()
    rollout: RolloutConfig = RolloutConfig()
    staleness: StalenessConfig = StalenessConfig()
    weights: WeightsConfig = WeightsConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    kl: KLConfig = KLConfig()
    learner: LearnerConfig = LearnerConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    records: RecordsConfig = RecordsConfig()
    probe: ProbeConfig = ProbeConfig()
    audit: AuditConfig = AuditConfig()
    alarms: AlarmsConfig = AlarmsConfig()
    observability: ObservabilityConfig = ObservabilityConfig()
    scaling: ScalingConfig = ScalingConfig()
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
    def _transport_fits(self) -> Self:
        require_fitting_transport(self)
        return self

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
        if (staleness.backlog + 1) * rollout.prompts_per_step > self.slots:
            raise refusal(
                "staleness.backlog",
                staleness.backlog,
                f"must be at most {self.slots // rollout.prompts_per_step - 1}: {self.slots} prompts may be open, "
                f"rollout.prompts_per_step={rollout.prompts_per_step} of them a batch "
                "(staleness.serving_lag=0 leaves the whole of staleness.max to the queue)",
            )
        if self.learner.updates_per_batch > rollout.prompts_per_step:
            raise refusal(
                "learner.updates_per_batch",
                self.learner.updates_per_batch,
                f"must not exceed rollout.prompts_per_step={rollout.prompts_per_step}",
            )
        if self.learner.ranks > rollout.prompts_per_step:
            raise refusal(
                "learner.ranks",
                self.learner.ranks,
                f"must not exceed rollout.prompts_per_step={rollout.prompts_per_step}: the others would have no work",
            )
        if self.learner.ranks > 1 and self.resources.learner_gpus % 1:
            raise refusal(
                "resources.learner_gpus",
                self.resources.learner_gpus,
                f"must be a whole number with learner.ranks={self.learner.ranks}: ranks cannot share a GPU (NCCL)",
            )
        if self.objective.name == "raft" and self.kl.placement == "reward" and self.kl.acts:
            raise refusal(
                "kl.placement",
                "reward",
                "must be 'loss' with objective.name=raft, which accepts a response by its reward alone",
            )
        self._require_company()
        self.scaling.require_room(rollout=rollout.workers, reward=self.reward.workers)
        return self

    def _require_company(self) -> None:
        """Refuse an advantage that has nothing to compare a response with. `raft` compares none."""
        name, samples = self.advantage.name, self.rollout.samples_per_prompt
        compared, what = samples, "responses to one prompt"
        if name == "batch_whiten":
            compared, what = samples * self.rollout.prompts_per_step, "the responses of a batch"
        if compared < 2 and self.objective.name != "raft":
            raise refusal(
                "rollout.samples_per_prompt",
                samples,
                f"must be at least 2 with advantage.name={name}, which compares {what}",
            )

    @property
    def slots(self) -> int:
        """Prompts that may be open at once, B = (S+1)P - (W-1) with S = max - L."""
        s = self.staleness
        return (s.max - s.lag + 1) * self.rollout.prompts_per_step - (s.window - 1)
