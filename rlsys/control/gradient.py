"""The gradient audit of a finished run, from its directory alone.

A checkpoint `checkpoints/step-V` is the policy that the batch of `rollouts/step-(V+1).parquet` was trained from. Where
both are there, that batch is audited as `audit.every` would have audited it while it was trained.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlsys.config.load import load_config
from rlsys.config.schema import RunConfig
from rlsys.errors import CheckpointError
from rlsys.lab import plots
from rlsys.learning.audit import AuditResult, GradientAudit, kept_of
from rlsys.learning.batch import flatten
from rlsys.observability.rollouts import read_rollouts
from rlsys.observability.run_directory import RunDirectory
from rlsys.records import GroupScore, RolloutGroup, ScoredGroup
from rlsys.tasks import PromptSource
from rlsys.versions import PolicyVersion

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditedStep:
    """One batch: the version it was trained at, the mean staleness of its audited tokens, and what the audit said."""

    version: PolicyVersion
    staleness: float
    groups: int
    result: AuditResult


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientReport:
    """All audited steps of a run, by version, and the picture of them."""

    steps: Sequence[AuditedStep]
    samples: int
    plot: Path

    @property
    def kept(self) -> float | None:
        """Share of the on-policy gradient still in the stale ones, over all steps together."""
        return kept_of([step.result for step in self.steps])


def audit_run(
    root: Path,
    *,
    version: PolicyVersion | None = None,
    prompts: int | None = None,
    samples: int | None = None,
    on_step: Callable[[int, int], None] = lambda done, of: None,
) -> GradientReport:
    """Audit every batch of the run in `root` whose policy was kept, or that of one `version`; writes `gradient.png`.

    `prompts`: groups of each batch, the first ones; None: `audit.prompts`. `samples`: fresh responses a prompt, twice;
    None: as many as the run sampled, which the floor needs to be comparable. `on_step` sees how many are done.
    Raises CheckpointError when no checkpoint has its batch, RewardError when a fresh response cannot be scored.
    """
    directory = RunDirectory(root)
    config = load_config(directory.config)
    pairs = _pairs(directory, config, version)
    reward, source = _reward(config), _source(config, pairs[0][1])
    prompts = config.audit.prompts if prompts is None else prompts
    samples = config.rollout.samples_per_prompt if samples is None else samples
    steps = []
    for done, (at, checkpoint, recorded) in enumerate(pairs):
        on_step(done, len(pairs))
        groups = _with_answers(read_rollouts(recorded)[:prompts], source, recorded)
        batch = flatten(groups, None)
        ages = batch.staleness(at, config.staleness.max).total[batch.loss_mask]
        steps.append(
            AuditedStep(
                version=at,
                staleness=float(ages.double().mean()),
                groups=len(groups),
                result=GradientAudit(config, checkpoint).measure(
                    groups, reward, version=at, seed=config.seed, samples=samples
                ),
            )
        )
    report = GradientReport(steps=steps, samples=samples, plot=directory.root / "gradient.png")
    plots.save(partial(_draw, steps), report.plot, f"Stale and fresh gradients of {config.name}", (9.0, 3.8))
    return report


def _pairs(
    directory: RunDirectory, config: RunConfig, version: PolicyVersion | None
) -> list[tuple[PolicyVersion, Path, Path]]:
    """(V, checkpoint, batch) of every V that has both, ascending; of `version` alone when it is given."""
    checkpoints = {int(path.name.split("-")[1]): path for path in directory.checkpoints.glob("step-*")}
    recorded = {int(path.stem.split("-")[1]): path for path in directory.rollouts.glob("step-*.parquet")}
    both = sorted(v for v in checkpoints if v + 1 in recorded)
    chosen = [v for v in both if version in (None, v)]
    if chosen:
        return [(v, checkpoints[v], recorded[v + 1]) for v in chosen]
    if version is not None and both:
        raise CheckpointError(f"--step {version}: {directory.root} can be audited at {', '.join(map(str, both))}")
    raise CheckpointError(
        f"{directory.root} has no checkpoint step-V with the batch that was trained from it, rollouts/step-(V+1): "
        f"checkpoints {_listed(checkpoints)}, batches {_listed(recorded)}. Train with checkpoint.every set to less "
        f"than learner.steps={config.learner.steps} (it was {config.checkpoint.every}), checkpoint.keep to more than 1 "
        f"(it was {config.checkpoint.keep}), and records.rollouts_every=1 (it was {config.records.rollouts_every})"
    )


def _listed(found: dict[int, Path]) -> str:
    """The numbers in order, the middle of a long list left out."""
    shown = sorted(found)
    return ", ".join(map(str, shown if len(shown) <= 6 else [*shown[:3], "…", *shown[-2:]])) or "none"


def _source(config: RunConfig, checkpoint: Path) -> PromptSource:
    """The run's training prompts, answers included: they follow from task, tokenizer and seed."""
    from rlsys.control.preflight import load_prompts

    return load_prompts(config, str(checkpoint)).source


def _with_answers(groups: Sequence[ScoredGroup], source: PromptSource, recorded: Path) -> list[ScoredGroup]:
    """The recorded groups with whole prompts. Raises CheckpointError when the task now asks something else."""
    found = []
    for scored in groups:
        old = scored.group.prompt
        prompt = source.prompt(old.epoch, old.index)
        if prompt.token_ids != old.token_ids:
            raise CheckpointError(
                f"{recorded}: prompt {old.index} of epoch {old.epoch} was {old.text!r:.60}, and the task now makes "
                f"{prompt.text!r:.60}: it cannot be scored. The task, or the file it reads, changed since the run"
            )
        found.append(replace(scored, group=replace(scored.group, prompt=prompt)))
    return found


def _reward(config: RunConfig) -> Callable[[RolloutGroup], GroupScore]:
    """The run's own reward."""
    from rlsys.rewards import resolve_reward, score_group
    from rlsys.tasks import build_task

    function = resolve_reward(config.reward.function, build_task(config.task, config.seed).score)
    return partial(score_group, function, timeout_s=config.reward.timeout_s, retries=config.reward.retries)


def _draw(steps: Sequence[AuditedStep], figure: "Figure") -> None:
    """Direction with what noise leaves of it, and length, over the versions; the staleness below."""
    direction, length = plots.panels(figure, 2)
    x = [step.version for step in steps]

    def line(axes: Any, values: Sequence[float | None], label: str, color: str, style: str = "o-") -> None:
        known = [(v, value) for v, value in zip(x, values, strict=True) if value is not None]
        axes.plot([v for v, _ in known], [value for _, value in known], style, color=color, label=label)

    line(direction, [step.result.cosine for step in steps], "stale and fresh", plots.BLUE)
    line(direction, [step.result.cosine_floor for step in steps], "fresh and fresh: noise alone", plots.GREY, "o--")
    direction.set(xlabel="learner version", ylabel="cosine", ylim=(min(0.0, *direction.get_ylim()), 1.03))
    line(length, [step.result.norm_ratio for step in steps], "norm, stale/fresh", plots.ORANGE)
    line(length, [step.staleness for step in steps], "mean staleness (versions)", plots.GREEN, "o--")
    length.set(xlabel="learner version")
    length.set_ylim(bottom=0.0)
    for axes in (direction, length):
        axes.set_xticks(x)
        axes.legend()
